"""LLaDA, Dream, SparseD and their loops in plain PyTorch: slow, and easy to check by eye."""
