"""What ranks import before they part: once, and not once each. See `ranks.py`."""

from __future__ import annotations

import gc

import diffusers
import families
import pictures  # noqa: F401
import pipelines  # noqa: F401
import pytest  # noqa: F401
import torch

import halovae.api.parallelize  # noqa: F401

torch.set_num_threads(1)  # Threads of a pool would not come along.
for _family in families.FAMILIES.values():
    getattr(diffusers, _family.model)
gc.freeze()
