"""The notebook API over prompts and activations."""
