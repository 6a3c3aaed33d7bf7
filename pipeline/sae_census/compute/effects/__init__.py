"""What a feature does: linear splits, edits, and the measure of their effects."""
