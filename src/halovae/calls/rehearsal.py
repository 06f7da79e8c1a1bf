"""How many steps of a VAE would go in one call of its network, found out before there are weights."""

from __future__ import annotations

from typing import Any

import torch

from halovae.base.trees import map_tensors
from halovae.calls.dataflow import Spec
from halovae.calls.merge_steps import Merger, Steps
from halovae.calls.randomness import frozen_generators
from halovae.calls.state import fetches_weights
from halovae.calls.target import Target
from halovae.comm import SoloComm
from halovae.exact.shard_plan import ShardPlan


class Rehearsal:
    """Tries what `Merger` tries, where the weights are: a VAE without any gets random ones on the device.

    Whether a network takes several steps at once is a matter of its architecture.

    Args:
        target: the VAE.
        device: that calls would run on.
        frames: latent frames in one call, as for `Merger`.
    """

    def __init__(self, target: Target, device: torch.device, frames: int | str) -> None:
        self._target, self._device, self._frames = target, device, frames
        self._merger: Merger | None = None

    def steps(self, half: str, plan: ShardPlan, ratio: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps:
        """As `Merger.steps`, of arguments that count by shape only."""
        if self._frames == 1 or (self._frames == "auto" and self._device.type == "cpu"):
            return ()
        if self._merger is None:
            self._merger = Merger(SoloComm(), self._able_to_run(), self._frames)
        args, kwargs = (map_tensors(lambda t: Spec(t).zeros(self._device), value) for value in (args, kwargs))
        return self._merger.steps(half, plan, lambda: ratio, args, kwargs)

    def _able_to_run(self) -> Target:
        vae: Any = self._target.vae
        fetched = any(map(fetches_weights, vae.modules()))
        if fetched or not any(parameter.is_meta for parameter in vae.parameters()):
            return self._target
        from halovae.base.quiet import quiet  # needs diffusers, as such a VAE does

        with quiet(), frozen_generators(self._device), torch.device(self._device):
            copy = type(vae).from_config(vae.config).to(self._device, vae.dtype)
        return Target(copy.eval().requires_grad_(False))
