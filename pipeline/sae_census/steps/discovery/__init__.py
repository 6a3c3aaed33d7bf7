"""One prompt: its codes, its features, its answer."""
