"""The kernels of a kind of call, compiled side by side before its first one: a small picture asks for the same ones.

Each rank does so by itself and sends nothing: for who waits for a kernel, all ranks wait.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from halovae.base import verdicts
from halovae.base.trees import pictures_in
from halovae.calls.target import Target, told
from halovae.calls.verify import shrunk, tried
from halovae.comm import Comm, Message, Pending
from halovae.comm.protocol import Nothing
from halovae.exact.mesh import Mesh, ShardPlan
from halovae.exact.run import run_sharded
from halovae.kernels import autocast
from halovae.kernels.gpu import support
from halovae.kernels.gpu.compiled_ahead import are_compiled, compiled_ahead, is_possible
from halovae.kernels.kept import apart

LOG = logging.getLogger("halovae")

_ALIKE = 16
"""Latents. Sizes that leave the same remainder have the same kernels: compilers ask whether numbers divide by 16."""
_USUAL = 8
"""Pixels per latent, where nobody needs to know."""


def compile_kernels(
    target: Target, half: str, rank: int, plan: ShardPlan, ratio: Callable[[], int], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:  # fmt: skip
    """Have the kernels of a call with these arguments compiled by other threads, if that was not done on this machine.

    Args:
        rank: with a shard.
        ratio: gives the pixels per latent, 1 for decode; not asked where nothing is cut.
    """
    device = pictures_in((args, kwargs))[0].device
    threads = _cores() // _ranks_here(prod(plan.shape))
    if not support.supports(device) or threads < 2 or not is_possible():
        return
    try:
        latent = _USUAL if half == "encode" and plan.shape == (1, 1) else ratio()
        down, across = (_small(cuts, _ALIKE * latent) for cuts in plan.bounds)
        vae = type(target.vae), _config(target.vae), target.settings()
        kinds = [(p.shape[:2], p.ndim, p.shape[2] > 1, p.dtype) for p in pictures_in((args, kwargs))]
        name = verdicts.digest(device, told([half, rank, down, across, vae, kinds, autocast.state()]))
        if are_compiled(name):
            return
        probe = shrunk((down, across), args, kwargs)
        mesh = Mesh(_Absent(rank, prod(plan.shape)), plan.shape)
        call = functools.partial(target.run_untiled, half)
        with compiled_ahead(device, threads) as asked, apart():
            for size in (support.as_if_large(), nullcontext()):  # Some layers of a large picture have few positions.
                run = functools.partial(run_sharded, mesh, call, *probe.fresh(), probe.bounds)
                # It may fail, as what it computes is of no use: then others may ask for more.
                with suppress(Exception), size:
                    tried(target.vae, device, run)
                    asked.name = name
    except Exception as error:  # Whatever fails: kernels are compiled when they are launched.
        LOG.debug("kernels of %s of %s are not compiled ahead: %s", half, target.name, error)


def _small(cuts: Sequence[int], least: int) -> tuple[int, ...]:
    """Cuts of a small picture: each part is as small as can be, and the same but for multiples of `least`."""
    parts = (high - low for low, high in pairwise(cuts))
    return tuple(accumulate((part if part < least else least + part % least for part in parts), initial=0))


def _config(vae: Any) -> dict[str, Any]:
    """Without what diffusers notes there for itself, in another order in each process."""
    config = getattr(vae, "config", None)
    return {name: value for name, value in config.items() if name[0] != "_"} if isinstance(config, Mapping) else {}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ranks_here(ranks: int) -> int:
    """On this host, as far as their launcher has said so."""
    with suppress(ValueError):
        return max(1, min(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
    return ranks


class _Absent(Comm):
    """Stands for one rank of a group whose others are not there: it is sent nothing, whatever it waits for."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        for _, buffer in receives:
            buffer.zero_()
        return Nothing()

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value] * self.size
