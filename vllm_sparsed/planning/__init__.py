"""What one request will do, from it alone: blocks, steps, and when sparse attention pays."""
