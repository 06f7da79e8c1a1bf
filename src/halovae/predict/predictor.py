"""What an encode or decode will take on N ranks: the real code runs on shapes alone, against a clock on paper.

Nothing is computed and no rank is started. One rank is followed, the one with the most work; its peers are taken to be
in step with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from halovae.base.compiled import as_written
from halovae.base.errors import HalovaeError, InputError, TilingError, counted
from halovae.base.files import first_line
from halovae.base.options import Axis
from halovae.base.trees import on_meta, pictures_in, tensors_in
from halovae.calls.exact_call import ExactCall
from halovae.calls.merge_steps import Rehearsal
from halovae.calls.randomness import Generators
from halovae.calls.record import NETWORKS, NetworkCall
from halovae.calls.state import unchanged, without_fetching
from halovae.calls.target import Target
from halovae.comm.bandwidth import LinkSpeed
from halovae.exact.mesh import ShardPlan
from halovae.kernels.shapes_only import standing_in
from halovae.predict.echo import Effects, echoing
from halovae.predict.meter import Costs, Meter, MeteredComm
from halovae.predict.rates import Speed
from halovae.tiles.blend import Blends
from halovae.tiles.check import Checker
from halovae.tiles.move import Mover
from halovae.tiles.tile_plan import assign, find_chains
from halovae.tiles.tile_runner import TileCall
from halovae.tiles.tile_settings import applied

_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One half, in one mode, on so many ranks. Of one rank: the one that takes longest."""

    half: str
    mode: str
    ranks: int
    cut: str
    """Rows x columns of shards, or the number of tiles."""
    seconds: float
    exposed: float
    """Seconds of them in which the rank only waits for messages."""
    messages: int
    """That the rank sends."""
    bytes: int
    """In them."""
    flops: int
    """Of convolutions, matrix products and attention."""
    memory: int
    """Bytes of input, output and whatever is alive in between, at the most; without the weights."""
    result: Any
    """What the half returns, on the meta device."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "result"}


class Predictor:
    """Predicts the calls of one VAE.

    Args:
        target: the VAE; its weights may be on the meta device, and are not read anywhere else.
        frames: latent frames in one call of the network in exact mode, as for `parallelize`.
    """

    def __init__(self, target: Target, speed: Speed, link: LinkSpeed, frames: int | str = 1) -> None:
        self._target, self._costs, self._link = target, Costs(speed), link
        self._rehearsal = Rehearsal(target, speed.device, frames)
        self._tile_calls: dict[Any, tuple[NetworkCall, ...]] = {}
        self._echoes: Effects = {}

    @torch.inference_mode(False)  # in it operators come whole that are made of others, and views look like copies
    def exact(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, ranks: int = 1, axis: Axis = "auto",
        ratio: int = 1, gather: str = "all",
    ) -> Prediction:  # fmt: skip
        """Exact mode; on one rank what `parallelize` does in a world of one: the whole picture, by the kernels.

        Raises:
            NotExactError: exact mode refuses the VAE.
            InputError: the VAE's code needs values where there are only shapes.
        """
        options = {"ranks": ranks, "axis": axis, "keep": gather}
        running, args, kwargs = self._running(half, args, kwargs), on_meta(args), on_meta(kwargs)
        call = _OnPaper(self._costs, self._link, ratio, self._target, self._rehearsal, half, args, kwargs, **options)
        with running:
            return call.make()

    @torch.inference_mode(False)
    def tile(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, ranks: int = 1, gather: str = "all"
    ) -> Prediction:
        """Tile mode; on one rank, the VAE's own tiled half.

        Raises:
            TilingError: the half has no tiles, or they give a picture of a wrong size.
            InputError: the VAE's code needs values where there are only shapes.
        """
        vae = self._target.vae
        if "use_tiling" not in vars(vae) or not hasattr(vae, NETWORKS[half]):
            raise TilingError(f"{self._target.name}.{half} has no tiles")
        running, args, kwargs = self._running(half, args, kwargs), on_meta(args), on_meta(kwargs)
        blends = Blends(vae)
        meter = Meter(self._costs)
        with running, applied(vae, {"use_tiling": True}):
            kind = self._target.kind(half, args, kwargs)
            if kind not in self._tile_calls:
                self._tile_calls[kind] = _calls(Checker(self._target, half, blends), args, kwargs)
            calls = self._tile_calls[kind]
            schedule = assign(find_chains(calls), ranks)
            rank = schedule.loads.index(max(schedule.loads))
            comm = MeteredComm(rank, ranks, self._link, meter)
            mover = Mover(comm, calls, schedule, range(ranks if gather == "all" else 1), _META)
            call = TileCall(self._target, half, calls, mover, blends)
            with meter.running(), echoing(vae, half, meter, comm, self._echoes):
                call.run(schedule.calls_of(rank), args, kwargs)
                mover.finish()
                result = call.gather(args, kwargs)
        cut = counted(len(schedule.chains), "tile")
        return _prediction(half, "tile", ranks, cut, meter, comm, args, result)

    @contextmanager
    def _running(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """The VAE's code may draw random numbers; the next call is to draw as if it had not."""
        generators = Generators(pictures_in((args, kwargs))[0].device, *args, *kwargs.values())
        try:
            vae, stands_for = self._target.vae, standing_in(self._costs.device)
            with torch.no_grad(), unchanged(vae, args, kwargs), without_fetching(vae), as_written(), stands_for:
                yield
        except HalovaeError:
            raise
        except Exception as error:  # Whatever a model's code raises where a value should be.
            name = f"{self._target.name}.{half}"
            raise InputError(f"{name} can't be followed on shapes alone: {first_line(error)}") from error
        finally:
            generators.rewind()


