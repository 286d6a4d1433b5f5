"""The `SPARSED` attention backend: dense until step t*, block-sparse per query head after it."""
