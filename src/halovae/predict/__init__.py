"""Seconds and memory of a call, told before it runs."""
