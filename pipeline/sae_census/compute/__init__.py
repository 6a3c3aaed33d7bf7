"""Pure functions and values on arrays and tensors: no files, clock, Ray or config."""
