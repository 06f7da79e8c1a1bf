"""Whole pipelines of diffusers on ranks: load, spread, run, and account for time and memory."""
