"""What the API server does for diffusion models beside vLLM's own routes."""
