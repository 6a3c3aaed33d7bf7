"""Overlays that belong together: `experiment=<name>`."""
