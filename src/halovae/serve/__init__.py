"""A pipeline behind HTTP: a front that keeps jobs, and ranks that do them, one at a time."""
