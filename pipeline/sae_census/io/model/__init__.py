"""The language model: its families, hooks, generation, and edits while it runs."""
