"""Draws the tables of the benchmarks, apart from measuring them."""
