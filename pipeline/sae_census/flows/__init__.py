"""One story per job."""
