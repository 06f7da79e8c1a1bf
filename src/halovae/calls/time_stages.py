"""A clip that comes in parts: which calls of the network each part makes, and what goes on from one to the next.

The VAE's own method takes a whole clip. For each part it gets a short clip that ends with the part. What comes before
is blank, and the network's calls for it, which were made earlier, are answered without the network: the last of a row
of them by the caches that it has left then. So crop, blend and clamp stay the VAE's own code, and the network makes the
very calls that it makes for the whole clip.

Which calls these are is found out by trying clips of all lengths, small ones, with noise for the network's results. A
call is the same in two clips where it gets the same, bit for bit; a frame of the output is final where it is the same
in all longer clips. Once two stages are alike, so are all that follow, and a short clip stands for any longer one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.errors import InputError, NotExactError
from halovae.base.files import first_line
from halovae.base.trees import map_tensors, pictures_in, tensors_in
from halovae.calls.dataflow import Spec
from halovae.calls.merge_steps import Most, Steps, row_of, sizes
from halovae.calls.module_facts import ModuleFacts
from halovae.calls.randomness import frozen_generators
from halovae.calls.record import NETWORKS, Function, NetworkCall, Recording, answering
from halovae.calls.state import ModuleState, unchanged
from halovae.kernels.fast_mode import FastMode, finished

LOG = logging.getLogger("halovae")

_LONGEST = 160
"""Frames of the longest clip that is tried."""
_SHORT = 40
"""Frames of a clip that stands for itself, and half of those that may stand for a longer one."""
_STEP = 33
"""Frames of the longest step that is looked for."""
_MANY = 65
"""Frames of a clip for which a VAE that has steps in time makes several."""
_BEYOND = 9
"""A call is the same in all longer clips where it is the same in those that are up to so many frames longer."""


@dataclass(frozen=True)
class Stage:
    """A part of a clip: how the VAE's method is run for it. Frames and results of calls are in the order of time."""

    frames: int
    """Of the clip that the method gets."""
    fresh: int
    """The last ones of these, which have to be the real ones."""
    calls: tuple[NetworkCall, ...]
    """All that the method makes for this clip."""
    run: tuple[int, ...]
    """Those that the network answers."""
    takes: tuple[tuple[int, int], ...]
    """Those that leave caches for these, each with its place in `gives` of the stage before."""
    holds: tuple[tuple[int, int], ...]
    """Those whose results are needed again, each with its place in `run` of the stage before."""
    gives: tuple[int, ...]
    """Those after which the caches are kept."""
    blank: bool
    """Whether results that are not there are blank frames; else they have no frames at all."""
    back: int
    """The new frames of the output: how many frames before its end they begin."""
    length: int
    """How many there are."""
    keeps: int
    """How many of the last frames later stages may need again."""
    result: Any = None
    """What the method returns for this clip, on the meta device."""

    def is_like(self, other: Stage) -> bool:
        """Whether it does the same after the same."""
        return self._all() == other._all()

    def steps(self, most: Most) -> Steps:
        """How many of its calls go in each call of the network."""
        if len(self.run) < 2:
            return ()
        first, last = self.run[0], self.run[-1]
        return sizes(self.calls[: last + 1], most, first) if last - first == len(self.run) - 1 else ()

    def _all(self) -> tuple[Any, ...]:
        places = [place for _, place in self.takes], [place for _, place in self.holds]
        kinds = [self.calls[number].kind for number in self.run]
        held = [self.calls[number].specs for number, _ in self.holds]
        return self.fresh, *places, kinds, held, len(self.gives), self.blank, self.back, self.length


@dataclass(frozen=True, eq=False)
class Position:
    """Where a clip has got to: some stage has been run, and no more."""

    frames: int = 0
    """Of the short clip that stands for all so far."""
    stage: Stage | None = None
    done: frozenset[Any] = frozenset()
    gives: tuple[Any, ...] = ()
    ran: tuple[Any, ...] = ()
    output: Tensor | None = None
    """What the trial's frames are that are out."""


@dataclass
class _Trial:
    """A small clip that was tried: the calls, what tells each from others, and the output."""

    calls: tuple[NetworkCall, ...]
    names: tuple[Any, ...]
    output: Tensor


Record = Callable[[tuple[Any, ...], dict[str, Any]], Recording]
"""Notes the calls of a network, for these arguments of the half."""
Part = tuple[int, Stage, Position]
"""Of a clip: how many new frames it takes, how it is run, and where the clip is then."""


