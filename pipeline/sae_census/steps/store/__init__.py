"""Keys, records and events of a store."""
