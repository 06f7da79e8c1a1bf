"""Datasets of clips into latents on disk, on one machine or a cluster with Ray, and their latents for trainers."""

from halovae.datasets.latents import Latents

__all__ = ["Latents"]
