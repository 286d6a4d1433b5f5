"""Training of the project's own small diffusion language model, tokenizer included."""
