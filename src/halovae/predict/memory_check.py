"""Whether a call fits into the memory that is free, told before its first allocation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import inf, prod
from typing import Any

from torch import Tensor

from halovae.base import verdicts
from halovae.base.errors import HalovaeError, TooLittleMemoryError
from halovae.base.memory import free_bytes
from halovae.base.trees import tensors_in
from halovae.calls.blueprint import words_of
from halovae.calls.target import Target
from halovae.comm.bandwidth import LinkSpeed
from halovae.exact.mesh import ShardPlan
from halovae.kernels import autocast
from halovae.predict.predictor import Predictor
from halovae.predict.rates import GivenSpeed
from halovae.tiles.tile_settings import applied, described

_GROWTH = {"encode": 2**10, "decode": 2**15}
"""Bytes at the peak per byte of input, more than known networks take: below that there is nothing to predict."""
_TELLING = 256 * 2**20
"""Bytes below which a peak says more of caches and libraries than of the picture."""
_NO_TIME = {"flops": inf, "bandwidth": inf, "overhead": 0.0}
_NO_LINK = LinkSpeed(latency=0.0, bandwidth=inf)


class Room:
    """Checks the calls of either mode on one rank."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._per_position: dict[str, float] = {}
        self._predicted: dict[Any, int | None] = {}

    def learn(self, half: str, plan: ShardPlan, picture: Tensor, growth: int) -> None:
        """Take in by how many bytes a call has grown at its peak: memory grows with the positions."""
        if growth >= _TELLING:
            self._per_position[half] = growth / _largest_part(plan, picture)

    def check(
        self, half: str, plan: ShardPlan, ratio: int, gather: str, picture: Tensor,
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        """Refuse a call that needs more than is free: by what earlier calls took, else by a run on shapes alone."""
        part, ranks, free = _largest_part(plan, picture), prod(plan.shape), free_bytes(picture.device)
        if free is None:
            return
        ask = functools.partial(self._predict, half, args, kwargs)
        exact = functools.partial(ask, "exact", ratio=ratio, gather=gather)
        learned = self._per_position.get(half)
        if learned is not None:
            needed = int(learned * part)
        elif part * picture.element_size() * _GROWTH[half] <= free:
            return
        else:
            needed = exact(ranks=ranks, axis=plan.shape)
        if needed is None or needed <= free:
            return
        more = 2 * ranks, 4 * ranks, 8 * ranks
        enough = (
            [n for n in more if (exact(ranks=n) or inf) <= free] if learned is None else [-(-ranks * needed // free)]
        )
        fits = [f"{n} ranks" for n in enough[:1]]
        if (ask("tile", ranks=ranks) or inf) <= free:
            fits.append("mode='tile'")
        raise _too_little(half, needed, ranks, free, fits)

    def check_tiles(
        self, half: str, settings: dict[str, Any], ranks: int, ratio: Callable[[], int], gather: str, picture: Tensor,
        args: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        """Refuse a call in tiles that needs more than is free, by a run on shapes alone.

        Args:
            settings: of the tiles, where they differ from the VAE's.
            ranks: how many run tiles.
            ratio: asked only where memory is short.
        """
        free = free_bytes(picture.device)
        if free is None or picture.nbytes * _GROWTH[half] <= free:
            return
        ask = functools.partial(self._predict, half, args, kwargs)
        tile = functools.partial(ask, "tile", gather=gather)

        def exact(count: int) -> int | None:
            try:
                return ask("exact", ranks=count, ratio=ratio(), gather=gather)
            except Exception:  # The refusal says more than why one remedy isn't known.
                return None

        with applied(self._target.vae, settings):
            needed = tile(ranks=ranks)
            if needed is None or needed <= free:
                return
            more = ranks, 2 * ranks, 4 * ranks, 8 * ranks
            fits = [f"{n} ranks" for n in more[1:] if (tile(ranks=n) or inf) <= free][:1]
            fits += [f"mode='exact' on {n} ranks" for n in more if (exact(n) or inf) <= free][:1]
        raise _too_little(f"{half} in tiles", needed, ranks, free, [*fits, "smaller tiles"])

    def _predict(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, **options: Any
    ) -> int | None:
        """Bytes besides the arguments, which are there already; None where it can't be told. Once per shape."""
        given = tensors_in((args, kwargs))
        shapes = ((tuple(tensor.shape), tensor.dtype) for tensor in given)
        key = mode, half, described(self._target.vae), *shapes, repr(options), autocast.state()
        if key not in self._predicted:
            # In a new process the run on shapes takes longer than the call itself, so its answer is kept.
            words = words_of(self._target, half, args, kwargs)
            name = words and verdicts.name_of(given[0].device, "memory", mode, sorted(options.items()), words)
            needed = verdicts.read(name)
            if not isinstance(needed, int):
                needed = self._run_on_shapes(half, args, kwargs, mode, options)
                if needed is not None:
                    verdicts.write(name, needed)
            self._predicted[key] = needed
        return self._predicted[key]

    def _run_on_shapes(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], mode: str, options: dict[str, Any]
    ) -> int | None:
        given = tensors_in((args, kwargs))
        try:
            predictor = Predictor(self._target, GivenSpeed(**_NO_TIME, device=given[0].device), _NO_LINK)
            found = getattr(predictor, mode)(half, args, kwargs, **options)
        except HalovaeError:  # The call itself says what is wrong, if anything is.
            return None
        return found.memory - sum(tensor.nbytes for tensor in given)


def _too_little(what: str, needed: int, ranks: int, free: int, remedies: list[str]) -> TooLittleMemoryError:
    return TooLittleMemoryError(
        f"{what} needs about {_size(needed)} on each of {ranks} ranks, but {_size(free)} are free: "
        f"use {' or '.join([*remedies, 'a smaller picture'])}"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _largest_part(plan: ShardPlan, picture: Tensor) -> int:
    """Elements of the largest shard of the picture."""
    return picture[..., :1, :1].numel() * prod(plan.largest)
