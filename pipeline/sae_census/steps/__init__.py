"""Units of work that can be retried, and what binds them."""
