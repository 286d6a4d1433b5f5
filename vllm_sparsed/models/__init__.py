"""Bidirectional diffusion language models on vLLM's layers, and their configurations."""
