"""Tensors whose computation waits for the next operator, so that both run in one pass."""
