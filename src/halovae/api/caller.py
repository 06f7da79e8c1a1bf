"""The calls of one VAE, as all ranks make them: agreed on, reported, and undone where they fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halovae.api.advice import explained
from halovae.api.auto import make_engine
from halovae.api.engine import Emit, Engine, Ran
from halovae.base import timeline
from halovae.base.compiled import as_written, is_compiled
from halovae.base.errors import InputError
from halovae.base.memory import PeakMemory
from halovae.base.options import AllOptions, CallReport, Mode
from halovae.base.trees import pictures_in, tensors_in
from halovae.calls.dtypes import HalfDtypes
from halovae.calls.randomness import rewound_by_failure
from halovae.calls.state import undone_by_failure
from halovae.calls.target import Target, in_words
from halovae.comm import Comm, Forgone, Start, Traffic
from halovae.comm.agreement import Glance, Tally, one_call, together
from halovae.kernels import autocast
from halovae.kernels.kept import Kept
from halovae.tiles.tile_settings import described

LOG = logging.getLogger("halovae")


def current_mode(options: AllOptions, target: Target) -> Mode:
    """The mode of a call that is made now. A VAE that comes tiled is followed where that is switched off and on.

    Raises:
        InputError: exact mode would give another result than the VAE itself, and nobody has asked for that.
    """
    if options.untiled or not target.comes_tiled:
        return options.mode or "exact"
    if options.mode == "exact":
        target.check_exact("mode='exact'", "give untiled=True for the un-tiled one")
    return options.mode or "tile"


class Caller:
    """Makes the calls of a VAE; of a handle, which says when.

    Attributes:
        last: what the last call did on this rank, or None before the first.
    """

    def __init__(self, target: Target, comm: Comm, options: AllOptions, dtypes: HalfDtypes) -> None:
        self.last: CallReport | None = None
        self._target, self._comm, self._options, self._dtypes = target, comm, options, dtypes
        self._mode = current_mode(options, target)
        self._engine = self._make_engine()
        self._solo: Engine | None = None
        """Runs this rank's own input on this rank."""
        self._whole: Engine | None = None
        """Runs one rank's input on all ranks, for that rank."""
        self._kept = Kept()
        self._calls = 0
        self._warned = self._said_compiled = False

    def _attempt(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float, emit: Emit | None = None,
        pieces: Sequence[float] = (), start: Start | None = None,
    ) -> Any:  # fmt: skip
        begun = time.perf_counter()
        with self._one_call(half, args, kwargs, start):
            args, kwargs = self._dtypes.given(half, args, kwargs)
            picture = self._agree_on_call(half, args, kwargs, how=", in pieces" if emit else "")
            with torch.no_grad(), self._reported(half, picture.device, started, begun, pieces) as report:
                with self._explained(half, args, kwargs):
                    ran = self._engine.run(half, picture, args, kwargs, emit)
                return report(ran)

    @contextmanager
    def _explained(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Within it, a failure is told as what is wrong with the call, where that is so."""
        try:
            yield
        except Exception as error:
            told = explained(error, self._target, half, self._options.size or self._comm.size, args, kwargs)
            if told is error:
                raise
            raise told from error

    @contextmanager
    def _one_call(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], start: Start | None = None
    ) -> Iterator[None]:
        """What every call is in: it ends alike on all ranks, and leaves no trace where it fails. `start` is the
        stream that begins with it."""
        device = next((picture.device for picture in pictures_in((args, kwargs))), torch.device("cpu"))
        undone = rewound_by_failure(device, *args, *kwargs.values())
        eagerly, ours = self._eagerly(half), self._kept.in_use()
        undone_too, calls = undone_by_failure(self._target.facts, args, kwargs), self._calls
        try:
            with eagerly, ours, undone_too, undone, one_call(self._comm, start):
                self._comm.traffic = Traffic()
                yield
        except Forgone:
            self._calls = calls
            raise

    def _eagerly(self, half: str) -> AbstractContextManager[None]:
        """Within it, parts of the VAE that are compiled run as they are written; said once."""
        if not is_compiled(self._target.facts.modules(), self._target.originals[half]):
            return nullcontext()
        if not self._said_compiled:
            self._said_compiled = True
            LOG.warning(
                "%s of %s is compiled, in whole or in part: halovae runs it as it is written, by its own kernels",
                half, self._target.name,
            )  # fmt: skip
        return as_written()

    def _check(self, half: str, pictures: list[Tensor], given: Sequence[Any]) -> None:
        if not pictures:
            passed = ", ".join(map(_named, given)) or "nothing"
            raise InputError(
                f"{half} got no picture but {passed}: pass a tensor (batch, channels, [frames,] height, width)"
            )
        if 0 in pictures[0].shape:
            raise InputError(f"{half} got an empty tensor of shape {tuple(pictures[0].shape)}")
        for picture in pictures:
            if picture.is_meta or picture.layout != torch.strided:
                kind = "on the meta device" if picture.is_meta else f"in the layout {picture.layout}"
                raise InputError(f"{half} got a tensor {kind}: pass a dense one with values")
        self._target.check_no_gradients(pictures)

    @contextmanager
    def _reported(
        self, half: str, device: torch.device, started: float, begun: float, pieces: Sequence[float] = ()
    ) -> Iterator[Callable[[Ran], Any]]:
        """Around the work of a call that ranks have agreed on; yields what makes a report of it, and gives the result.

        Args:
            half: of the call.
            device: that it runs on.
            started: when the call was made.
            begun: when the attempt that goes well was.
            pieces: seconds to each piece of the output, complete at the end; none of a call that is not in pieces.
        """
        memory, agreed = PeakMemory(device), time.perf_counter()
        timeline.note("agree", begun, agreed)

        def report(ran: Ran) -> Any:
            self._warn_of_tiles(ran.report.mode)
            timeline.note(half, started)
            traffic, peak = self._comm.traffic, memory.read()
            self.last = replace(
                ran.report,
                seconds=time.perf_counter() - started,
                phases={"retreat": begun - started, "agree": agreed - begun, **ran.report.phases},
                messages=traffic.messages,
                bytes=traffic.bytes,
                wait_seconds=traffic.wait_seconds,
                peak_memory=None if peak is None else peak + ran.recorded,
                **({"pieces": len(pieces), "first_seconds": pieces[0]} if pieces else {}),
            )
            return ran.result

        yield report

    def _agree_on_call(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], alike: bool = True, how: str = "",
        check: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """Check that the call can be run on every rank, and where it has to be `alike` is the same.

        Args:
            half: of the call.
            args: of the half.
            kwargs: likewise.
            alike: whether all ranks have the same.
            how: more of what it is.
            check: what else has to be in order.

        Returns:
            The picture to cut.
        """
        self._calls += 1
        with together(self._comm) as said:
            check()
            pictures = pictures_in((args, kwargs))
            self._check(half, pictures, (*args, *kwargs.values()))
            said["autocast"] = dict(autocast.state()) or "off"
            said["call"] = f"{half} number {self._calls}{how}{'' if alike else ', of each rank its own'}"
            if alike and self._comm.size > 1:
                named = (f"{name}={_described(value)}" for name, value in sorted(kwargs.items()))
                said["arguments"] = ", ".join([*map(_described, args), *named])
                tensors = enumerate(tensors_in((args, kwargs)))
                said.update({f"the values of tensor {i}": Glance.at(tensor) for i, tensor in tensors})
            said["mode"] = self._follow()
            engines = [engine for engine in (self._engine, self._whole) if engine]
            said["what was settled"] = Tally(sum(engine.settled() for engine in engines), self._forget)
            if self._mode != "exact":
                said["tile settings"] = described(self._target.vae)
        return pictures[0]

    def _make_engine(self, comm: Comm | None = None, **changes: Any) -> Engine:
        options = replace(self._options, mode=self._mode, **changes)
        return make_engine(comm or self._comm, self._target, options)

    def _follow(self) -> Mode:
        """The mode of the call that is agreed on, which runs by the engines of that mode."""
        mode = current_mode(self._options, self._target)
        if mode != self._mode:
            self._free()
            self._mode, self._solo, self._whole = mode, None, None
            self._engine = self._make_engine()
        return mode

    def _forget(self) -> None:
        for engine in (self._engine, self._whole):
            if engine:
                engine.forget()

    def _free(self) -> None:
        for engine in (self._engine, self._solo, self._whole):
            if engine:
                engine.free()

    def _warn_of_tiles(self, mode: str) -> None:
        """Once, and on the first rank: a VAE that is set to tile does not."""
        target, is_known = self._target, self._warned or self._options.untiled
        if is_known or mode != "exact" or self._comm.rank > 0 or not getattr(target.vae, "use_tiling", False):
            return
        self._warned = True
        why = "comes tiled, and its tiles are its own result" if target.comes_tiled else "has tiling switched on"
        LOG.warning(
            "%s %s, but exact mode gives the un-tiled result, which differs: parallelize(vae, mode='tile') gives that "
            "of its tiles, and after disable_tiling() the VAE itself gives the un-tiled one",
            target.name,
            why,
        )


def _named(value: Any) -> str:
    """What was passed, as a user calls it."""
    if value is None:
        return "None"
    shape = f" of shape {tuple(value.shape)}" if isinstance(getattr(value, "shape", None), tuple) else ""
    return f"a value of type {type(value).__name__}{shape}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device.type}"
    inside = tensors_in(value)
    return f"{in_words(value)} of {', '.join(map(_described, inside))}" if inside else in_words(value)
