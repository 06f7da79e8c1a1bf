"""Running a half of a VAE for the stages of a clip that comes in parts, each with what the one before has left."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.errors import NotExactError
from halovae.base.functions import outside_modes
from halovae.base.private_torch import pytree
from halovae.base.trees import map_tensors, pictures_in, tensors_in
from halovae.calls.dataflow import Spec
from halovae.calls.merge_steps import Merged, Steps
from halovae.calls.record import NETWORKS, Function, NetworkCall, answering
from halovae.calls.state import Snapshot, copied, is_same, refill
from halovae.calls.time_stages import Part, Stage, TimeStages, absent
from halovae.exact.layout import layout_of, mark, plain
from halovae.exact.run import first_tensor
from halovae.kernels.fast_mode import finished
from halovae.kernels.lazy.deferred import computed


@dataclass
class Held:
    """What one rank keeps of a clip between two stages."""

    caches: list[Any] = field(default_factory=list[Any])
    """After the calls that the stage before `gives`: the containers among their arguments, what modules keep, and what
    else they return."""
    results: tuple[list[Tensor], ...] = ()
    """Of the calls that the stage before has run."""
    like: tuple[Tensor, ...] = ()
    """A result without a frame."""
    owners: tuple[int, ...] = ()
    """The rank that has each of the caches, where no rank has all of them."""
    is_used_up: bool = False
    """Whether the next stage gives up what it takes: it can't be run again then."""

    def take(self, place: int) -> Any:
        """Caches that a stage goes on with."""
        caches = self.caches[place]
        if self.is_used_up:
            self.caches[place] = None
        return caches

    @property
    def bytes(self) -> int:
        """Of memory."""
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(vars(self))}
        return sum(stores.values())


