"""One rank of a server: the pipeline is loaded once, then tasks come, one after another, until the front has gone.

The first rank gets them over its wire and hands each to the others. Where ranks are on other machines, which have no
files of the front, what the client has sent comes with it.
"""

from __future__ import annotations

import gc
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halovae.app import launch
from halovae.app.generation import found, loaded
from halovae.app.job import Job
from halovae.app.session import Session
from halovae.base.errors import HalovaeError
from halovae.media.vae_limits import limits_of
from halovae.pipelines.grid_sizes import grid_of
from halovae.pipelines.runner import Runner
from halovae.serve.messages import Message, Wire
from halovae.serve.store import DECODE, ENCODE, VIDEO
from halovae.serve.votes import Outcome, Votes
from halovae.serve.work import (
    FIELDS,
    Model,
    OnStep,
    Task,
    decode_latents,
    encode_clip,
    make_video,
    refused,
    refused_steps,
)

TICK = 2.0
"""Seconds between two signs of life of an idle group."""
_WORK = {VIDEO: make_video, ENCODE: encode_clip, DECODE: decode_latents}


@dataclass(frozen=True)
class Order:
    """What the first rank hands to all."""

    message: Message
    content: bytes | None = None
    """What the client has sent, for ranks that can't read it where the front keeps it."""


def serve_ranks(session: Session, job: Job, wire: Wire | None, steps: int) -> None:
    """Load the pipeline, then work for the front. Called on every rank; does not return.

    Args:
        session: of this rank.
        job: what the server was started with.
        wire: to the front, on the first rank.
        steps: the most that a client may ask for.

    Raises:
        HalovaeError: the model can't be loaded, a rank has died, or the front has gone.
    """
    model = _opened(session, job)
    if wire is not None:
        wire.send(
            {
                "event": "ready",
                "ranks": session.group.size,
                "pipeline": model.source.cls.__name__,
                "grid": asdict(model.grid),
                "refused": {name: in_fields(why) for name, why in refused(model).items()},
                "refused_steps": {count: in_fields(why) for count, why in refused_steps(model, steps).items()},
            }
        )
    with model.runner:
        while True:
            order = session.group.all_gather_object(_next_order(wire))[0]
            if order is not None:
                _Turn(session, model, wire, order).run()
            elif wire is not None:
                _tell(wire, {"event": "alive"})


def _opened(session: Session, job: Job) -> Model:
    source = found(session, job)
    setup, pipeline = loaded(session, job, source)
    grid = session.together("sizes", lambda advance: grid_of(pipeline.components))
    limits = session.together("limits", lambda advance: limits_of(pipeline.vae))
    runner = session.together("spread", lambda advance: Runner(pipeline, setup, session.group, session.device))
    return Model(source=source, job=replace(job, setup=setup), runner=runner, grid=grid, limits=limits)


def _next_order(wire: Wire | None) -> Order | None:
    """On the first rank: the next task, or None after a while without one."""
    if wire is None:
        return None
    message = _heard(wire, TICK)
    if message is None or "kind" not in message:  # Nothing, or a late word on a task that is over.
        return None
    place, path = launch.place(), message["input"]
    if path is None or place is None or place.local_world_size == place.world_size:
        return Order(message)
    return Order(message, Path(path).read_bytes())


@contextmanager
def received(order: Order) -> Iterator[Path | None]:
    """What the client has sent, as a file of this machine."""
    if order.content is None:
        path = order.message["input"]
        yield None if path is None else Path(path)
        return
    # It has no name: nothing of it is left when this process is killed.
    with tempfile.TemporaryFile() as file:
        file.write(order.content)
        file.flush()
        yield Path(f"/dev/fd/{file.fileno()}")


def in_fields(message: str) -> str:
    """A message that speaks of flags of the command line, as clients know these settings."""
    return re.sub(r"--[a-z0-9-]+", lambda found: FIELDS.get(found[0], found[0]), message)


def _tell(wire: Wire, message: Mapping[str, Any]) -> None:
    try:
        wire.send(message)
    except OSError as error:
        raise HalovaeError("the front of the server has ended") from error


def _heard(wire: Wire, seconds: float) -> Message | None:
    try:
        return wire.receive(seconds)
    except EOFError as error:
        raise HalovaeError(str(error)) from error


class _Turn:
    """One task on this rank."""

    def __init__(self, session: Session, model: Model, wire: Wire | None, order: Order) -> None:
        self._session, self._model, self._wire, self._order = session, model, wire, order
        self._id, self._input = order.message["id"], ""
        self._votes = Votes(session.group, self._is_cancelled)
        self._result: dict[str, Any] = {}

    def run(self) -> None:
        outcome = self._votes.outcome(self._work)
        self._say(outcome)
        if outcome.details:
            # A traceback holds on to tensors until it is collected; and an accelerator that has failed for good says
            # so here, which ends this process and brings a fresh one.
            gc.collect()
            self._session.synchronize()

    def _work(self) -> None:
        message = self._order.message
        with received(self._order) as path:
            self._input = str(path)
            task = Task(
                id=self._id,
                kind=message["kind"],
                settings=message["settings"],
                input=path,
                output=Path(message["output"]),
            )
            self._result = _WORK[task.kind](self._session, self._model, task, self._on_step())

    def _on_step(self) -> OnStep:
        def on_step(done: int, total: int | None) -> None:
            self._votes.step()
            if self._wire is not None:
                _tell(self._wire, {"event": "progress", "id": self._id, "done": done, "total": total})

        return on_step

    def _is_cancelled(self) -> bool:
        assert self._wire is not None
        while (message := _heard(self._wire, 0)) is not None:
            if message.get("cancel") == self._id:
                return True
        return False

    def _say(self, outcome: Outcome) -> None:
        if self._wire is None:
            return
        if outcome.cancelled:
            _tell(self._wire, {"event": "cancelled", "id": self._id})
        elif outcome.code is None:
            _tell(self._wire, {"event": "done", "id": self._id, "result": self._result})
        else:
            sys.stderr.write(outcome.details)
            # The path is this machine's own affair.
            message = in_fields(outcome.message.replace(self._input, "the file"))
            _tell(self._wire, {"event": "failed", "id": self._id, "code": outcome.code, "message": message})
