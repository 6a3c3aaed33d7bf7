"""Reading what a catalog holds."""