class _OnPaper(ExactCall[Prediction]):
    """On one rank of a group that is not there, the one with the most work."""

    def __init__(self, costs: Costs, link: LinkSpeed, ratio: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._link, self._compression = link, ratio
        self._meter = Meter(costs)

    def compression(self) -> int:
        return self._compression

    def plan(self) -> None:
        super().plan()
        self.comm = self._paper = MeteredComm(_busiest(self.shards), self._ranks, self._link, self._meter)

    @contextmanager
    def watched(self) -> Iterator[None]:
        with self._meter.running(), echoing(self.target.vae, self.half, self._meter, self._paper, {}):
            yield

    def report(self) -> Prediction:
        cut = "x".join(map(str, self.shards.shape))
        return _prediction(self.half, "exact", self._ranks, cut, self._meter, self._paper, self.args, self.result)


def _calls(checker: Checker, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[NetworkCall, ...]:
    """The network calls of the tiled half; refused where its result has another size than without tiles."""
    try:
        tiled, whole = checker.recorded(args, kwargs), checker.untiled(args, kwargs)
    except TilingError:
        raise
    except Exception as error:  # Whatever a model's own tiled method raises.
        raise TilingError(f"its tiles fail: {error}") from error
    if whole and pictures_in(tiled.result)[0].shape != pictures_in(whole.result)[0].shape:
        raise TilingError("its tiles give a picture of a wrong size")
    return tiled.calls


def _prediction(
    half: str, mode: str, ranks: int, cut: str, meter: Meter, comm: MeteredComm, args: Any, result: Any
) -> Prediction:
    return Prediction(
        half=half,
        mode=mode,
        ranks=ranks,
        cut=cut,
        seconds=meter.seconds,
        exposed=meter.exposed,
        messages=comm.traffic.messages,
        bytes=comm.traffic.bytes,
        flops=meter.flops,
        memory=meter.peak + sum(tensor.nbytes for tensor in tensors_in(args)),
        result=result,
    )


def _busiest(plan: ShardPlan) -> int:
    """The rank of the largest shard; among equals, of one with most neighbours."""

    def part(bounds: tuple[int, ...]) -> int:
        sizes = [high - low for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        inner = range(len(sizes))
        return max(inner, key=lambda i: (sizes[i], 0 < i < len(sizes) - 1))

    return part(plan.bounds[0]) * plan.shape[1] + part(plan.bounds[1])
