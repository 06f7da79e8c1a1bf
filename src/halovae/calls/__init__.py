"""A VAE's own calls: recorded, checked, joined, replayed."""
