"""A walk through time in pieces: which frames of the output are final after which call of the network.

The VAE's own method makes frames of the network's results: it joins, crops, blends, clamps. It makes some of these
frames from the results of a few calls alone, where all others have no frames at all. Whether it does so is found out by
trying, with noise for the results of a small picture: what comes out in pieces has to be the whole, bit for bit.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import outside_modes
from halovae.base.private_torch import pytree
from halovae.base.trees import is_picture, map_tensors, pictures_in
from halovae.calls.dataflow import Spec
from halovae.calls.randomness import frozen_generators
from halovae.calls.record import NETWORKS, Function, NetworkCall, Recording, answering
from halovae.calls.state import Snapshot, unchanged
from halovae.exact.layout import layout_of, mark, plain
from halovae.kernels.fast_mode import finished
from halovae.kernels.lazy.promise import kept

LOG = logging.getLogger("halovae")
_SMALL = 8
"""Rows and columns of the picture that is tried."""

Emit = Callable[[Tensor], None]
"""Takes the next frames of the output, whole, on every rank; raises `StreamClosed` on all of them or on none."""
Record = Callable[[tuple[Any, ...], dict[str, Any]], Recording]
"""Notes the calls of a network, for these arguments of the half."""


class StreamClosed(BaseException):
    """Nobody wants the frames that are left."""


@dataclass(frozen=True)
class Piece:
    """Frames of the output that the VAE makes of the results of some calls."""

    calls: tuple[int, ...]
    """Numbers of the calls, in order."""
    after: int
    """The call after which they are final."""
    start: int
    """The first of them, among the frames that the VAE makes of these calls alone."""
    stop: int
    blank: frozenset[int]
    """Other calls that have blank frames for it, where the VAE crops; the others have none."""


@dataclass(frozen=True)
class Walk:
    """The calls of a network, and the pieces that the output comes in."""

    calls: tuple[NetworkCall, ...]
    pieces: tuple[Piece, ...]


class Splitter:
    """Finds the pieces in which a half of a VAE can give its output.

    Args:
        vae: the VAE.
        half: "encode" or "decode".
        method: the VAE's own method of that half.
        record: notes the calls of its network.
    """

    def __init__(self, vae: torch.nn.Module, half: str, method: Function, record: Record) -> None:
        self._vae, self._half, self._method, self._record = vae, half, method, record

    def walk(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Walk | None:
        """The pieces of a call with these arguments; None where there is only one."""
        try:
            calls = self._calls(args, kwargs)
            small = _small(args, kwargs)
            if len(calls) < 2 or list(map(_lengths, self._calls(*small))) != list(map(_lengths, calls)):
                return None
            device = pictures_in(small)[0].device
            with unchanged(self._vae, *small), frozen_generators(device), torch.no_grad():
                pieces = _Trial(self, self._calls(*small), *small, device).pieces()
        except Exception as error:  # Whatever a model's code raises on frames that are not there.
            LOG.debug("%s gives its output in one piece: %s", self._half, error)
            return None
        return Walk(calls, pieces) if len(pieces) > 1 else None

    def _calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[NetworkCall, ...]:
        """None of them where they are not those of a walk through time."""
        recording = self._record(args, kwargs)
        calls, result = recording.calls, pictures_in(recording.result)
        if recording.keeps or recording.writes or len(result) != 1 or result[0].ndim != 5:
            return ()
        are_videos = all(_is_video(spec) for call in calls for spec in call.specs)
        return calls if are_videos and len({_but_time(call) for call in calls}) == 1 else ()

    def make(self, answers: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the VAE makes of results of its network: `answers(number)` gives that of each call."""
        numbers = itertools.count()
        with answering(self._vae, self._half, lambda *_, **__: answers(next(numbers))):
            return pictures_in(self._method(*args, **kwargs))[0]


def _is_video(spec: Spec) -> bool:
    return len(spec.shape) == 5 and spec.dtype.is_floating_point


def _lengths(call: NetworkCall) -> list[int]:
    """Frames of the results."""
    return [spec.shape[2] for spec in call.specs]


def _but_time(call: NetworkCall) -> tuple[Any, ...]:
    return call.used, *((*spec.shape[:2], *spec.shape[3:], spec.dtype) for spec in call.specs)


