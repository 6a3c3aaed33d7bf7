"""Doors for people: one thin file per flow."""
