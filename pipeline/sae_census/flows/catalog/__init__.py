"""Stories of a finished catalog: read it, query it, report it, add logits to it."""
