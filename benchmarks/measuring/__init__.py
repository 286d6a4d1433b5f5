"""What all benchmarks share: the machine they ran on, timing, rows of a table."""
