"""Every mode, cut and number of ranks for one VAE and one clip, predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.errors import HalovaeError, InputError
from halovae.base.options import MOST_RANKS, Axis, Half
from halovae.base.quiet import quiet
from halovae.base.trees import on_meta
from halovae.calls.dtypes import set_dtypes
from halovae.calls.target import Target
from halovae.comm.bandwidth import LinkSpeed
from halovae.exact.mesh import ShardPlan, plan_shards
from halovae.media.codec import decode_calls
from halovae.media.vae_limits import Fit, Limits, decode_arguments, latent_of
from halovae.predict.predictor import Prediction, Predictor
from halovae.predict.rates import Speed


@dataclass(frozen=True, kw_only=True)
class Way:
    """A mode, a number of ranks, and for exact mode a cut."""

    mode: str
    ranks: int
    axis: Axis = "auto"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run one half of a VAE."""

    half: str
    mode: str
    ranks: int
    prediction: Prediction | None
    """None: refused."""
    refusal: str = ""
    """Why."""
    memory: int = 0
    """Bytes on a rank, weights included."""
    efficiency: float | None = None
    """Time of exact mode on one rank, over ranks * time; None where that can't be run."""

    def to_dict(self) -> dict[str, Any]:
        found = self.prediction.to_dict() if self.prediction else {}
        named = {"half": self.half, "mode": self.mode, "ranks": self.ranks, "refusal": self.refusal}
        return {**found, **named, "memory": self.memory, "efficiency": self.efficiency}


class Survey:
    """Predicts the halves of one VAE, which may be without weights, for one clip."""

    def __init__(
        self, vae: nn.Module, limits: Limits, fit: Fit, dtypes: Mapping[Half, torch.dtype], speed: Speed,
        link: LinkSpeed,
    ) -> None:  # fmt: skip
        self._exact: dict[tuple[str, int, ShardPlan], Row] = {}
        with quiet():
            set_dtypes(vae, dtypes)
        self._vae, self._limits, self._fit, self._dtypes = vae, limits, fit, dtypes
        self._predictor = Predictor(Target(vae), speed, link, frames="auto")
        self.weights = sum(tensor.nbytes for tensor in (*vae.parameters(), *vae.buffers()))
        self._inputs = {"encode": self._clip()}
        self._inputs["decode"] = self._latents()

    def ways(self, half: str, ranks: Sequence[int]) -> list[Way]:
        """Exact mode on each number of ranks and cut, then tile mode."""
        cuts: dict[tuple[int, ShardPlan], Axis] = {}
        for count in ranks:
            for axis in _cuts(count):
                cuts.setdefault((count, self._plan(half, count, axis)), axis)
        exact = [Way(mode="exact", ranks=count, axis=axis) for (count, _), axis in cuts.items()]
        return [*exact, *(Way(mode="tile", ranks=count) for count in ranks)]

    def row(self, half: str, way: Way) -> Row:
        """What a way to run a half takes."""
        return self.exact(half, way.ranks, way.axis) if way.mode == "exact" else self.tile(half, way.ranks)

    def exact(self, half: str, ranks: int, axis: Axis = "auto") -> Row:
        key = half, ranks, self._plan(half, ranks, axis)
        if key not in self._exact:
            ratio = self._limits.ratio if half == "encode" else 1
            self._exact[key] = self._row(half, "exact", ranks, axis=axis, ratio=ratio)
        return self._exact[key]

    def _plan(self, half: str, ranks: int, axis: Axis) -> ShardPlan:
        height, width = self._inputs[half][0].shape[-2:]
        return plan_shards(height, width, self._limits.ratio if half == "encode" else 1, ranks, axis)

    def tile(self, half: str, ranks: int) -> Row:
        return self._row(half, "tile", ranks)

    def enough_ranks(self, half: str, memory: int) -> int | None:
        """The smallest power of two of ranks on each of which exact mode takes at most `memory` bytes."""
        ranks, last = 1, None
        while ranks <= MOST_RANKS:
            row = self.exact(half, ranks)
            if row.prediction is None or row.prediction.cut == last:
                return None
            if row.memory <= memory:
                return ranks
            ranks, last = 2 * ranks, row.prediction.cut
        return None

    def _row(self, half: str, mode: str, ranks: int, **options: Any) -> Row:
        picture, calls = self._inputs[half]
        kwargs = decode_arguments(self._vae, picture) if half == "decode" else {}
        predict = self._predictor.exact if mode == "exact" else self._predictor.tile
        try:
            found = predict(half, (picture,), kwargs, ranks=ranks, **options)
        except HalovaeError as error:
            return Row(half=half, mode=mode, ranks=ranks, prediction=None, refusal=str(error))
        found = replace(
            found, seconds=calls * found.seconds, exposed=calls * found.exposed, flops=calls * found.flops,
            messages=calls * found.messages, bytes=calls * found.bytes,
        )  # fmt: skip
        row = Row(half=half, mode=mode, ranks=ranks, prediction=found, memory=self.weights + found.memory)
        alone = row if (mode, ranks) == ("exact", 1) else self.exact(half, 1)
        if alone.prediction is None:
            return row
        return replace(row, efficiency=alone.prediction.seconds / (ranks * found.seconds))

    def _clip(self) -> tuple[Tensor, int]:
        """What encode gets, and how often it is called."""
        limits, fit = self._limits, self._fit
        frames = 1 if limits.per_frame else limits.lead + fit.padded_frames
        middle = (frames,) if limits.has_frame_dim else ()
        shape = 1, limits.channels, *middle, fit.padded_height, fit.padded_width
        clip = torch.empty(shape, dtype=self._dtypes["encode"], device="meta")
        return clip, fit.padded_frames if limits.per_frame else 1

    def _latents(self) -> tuple[Tensor, int]:
        """What decode gets, and how often it is called."""
        alone = self.exact("encode", 1)
        found = alone.prediction or self.tile("encode", 1).prediction
        if found is None:
            raise InputError(alone.refusal)
        latent = latent_of(found.result)
        calls = self._inputs["encode"][1]
        latents = on_meta(torch.cat([latent] * calls)).to(self._dtypes["decode"])
        calls = decode_calls(self._vae, self._limits, latents)
        return latents[: len(latents) // calls], calls


def _cuts(ranks: int) -> tuple[Axis, ...]:
    """By default, along each axis, and along both in the squarest way that takes all ranks."""
    rows = next(rows for rows in range(isqrt(ranks), 0, -1) if ranks % rows == 0)
    return "auto", "height", "width", (rows, ranks // rows)
