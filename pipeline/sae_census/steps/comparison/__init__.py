"""Two sides, feature by feature."""
