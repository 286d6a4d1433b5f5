"""The worker side: one denoising step of all running requests per engine step."""
