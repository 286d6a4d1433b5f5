"""Which requests take a denoising step, and the counters of what was done."""