def one_step(step: NetworkCall) -> int:
    """As many as go in one call where none are joined."""
    return 1


class TimeStages:
    """Finds the stages of one half of a VAE, for clips of one size.

    Args:
        vae: the VAE.
        half: "encode" or "decode".
        method: the VAE's own method of that half.
        record: notes the calls of its network.
        clip: one frame of the clip, of full size; of these only the shape counts.
        small: the same of a small picture.
        more: what the half gets after the clip.
        kwargs: of the half.

    Attributes:
        most: how many steps of a row are one part, and go in one call of the network.
        facts: what is known of the VAE's modules.
        rest: what the modules of its network keep between calls.
    """

    def __init__(
        self, vae: nn.Module, half: str, method: Function, record: Record, clip: Tensor, small: Tensor,
        more: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        self._vae, self._half, self._method, self._record = vae, half, method, record
        self._clip, self._small, self._more, self._kwargs = clip, small, more, kwargs
        self.facts = ModuleFacts(vae)
        self._trials: dict[int, _Trial | None] = {}
        self._failures: dict[int, Exception] = {}
        """Why there is no trial."""
        self._known: dict[Any, tuple[Stage, Position]] = {}
        self._next: dict[Any, Part | None] = {}
        self._rows: dict[Any, Part] = {}
        self._places: list[Position] = []
        self._least = 0
        """Real frames that a step needs, as far as it is known."""
        self.start, self.most = Position(), one_step
        self.rest = ModuleState(getattr(vae, NETWORKS[half]))

    # ---- what comes next -------------------------------------------------------------------------------------------

    def part(self, place: Position, frames: int, total: int | None) -> tuple[Stage, Position] | None:
        """The next stage of a clip that goes on, as soon as it can be run; None: not with so many frames.

        Args:
            place: where the clip is.
            frames: how many new frames there are.
            total: frames of the whole clip, where that is known.
        """
        key = place, frames, total
        if key not in self._known:
            lengths = self._lengths(place.frames + frames) if total is None else [total]
            ends = [trial for trial in map(self._trial, lengths) if trial]
            here = self._trial(place.frames + frames)
            if not ends or here is None:
                return None
            ready = frozenset(here.names).intersection(*(end.names for end in ends))
            if not ready - place.done:
                return None
            self._known[key] = self._after(place, frames, ready, _common(here.output, [end.output for end in ends]))
        return self._known[key]

    def rest_of(self, place: Position, frames: int) -> tuple[Stage, Position]:
        """The last stage, after which all is out: of a clip that ends with these frames, or stops there for a while.

        Raises:
            InputError: what has been made so far is not the beginning of a clip of this length.
        """
        key = place, frames, -1
        if key not in self._known:
            trial = self._trial(place.frames + frames)
            if trial is None:
                why = self._failures.get(place.frames + frames)
                words = f": {first_line(why)}" if why else ""
                raise InputError(f"{self._half} does not take {place.frames + frames} frames{words}") from why
            self._known[key] = self._after(place, frames, frozenset(trial.names), trial.output.shape[2])
        return self._known[key]

    def next_part(self, place: Position, total: int | None) -> Part | None:
        """The next part of a clip that is long enough for it; None where no clip goes on so.

        Args:
            place: where the clip is.
            total: frames of the whole clip, where that is known.
        """
        step = self.step(place, total)
        if step is None or len(step[1].run) != 1 or self.blends:
            return step
        most = self.most(step[1].calls[step[1].run[0]])
        key = place, total, most
        if key not in self._rows:
            self._rows[key] = self._row(place, step, total, most)
        return self._rows[key]

    def step(self, place: Position, total: int | None) -> Part | None:
        """As `next_part`, of one step."""
        key = place, total
        if key not in self._next:
            longest = min(_STEP, (_LONGEST if total is None else total) - place.frames)
            steps = ((n, *found) for n in range(1, longest + 1) if (found := self.part(place, n, total)))
            self._next[key] = next(steps, None)
        return self._next[key]

    def _row(self, place: Position, first: Part, total: int | None, most: int) -> Part:
        """A step, and those that follow it and go in one call with it."""
        frames, length, count = 0, 0, 0
        step, last = first, first
        while step and step[1].is_like(first[1]) and count < most:
            frames, length, count, last = frames + step[0], length + step[1].length, count + 1, step
            step = self.step(step[2], total)
        trial = self._trial(place.frames + frames) if count > 1 else None
        if trial is None or place.output is None or not place.done <= set(trial.names):
            return first
        numbers = [number for number, name in enumerate(trial.names) if name not in place.done][:count]
        if row_of(trial.calls, numbers[0]) < count:
            return first
        out, names = place.output.shape[2], frozenset(trial.names[number] for number in numbers)
        try:
            stage = self._stage(place, trial, frames, names, out, out + length)
        except NotExactError as error:
            LOG.debug("%s goes on step by step: %s", self._half, error)
            return first
        return frames, replace(stage, keeps=last[1].keeps), last[2]

    def short(self, total: int | None) -> int | None:
        """A length of the clip that stands for `total`, and can be tried.

        Raises:
            NotExactError: there is none.
        """
        if total is None or total <= _SHORT:
            return total
        steps, found = self._steps(total), None
        for lengths in (range(_SHORT // 2, _SHORT), range(2 * _SHORT, _SHORT - 1, -1)):
            alike = (frames for frames in lengths if self._trial(frames) and self._steps(frames) == steps)
            found = next(alike, found)
            if found and self._comes_again(found):
                break
        if found is None:
            raise NotExactError("its steps in time are others for each length")
        return found

    def _comes_again(self, total: int) -> bool:
        """Whether a clip of this length is at some time where it has been before, as a longer one is, too."""
        place, seen = self.start, set[Position]()
        while place not in seen:
            seen.add(place)
            part = self.next_part(place, total)
            if part is None:
                return False
            place = part[2]
        return True

    def _steps(self, frames: int) -> list[Any]:
        """The kinds of calls of a clip, each once where it comes again at once."""
        return [kind for kind, _ in itertools.groupby(call.kind for call in self._calls(frames))]

    def _calls(self, frames: int) -> tuple[NetworkCall, ...]:
        return self._recorded(self._small.expand(-1, -1, frames, -1, -1)).calls

    def _recorded(self, clip: Tensor) -> Recording:
        return self._record((clip, *self._more), self._kwargs)

    def check(self, total: int | None) -> None:
        """Check that a clip of any length, or of this one, can come in parts.

        Raises:
            NotExactError: it can't.
        """
        few = self._trial(_BEYOND) if total is None else None  # It is needed below, and tells what a long clip would.
        many = total or _MANY
        if not (few and _has_steps(few.calls, _BEYOND)) and not _has_steps(self._calls(many), many):
            raise NotExactError("it makes all frames at once")
        place, seen = self.start, set[Position]()
        while place not in seen and (total is None or place.frames < total):
            seen.add(place)
            found = self.next_part(place, total)
            if found is None:
                if total is None:
                    raise NotExactError("its first steps depend on the number of all frames")
                break
            place = found[2]
        if len(seen) < 2 and place not in seen:
            raise NotExactError("it makes all frames at once")

    def whole(self, total: int) -> tuple[Part, ...]:
        """All parts of a clip that is there from the beginning.

        Raises:
            NotExactError: it can't come in parts.
        """
        short, left, place = self.short(total), total, self.start
        self.check(short)
        parts: list[Part] = []
        while (part := self.next_part(place, short)) and part[0] <= left:
            parts.append(part)
            left, place = left - part[0], part[2]
        parts.append((left, *self.rest_of(place, left)))
        return tuple(part for part in parts if part[1].run or part[1].length)

    @property
    def long_clip(self) -> Tensor:
        """Of full size, with several steps in time; of these only the shape counts."""
        return self._clip.expand(-1, -1, _STEP, -1, -1)

    @property
    def blends(self) -> bool:
        """Whether frames are made of results of several stages, as far as it is known."""
        return any(place.stage and place.stage.holds for place in self._places)

    def _lengths(self, frames: int) -> Sequence[int]:
        """Of the longer clips that tell what is final after so many frames."""
        return range(frames, frames + _BEYOND + 1)

    def _after(self, place: Position, frames: int, ready: frozenset[Any], final: int) -> tuple[Stage, Position]:
        trial = self._trial(place.frames + frames)
        assert trial is not None
        out = 0 if place.output is None else place.output.shape[2]
        began = place.output is None or torch.equal(place.output, trial.output[:, :, :out])
        if not (began and place.done <= set(trial.names)):
            raise InputError(
                f"{self._half} of {type(self._vae).__name__} can't go on with {frames} frames after {place.frames}: "
                "its steps in time would be others in one call"
            )
        stage = self._stage(place, trial, frames, ready, out, final)
        if not stage.run:  # Frames that the VAE leaves out at the end of a clip: others may follow them.
            return stage, replace(place, frames=stage.frames, stage=stage)
        for known in self._places:
            if known.stage and known.stage.is_like(stage) and known.stage.frames <= stage.frames:
                return known.stage, known
        gives, ran = (tuple(trial.names[number] for number in numbers) for numbers in (stage.gives, stage.run))
        new = Position(stage.frames, stage, place.done | set(ran), gives, ran, trial.output[:, :, :final])
        self._places.append(new)
        return stage, new

    def _stage(
        self, place: Position, trial: _Trial, frames: int, ready: frozenset[Any], out: int, final: int
    ) -> Stage:  # fmt: skip
        calls, names = trial.calls, trial.names
        run = tuple(n for n, name in enumerate(names) if name in ready and name not in place.done)
        before = {number: max(calls[number].needs) for number in run if calls[number].needs}
        taken = sorted({number for number in before.values() if number not in run})
        if not {names[number] for number in taken} <= set(place.gives):
            raise NotExactError("a step needs what is kept no more")
        takes = tuple((number, place.gives.index(names[number])) for number in taken)
        gives = tuple(number for number in run if number not in before.values())
        held = tuple((names.index(name), place.ran.index(name)) for name in place.ran)
        total = place.frames + frames
        if not run and final == out:
            return Stage(total, 0, (), (), (), (), (), False, 0, 0, 0)
        least = min(max(frames, self._least), total)
        fresh = next(f for f in range(least, total + 1) if self._gets_the_same(trial, run, total, f))
        wanted = trial.output[:, :, out:final]
        for blank, holds in itertools.product((False, True), ((), held)):
            stage = Stage(total, fresh, calls, run, takes, holds, gives, blank, 0, final - out, fresh)
            if (back := self._place_of(wanted, stage, trial)) is not None:
                full = self._full(stage)
                return replace(stage, calls=full.calls, result=full.result, back=back)
        raise NotExactError("its frames can't be made apart")

    def _gets_the_same(self, trial: _Trial, run: Sequence[int], frames: int, fresh: int) -> bool:
        """Whether calls need no more than the last real frames."""
        if fresh == frames:
            return True

        def used(number: int, name: Any) -> Any:
            if number in run and name[:2] != trial.names[number][:2]:
                raise NotExactError("it gets something else")
            return _noise(trial.calls[number], trial.names[number])

        try:
            self._make(trial.calls, frames, used, fresh)
        except Exception:  # Whatever a model's code raises on blank frames.
            return False
        return True

    def _place_of(self, wanted: Tensor, stage: Stage, trial: _Trial) -> int | None:
        """How many frames before the end of what the stage gives the wanted frames begin; None where they are not."""
        there = {*stage.run, *(number for number, _ in stage.holds)}

        def used(number: int, name: Any) -> Any:
            return _noise(trial.calls[number], trial.names[number]) if number in there else None

        try:
            _, part = self._make(trial.calls, stage.frames, used, stage.fresh, stage.blank)
        except Exception:  # Whatever a model's code raises on frames that are not there.
            return None
        length = wanted.shape[2]
        places = range(part.shape[2] - length, -1, -1)
        start = next((s for s in places if torch.equal(part[:, :, s : s + length], wanted)), None)
        return None if start is None else part.shape[2] - start

    def _full(self, stage: Stage) -> Recording:
        """The stage at full size.

        Raises:
            NotExactError: they are others.
        """
        clip = self._clip.expand(-1, -1, stage.frames, -1, -1)
        full = self._recorded(clip)
        if list(map(in_time, full.calls)) != list(map(in_time, stage.calls)):
            raise NotExactError("a large picture takes other steps in time than a small one")
        return full

    # ---- trying ----------------------------------------------------------------------------------------------------

    def _trial(self, frames: int) -> _Trial | None:
        """None where the VAE takes no clip of so many frames."""
        if frames not in self._trials:
            try:
                self._trials[frames] = self._tried(frames) if 0 < frames <= _LONGEST else None
            except Exception as error:
                LOG.debug("%s takes no clip of %d frames: %s", self._half, frames, error)
                self._trials[frames], self._failures[frames] = None, error.with_traceback(None)
        return self._trials[frames]

    def _tried(self, frames: int) -> _Trial:
        recording = self._recorded(self._noise_clip(frames))
        calls, result = recording.calls, pictures_in(recording.result)
        if recording.keeps or recording.writes or not result or any(call.draws for call in calls):
            raise NotExactError("it is not made of calls of its network alone")
        if not all(len(spec.shape) == 5 for call in calls for spec in call.specs):
            raise NotExactError("its network gives no video")
        names, output = self._make(calls, frames, lambda number, name: _noise(calls[number], name), frames)
        return _Trial(calls, names, output)

    def _noise_clip(self, frames: int, fresh: int | None = None) -> Tensor:
        noise = self._long_noise[:, :, :frames].clone()
        noise[:, :, : frames - (frames if fresh is None else fresh)] = 0
        return noise.to(self._small.device, self._small.dtype)

    @functools.cached_property
    def _long_noise(self) -> Tensor:
        shape = *self._small.shape[:2], _LONGEST, *self._small.shape[3:]
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def _make(
        self, calls: Sequence[NetworkCall], frames: int, used: Callable[[int, Any], Any], fresh: int,
        blank: bool = False,
    ) -> tuple[tuple[Any, ...], Tensor]:  # fmt: skip
        """What tells the calls from each other, and the output; `used(number, name)` gives the results of a call, or
        None for one that is not there."""
        clip, names = self._noise_clip(frames, fresh), list[Any]()
        device = clip.device

        def answer(*args: Any, **kwargs: Any) -> Any:
            number = len(names)
            if number >= len(calls):
                raise NotExactError("it calls its network more often than on shapes")
            call = calls[number]
            seen = call.kind, _digest(tensors_in((args, kwargs)))
            names.append((*seen, sum(name[:2] == seen for name in names)))
            results = used(number, names[-1])
            if results is None:
                results = [absent(spec, spec.shape[2] if blank else 0, device) for spec in call.specs]
            return call.result([tensor.to(device) for tensor in results], device=device)

        more, kwargs = map_tensors(torch.clone, (self._more, self._kwargs))
        quietly = unchanged(self.facts, more, kwargs), frozen_generators(device), torch.no_grad()
        with quietly[0], quietly[1], quietly[2], answering(self._vae, self._half, answer), FastMode():
            output = finished(pictures_in(self._method(clip, *more, **kwargs))[0])
        if output.ndim != 5 or len(names) != len(calls):
            raise NotExactError("its output is no video")
        return tuple(names), output


def _common(output: Tensor, others: Iterable[Tensor]) -> int:
    """With how many equal frames all of them begin."""
    length = output.shape[2]
    for other in others:
        length = min(length, other.shape[2])
        differs = (output[:, :, :length] != other[:, :, :length]).transpose(0, 2).flatten(1).any(1).nonzero()
        length = int(differs[0]) if len(differs) else length
    return length


def _has_steps(calls: Sequence[NetworkCall], frames: int) -> bool:
    """Whether some call does not get all frames."""
    return len(calls) > 1 and any(call.inputs[0].shape[2] < frames for call in calls)


def in_time(call: NetworkCall) -> tuple[Any, ...]:
    """What calls for pictures of different sizes have in common."""
    return call.used, call.needs, *(spec.shape[2] for spec in call.specs)


def _digest(tensors: Iterable[Tensor]) -> str:
    """Of all bits."""
    words = hashlib.sha256()
    for tensor in tensors:
        bits = tensor.detach().cpu().contiguous().flatten()
        words.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        words.update(bits.view(torch.uint8).numpy().tobytes())
    return words.hexdigest()


def _noise(call: NetworkCall, name: Any) -> list[Tensor]:
    """Results of a call: equal ones for an equal name."""
    seed = int(hashlib.sha256(repr(name).encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(spec.shape, generator=generator) - 0.5).to(spec.dtype) for spec in call.specs]


def absent(spec: Spec, frames: int, device: torch.device) -> Tensor:
    """A result that is not there. The VAE may write into it."""
    return torch.zeros((*spec.shape[:2], frames, *spec.shape[3:]), dtype=spec.dtype, device=device)
