"""What ranks and programs import before they part: once, and not once each. See `ranks.py` and `programs.py`."""

from __future__ import annotations

import gc

import diffusers
import families
import pictures  # noqa: F401
import PIL.Image
import pipelines  # noqa: F401
import pytest  # noqa: F401
import servers  # noqa: F401
import torch
import torch.utils.flop_counter  # Loads Triton.
import transformers

import halovae.api.parallelize
import halovae.cli.main
import halovae.evaluation.report
import halovae.serve.web  # noqa: F401

torch.set_num_threads(1)  # Threads of a pool would not come along.
for _family in families.FAMILIES.values():
    getattr(diffusers, _family.model)
for _name in ("WanImageToVideoPipeline", "WanPipeline", "WanTransformer3DModel", "UniPCMultistepScheduler"):
    getattr(diffusers, _name)
for _name in ("UMT5EncoderModel", "AutoTokenizer"):
    getattr(transformers, _name)
PIL.Image.init()
gc.freeze()
