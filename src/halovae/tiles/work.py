"""The two passes of a tiled call through the VAE's own method: run the own tiles, then put all of them together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from halovae.base.errors import TilingError
from halovae.calls.dataflow import repeat
from halovae.calls.record import NETWORKS, Function, NetworkCall, answering
from halovae.comm import Comm
from halovae.tiles.blend import Blends
from halovae.tiles.move import Mover


class _Finished(BaseException):
    """The network has answered its last call: what the VAE goes on to do is of no use yet."""


class Watched(TorchFunctionMode):
    """Within it, torch functions raise once another rank has failed: a tile can take minutes.

    Args:
        comm: the group.
    """

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self._comm = comm

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._comm.check()
        return func(*args, **(kwargs or {}))


class _Pass:
    """Answers the network's calls one after the other."""

    def __init__(self, calls: tuple[NetworkCall, ...], mover: Mover, device: torch.device) -> None:
        self._calls, self._mover, self._device = calls, mover, device
        self._next = 0

    def _take(self) -> tuple[int, NetworkCall]:
        number = self._next
        self._next += 1
        if number >= len(self._calls):
            raise TilingError(f"the VAE called its network more often than the {len(self._calls)} times planned")
        return number, self._calls[number]


class _Worker(_Pass):
    """Runs the calls of this rank. The VAE gets zeros for all of them: it is only asked what it calls next."""

    def __init__(
        self, calls: tuple[NetworkCall, ...], mover: Mover, device: torch.device, network: nn.Module, mine: set[int]
    ) -> None:
        super().__init__(calls, mover, device)
        self._network, self._mine = network, mine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        number, call = self._take()
        real = None
        if number in self._mine:
            real = self._network(*args, **kwargs)
            leaves = pytree.tree_leaves(real)
            tensors = [(call.leaves[place], leaves[place]) for place in call.used]
            for spec, tensor in tensors:
                if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                    raise TilingError(f"the network gave {tuple(tensor.shape)} {tensor.dtype} where {spec} was planned")
            self._mover.results[number] = [spec.arranged(tensor) for spec, tensor in tensors]
        else:
            repeat(call.draws, self._device)
        if self._mover.is_round(number):
            self._mover.post()
        if self._next == len(self._calls):
            raise _Finished
        return call.result([spec.zeros(self._device) for spec in call.specs], real, self._device)


class _Replay(_Pass):
    """Hands out the results, which the VAE blends, crops and puts together."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        number, call = self._take()
        repeat(call.draws, self._device)
        return call.result(self._mover.results.pop(number), device=self._device)


def run_own_tiles(
    vae: nn.Module, half: str, method: Function, args: tuple[Any, ...], kwargs: dict[str, Any],
    calls: tuple[NetworkCall, ...], mine: set[int], mover: Mover, blends: Blends, device: torch.device,
) -> None:  # fmt: skip
    """Run the calls numbered `mine`; each chain's results leave as soon as they are complete."""
    worker = _Worker(calls, mover, device, getattr(vae, NETWORKS[half]), mine)
    try:
        with answering(vae, half, worker), blends.skipped():
            method(*args, **kwargs)
    except _Finished:
        return
    raise TilingError(f"the VAE called its network less often than the {len(calls)} times planned")


def put_together(
    vae: nn.Module, half: str, method: Function, args: tuple[Any, ...], kwargs: dict[str, Any],
    calls: tuple[NetworkCall, ...], mover: Mover, blends: Blends, device: torch.device,
) -> Any:  # fmt: skip
    """What the VAE makes of the results that have arrived."""
    with answering(vae, half, _Replay(calls, mover, device)), blends.fast():
        return method(*args, **kwargs)
