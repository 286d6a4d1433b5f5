"""A server under load, and what the engine costs beside the model."""