class Resumed:
    """Runs a half for one stage.

    Args:
        held: what the stage before has left.

    Attributes:
        held: what this stage leaves.
        steps: how many of the stage's calls go in each call of the network; nothing: one by one.
    """

    def __init__(self, vae: nn.Module, half: str, stages: TimeStages, stage: Stage, held: Held) -> None:
        self._vae, self._half, self.stage, self._before = vae, half, stage, held
        self.stages, self.held = stages, held
        self.steps: Steps = ()

    def __call__(self, method: Function, *args: Any, **kwargs: Any) -> Any:
        """The new frames, as what the method returns."""
        result = self._run(method, args, kwargs)
        if (made := next(self._numbers)) != len(self.stage.calls):
            raise NotExactError(f"the VAE called its network {made} times, not {len(self.stage.calls)} as planned")
        self.held = self._left()
        return new_frames(self.stage, result)

    def _run(self, method: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the method returns for the clip of the stage."""
        self._device = pictures_in((args, kwargs))[0].device
        self._numbers, self._like = itertools.count(), self._before.like
        self._network = getattr(self._vae, NETWORKS[self._half])
        if max(self.steps, default=1) > 1:
            self._network = Merged(self._network, self.steps, self._first_promised())
        self._caches: dict[int, Any] = {}
        self._results: list[list[Tensor]] = []
        snapshot = Snapshot(self.stages.facts, args, kwargs, values=False)
        try:
            with answering(self._vae, self._half, self._answer):
                return method(*args, **kwargs)
        finally:
            snapshot.restore()

    def _left(self) -> Held:
        """What is kept for the next stage."""
        caches = [self._caches.pop(number, None) for number in self.stage.gives]
        return Held(caches, tuple(self._results), self._like)

    def _next(self) -> tuple[int, NetworkCall]:
        """Which of the planned calls the VAE makes."""
        number, calls = next(self._numbers), self.stage.calls
        if number >= len(calls):
            raise NotExactError(f"the VAE called its network more often than {len(calls)} times, as planned")
        return number, calls[number]

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        stage, (number, call) = self.stage, self._next()
        if number in stage.run:
            return self._real(number, call, args, kwargs)
        holds, others = dict(stage.holds), self._gone_on(number, args, kwargs)
        if number in holds:
            used = list(map(copy, self._before.results[holds[number]]))
        else:
            used = [self._missing(place, spec, stage.blank * spec.shape[2]) for place, spec in enumerate(call.specs)]
        return call.result(used, others, device=self._device)

    def _gone_on(self, number: int, args: Any, kwargs: Any) -> Any:
        """Put the caches in place that a call has left when it was made; what else it gave then."""
        takes = dict(self.stage.takes)
        if number not in takes:
            return None
        containers, modules, others = self._before.take(takes[number])
        refill((args, kwargs), copied(containers))
        self.stages.rest.set(copied(modules))
        return others

    def _real(self, number: int, call: NetworkCall, args: Any, kwargs: Any) -> Any:
        before = pytree.tree_map_only(Tensor, weakref.ref, copied((args, kwargs)))  # It may give up its caches.
        result = self._called(number, args, kwargs)
        leaves, structure = pytree.tree_flatten(result)
        used = [leaves[place] for place in call.used]
        if [tensor.shape[2] for tensor in used] != [spec.shape[2] for spec in call.specs]:
            raise NotExactError(f"call {number} of the network gave other frames than planned")
        self._like = self._like or tuple(blank(tensor, 0) for tensor in used)
        self._keep(used)
        if number in self.stage.gives:
            for place in call.used:
                leaves[place] = None
            before = pytree.tree_map_only(weakref.ref, _alive, before)
            kept = _changes(args, before[0]), _changes(kwargs, before[1]), self.stages.rest.changed(), leaves
            args, kwargs, modules, leaves = pytree.tree_map_only(Tensor, _kept, copied(kept))
            self._caches[number] = (args, kwargs), modules, pytree.tree_unflatten(leaves, structure)
        return result

    def _called(self, number: int, args: Any, kwargs: Any) -> Any:
        return self._network(*args, **kwargs)

    def _keep(self, used: list[Tensor]) -> None:
        if self.stages.blends:
            self._results.append(list(map(copy, used)))  # The VAE may write into what it gets.

    def _first_promised(self) -> Tensor:
        call = self.stage.calls[self.stage.run[0]]
        return self._missing(0, call.specs[0], call.specs[0].shape[2])

    def _missing(self, place: int, spec: Spec, frames: int) -> Tensor:
        like = self._like[place] if self._like else None
        if like is None or layout_of(like) is None:
            return absent(spec, frames, self._device)
        return blank(like, frames)


def new_frames(stage: Stage, result: Any) -> Any:
    """Those of a stage, of what the method returns for its clip."""
    frames = pictures_in(result)[0].shape[2]
    start = frames - stage.back

    def cut(tensor: Tensor) -> Tensor:
        is_video = tensor.ndim == 5 and tensor.shape[2] == frames
        return tensor[:, :, start : start + stage.length] if is_video else tensor

    return map_tensors(cut, result)


def laid_out(stage: Stage, real: Tensor) -> Tensor:
    """The clip that the VAE's method gets for a stage: blank frames, and at its end the last ones of the real.

    Raises:
        NotExactError: there are too few of these.
    """
    if real.shape[2] < stage.fresh:
        raise NotExactError("a step needs frames that are kept no more")
    real = real[:, :, real.shape[2] - stage.fresh :]
    return torch.cat([blank(real, stage.frames - stage.fresh), real], 2)


class WholeClip:
    """Runs a half for all stages of a clip that is there from the beginning.

    Args:
        vae: the VAE.
        half: "encode" or "decode".
        stages: of that half.
        parts: of the clip.
        steps: how many calls of a stage go in each call of the network.
        take: gets the new frames of each stage, in order (on shards, where these are run).
    """

    def __init__(
        self, vae: nn.Module, half: str, stages: TimeStages, parts: Sequence[Part], steps: Callable[[Stage], Steps],
        take: Callable[[Tensor], None],
    ) -> None:  # fmt: skip
        self._vae, self._half, self._stages, self._parts = vae, half, stages, parts
        self._steps, self._take = steps, take

    def __call__(self, method: Function, clip: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output without a frame."""
        held, frames, new = Held(), 0, clip
        for count, stage, _ in self._parts:
            frames, held.is_used_up = frames + count, True
            run = Resumed(self._vae, self._half, self._stages, stage, held)
            run.steps = self._steps(stage)
            new = first_tensor(run(method, laid_out(stage, clip[:, :, :frames]), *args, **kwargs))
            held = run.held
            if stage.length:
                self._take(_finished(new))
        return new[:, :, :0]


@outside_modes
def blank(like: Tensor, frames: int) -> Tensor:
    """As many blank frames, laid out as those of another tensor."""
    layout, shape = layout_of(like), (*like.shape[:2], frames, *like.shape[3:])
    return mark(torch.zeros(shape, dtype=like.dtype, device=like.device), layout and layout.replace(2, plain(frames)))


@outside_modes
def copy(tensor: Tensor) -> Tensor:
    """A copy, laid out as it is."""
    return mark(computed(tensor).clone(), layout_of(tensor))


@outside_modes
def _finished(tensor: Tensor) -> Tensor:
    return mark(finished(tensor), layout_of(tensor))


def _alive(tensor: weakref.ref[Tensor]) -> Any:
    """The tensor, or where it is no more what nothing is the same as."""
    return object() if tensor() is None else tensor()


def _changes(now: Any, before: Any) -> Any:
    """The arguments that are other ones than before a call, in place; None for those that are not."""
    if isinstance(now, dict):
        return {name: None if is_same(value, before[name]) else value for name, value in now.items()}
    return tuple(None if is_same(value, old) else value for value, old in zip(now, before, strict=True))


@outside_modes
def _kept(tensor: Tensor) -> Tensor:
    """A cache, without more memory than its own; laid out in memory as the network's kernels want it again."""
    layout = layout_of(tensor)
    tensor = computed(tensor)
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return mark(tensor.clone() if is_part else tensor, layout)
