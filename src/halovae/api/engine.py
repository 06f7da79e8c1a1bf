"""What runs a half on a group, whichever way: the engine that a handle asks, and what engines have in common."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from halovae.base import timeline
from halovae.base.options import CallReport
from halovae.base.trees import pictures_in
from halovae.calls.resumed import Held
from halovae.calls.target import Target
from halovae.calls.time_stages import Part, Stage, TimeStages
from halovae.exact.run import first_tensor

LOG = logging.getLogger("halovae")

Given = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
"""Makes the arguments of a call."""
Emit = Callable[[Tensor], None]
"""Takes the next frames of the output, whole, on every rank; raises `StreamClosed` on all of them or on none."""


class StreamClosed(BaseException):
    """Nobody wants the frames that are left."""


@dataclass(frozen=True)
class Ran:
    """A result, and what the engine has to report of it."""

    result: Any
    report: CallReport
    """But for what only the whole call tells: its time, messages and memory."""
    recorded: int = 0
    """Bytes of a recording that was replayed: the device does not count them as in use."""


class Engine(Protocol):
    """Runs one half; called on every rank of the group with the same arguments."""

    def run(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], emit: Emit | None = None
    ) -> Ran:  # fmt: skip
        """The half; where there is an `emit`, that gets the frames of the output, and nothing is returned of them."""
        ...

    def stages(self, half: str, frame: Tensor, kwargs: dict[str, Any]) -> TimeStages:
        """The steps of a clip that comes in parts, of which this is a frame. No exchange.

        Raises:
            NotExactError: it has to be there at once.
        """
        ...

    def run_stage(
        self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], stages: TimeStages, stage: Stage, held: Held
    ) -> tuple[Ran, Held]:
        """One of them: the new frames, and what is kept for the next one."""
        ...

    def retreat(self, half: str, given: Given, error: BaseException, is_out: bool = False) -> bool:
        """After a call has failed on all ranks: whether all are to make it again, in another way.

        Args:
            half: of the call.
            given: makes the arguments that `run` got. That takes memory.
            error: what this rank failed by.
            is_out: whether this rank has handed out a piece of the output already.
        """
        return False

    def settled(self) -> int:
        """How many things this rank remembers that all ranks have settled together."""
        ...

    def forget(self) -> None:
        """Settle them anew in the next call."""
        ...

    def free(self) -> None:
        """Give back the memory that is kept between calls."""
        return


def note_phases(network_seconds: float, gather_seconds: float) -> None:
    """Keep the two phases that have just ended in the timeline."""
    ended = time.perf_counter()
    timeline.note("network", ended - gather_seconds - network_seconds, ended - gather_seconds)
    timeline.note("gather", ended - gather_seconds, ended)


def clip_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with the clip as the first one also where it is given by name."""
    if args:
        return args, kwargs
    clip = pictures_in(kwargs)[0]
    return (clip,), {name: value for name, value in kwargs.items() if value is not clip}


Stages = TypeVar("Stages", bound=TimeStages)


def found_parts(
    target: Target, half: str, args: tuple[Any, ...], picture: Tensor,
    find: Callable[[], tuple[Stages, tuple[Part, ...]]],
) -> tuple[Stages, tuple[Part, ...]] | None:  # fmt: skip
    """The stages and parts of a clip that leaves in pieces; None where it leaves in one."""
    if args[0] is not picture:
        return None
    try:
        stages, parts = find()
    except Exception as error:  # Whatever a model's code raises on frames that are not there.
        LOG.debug("%s of %s gives its output in one piece: %s", half, target.name, error)
        return None
    return (stages, parts) if sum(stage.length > 0 for _, stage, _ in parts) > 1 else None


def emit_whole(emit: Emit, result: Any) -> None:
    with suppress(StreamClosed):
        emit(first_tensor(result))
