"""Stories of the engine: plan, analyze, reduce, verify, compact, sweep, status."""
