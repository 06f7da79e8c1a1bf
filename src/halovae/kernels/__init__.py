"""Faster ways to run a network on one device: tensor functions that know no VAE."""
