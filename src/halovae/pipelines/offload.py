"""Weights that wait on the host: layer by layer, or part by part."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.base.quiet import all_quiet
from halovae.pipelines.generation_settings import Setup
from halovae.pipelines.transformers import denoisers


def place(pipeline: Any, setup: Setup, device: torch.device) -> None:
    """Put the pipeline's weights where `setup` wants them: on the device, or on the host until they are due.

    Raises:
        InputError: there is no accelerator to offload from, or this pipeline can't be offloaded.
    """
    if setup.layerwise_offload:
        _by_layer(pipeline, device)
    elif setup.cpu_offload:
        if device.type == "cpu":
            raise InputError(
                "--enable-cpu-offload needs an accelerator: on the CPU all weights are on the host already"
            )
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _by_layer(pipeline: Any, device: torch.device) -> None:
    """Group offload of every part; the next layer is fetched on a stream of its own where there are streams.

    Denoisers go block by block. The others go leaf by leaf: a VAE is called by `encode` and `decode`, which pass by
    the `forward` that blocks hang on. On the CPU the same hooks run and have nothing to move.
    """
    blocks = set(map(id, denoisers(pipeline.components).values()))
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        by_block = id(part) in blocks
        try:
            with all_quiet():
                apply_group_offloading(
                    part,
                    onload_device=device,
                    offload_device=torch.device("cpu"),
                    offload_type="block_level" if by_block else "leaf_level",
                    num_blocks_per_group=1 if by_block else None,
                    use_stream=device.type != "cpu",
                )
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--enable-layerwise-offload: {name} can't be offloaded: {first_line(error)}") from error
