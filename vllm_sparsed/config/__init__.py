"""What may be asked for: parameters of requests and servers, the engine's configuration, and the
checks and defaults that follow from them."""
