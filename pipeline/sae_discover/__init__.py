"""`sae-discover` and `sae-discover`: discovery under the name that its users know."""
