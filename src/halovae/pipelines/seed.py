"""One seed for all ranks: with different ones, each would denoise another video."""

from __future__ import annotations

import secrets

import torch

from halovae.comm import Comm

_SEEDS = 2**31


def agreed_seed(comm: Comm, seed: int | None) -> int:
    """`seed`, or one that the first rank draws. Called on every rank."""
    return comm.all_gather_object(secrets.randbelow(_SEEDS) if seed is None else seed)[0]


def generator(seed: int) -> torch.Generator:
    """On the CPU, so that a seed means the same noise on every device."""
    return torch.Generator("cpu").manual_seed(seed)
