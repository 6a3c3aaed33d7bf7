"""Texts from files, folders, addresses and the hub, row by row."""
