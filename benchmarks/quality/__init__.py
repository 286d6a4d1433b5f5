"""Tasks with known answers in long documents, and their evaluation through vLLM."""
