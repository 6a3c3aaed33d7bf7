"""Ablation and tracing of one feature."""