def _small(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with a corner of the first picture, and of those that have its size; zeros."""
    size = pictures_in((args, kwargs))[0].shape[-2:]

    def cut(tensor: Tensor) -> Tensor:
        if is_picture(tensor) and tensor.shape[-2:] == size:
            tensor = tensor[..., :_SMALL, :_SMALL]
        return torch.zeros_like(tensor)

    return map_tensors(cut, (args, kwargs))


class _Trial:
    """The VAE's own method on a small picture, with noise for what its network gives."""

    def __init__(
        self, splitter: Splitter, calls: Sequence[NetworkCall], args: Any, kwargs: Any, device: torch.device
    ) -> None:  # fmt: skip
        self._splitter, self._calls, self._given, self._device = splitter, calls, (args, kwargs), device
        self._noise = [[torch.rand(s.shape, device=device).to(s.dtype) - 0.5 for s in call.specs] for call in calls]

    def pieces(self) -> tuple[Piece, ...]:
        """Nothing where frames can't be made apart."""
        count = len(self._calls)
        whole = self._make(lambda call, noise: noise.clone())
        self._make(lambda call, noise: noise[:, :, :0])  # The walk itself goes on with no frames.
        read = [self._frames_of(number, whole) for number in range(count)]
        found: list[Piece] = []
        after = [max((n for n in range(count) if t in read[n]), default=0) for t in range(whole.shape[2])]
        final = list(itertools.accumulate(after, max))
        at = 0
        for last, group in itertools.groupby(final):
            length = len(list(group))
            needs = tuple(n for n in range(count) if not read[n].isdisjoint(range(at, at + length)))
            wanted = whole[:, :, at : at + length]
            piece = self._piece(needs, last, wanted, ()) or self._piece(needs, last, wanted, (0,))
            if piece is None:
                return ()
            found.append(piece)
            at += length
        return tuple(found)

    def _piece(self, needs: tuple[int, ...], last: int, wanted: Tensor, blank: tuple[int, ...]) -> Piece | None:
        """Frames as the VAE makes them of these calls alone; None where they are not among what it makes."""
        empty = frozenset(blank).difference(needs)

        def result(call: int, noise: Tensor) -> Tensor:
            return noise.clone() if call in needs else torch.zeros_like(noise[:, :, : noise.shape[2] * (call in empty)])

        part, length = self._make(result), wanted.shape[2]
        places = range(part.shape[2] - length, -1, -1)
        start = next((s for s in places if torch.equal(part[:, :, s : s + length], wanted)), None)
        return None if start is None else Piece(needs, last, start, start + length, empty)

    def _frames_of(self, call: int, whole: Tensor) -> set[int]:
        """Frames of the output in which the result of a call has a part."""
        marked = self._make(lambda number, noise: noise * float("nan") if number == call else noise.clone())
        if marked.shape != whole.shape:
            raise NotExactError("its shape depends on values")
        return set(marked.isnan().transpose(0, 2).flatten(1).any(1).nonzero().flatten().tolist())

    def _make(self, tensor: Callable[[int, Tensor], Tensor]) -> Tensor:
        def answer(number: int) -> Any:
            used = [tensor(number, noise) for noise in self._noise[number]]
            return self._calls[number].result(used, device=self._device)

        return self._splitter.make(answer, *self._given)


class Walker:
    """Runs a half whose output leaves in pieces, while the VAE's own method walks through time.

    The network's results are kept as long as a later piece needs them; the VAE gets results without frames for them.

    Args:
        splitter: of that half.
        walk: its pieces.
        vae: the VAE.
        half: "encode" or "decode".
        emit: takes the frames of each piece, in order, as the VAE makes them (on shards, where these are run).
    """

    def __init__(self, splitter: Splitter, walk: Walk, vae: torch.nn.Module, half: str, emit: Emit) -> None:
        self._splitter, self._walk, self._emit = splitter, walk, emit
        self._vae, self._half = vae, half

    def __call__(self, method: Function, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, without a frame."""
        network = getattr(self._vae, NETWORKS[self._half])
        self._given, self._network = (args, kwargs), network
        self._results: dict[int, list[Tensor]] = {}
        self._next, self._left = 0, list(self._walk.pieces)
        with answering(self._vae, self._half, self._answer):
            result = method(*args, **kwargs)
        if self._left or self._next != len(self._walk.calls):
            raise NotExactError(
                f"the VAE called its network {self._next} times, not {len(self._walk.calls)} as planned"
            )
        return result

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if self._next >= len(self._walk.calls):
            raise NotExactError(f"the VAE called its network more often than {self._next} times, as planned")
        number, call = self._next, self._walk.calls[self._next]
        self._next += 1
        real = self._network(*args, **kwargs)
        leaves = pytree.tree_leaves(real)
        used = [leaves[place] for place in call.used]
        if [tensor.shape[2] for tensor in used] != _lengths(call):
            raise NotExactError(f"call {number} of the network gave other frames than planned")
        self._results[number] = used
        without = [blank(tensor, 0) for tensor in used]
        answer = call.result(without, real)
        del real, leaves, used
        while self._left and self._left[0].after <= number and self._are_there(self._left[0].calls):
            self._emit(self._frames(self._left[0]))
            del self._left[0]
        return answer

    def _are_there(self, calls: Sequence[int]) -> bool:
        """Whether these results are more than promises."""
        return all(kept(tensor) is not None for number in calls for tensor in self._results[number])

    def _frames(self, piece: Piece) -> Tensor:
        """What the VAE makes of the results of a piece; those that no later one needs are given up."""
        left, results = self._left[1:], self._results
        later = {number for other in left for number in other.calls}
        results.update({number: list(map(_finished, results[number])) for number in piece.calls})
        # The VAE may write into what it gets.
        parts = {n: [copy(t) if n in later else t for t in results[n]] for n in piece.calls}
        like = results[piece.calls[0]]
        device = like[0].device

        def answer(number: int) -> Any:
            frames = _lengths(self._walk.calls[number]) if number in piece.blank else [0] * len(like)
            used = parts[number] if number in parts else list(map(blank, like, frames))
            return self._walk.calls[number].result(used, device=device)

        before = Snapshot(self._vae, *self._given, values=False)  # Its caches go on after this.
        try:
            with frozen_generators(device):
                frames = _finished(self._splitter.make(answer, *self._given)[:, :, piece.start : piece.stop])
        finally:
            before.restore()
        self._results = {n: tensors for n, tensors in results.items() if n in later or n > piece.after}
        return frames


@outside_modes
def blank(like: Tensor, frames: int) -> Tensor:
    """As many blank frames, laid out as those of another tensor."""
    layout, shape = layout_of(like), (*like.shape[:2], frames, *like.shape[3:])
    return mark(torch.zeros(shape, dtype=like.dtype, device=like.device), layout and layout.replace(2, plain(frames)))


@outside_modes
def copy(tensor: Tensor) -> Tensor:
    """A copy, laid out as it is."""
    layout = layout_of(tensor)
    return mark(finished(tensor).clone(), layout)


@outside_modes
def _finished(tensor: Tensor) -> Tensor:
    layout = layout_of(tensor)
    return mark(finished(tensor), layout)
