"""Whole requests: ours, and the loops a PyTorch user would write."""
