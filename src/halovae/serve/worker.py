"""One rank of a server: the pipeline is loaded once, then tasks come, one after another, until the front has gone.

The first rank gets them from the front, as lines of JSON, and hands each to the others.
"""

from __future__ import annotations

import gc
import json
import os
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from halovae.app.generation import found, loaded
from halovae.app.job import PipelineJob
from halovae.app.session import Session
from halovae.app.watch import Failure, failure_of, report
from halovae.base.errors import HalovaeError, RankFailedError
from halovae.base.files import first_line
from halovae.comm import Comm
from halovae.comm.agreement import together
from halovae.media.vae_limits import limits_of
from halovae.pipelines.generation_settings import default, parameters
from halovae.pipelines.grid_sizes import grid_of
from halovae.pipelines.runner import Runner
from halovae.pipelines.transformers import degree
from halovae.serve.server_settings import RANK_FD
from halovae.serve.store import DECODE, ENCODE, NO_ROOM, STREAM, VIDEO
from halovae.serve.work import (
    FIELDS,
    Model,
    NoRoomError,
    Task,
    decode_latents,
    encode_clip,
    make_video,
    refused,
    refused_steps,
)

TICK = 2.0
"""Seconds between two signs of life of an idle group."""
STUCK_SECONDS = 120.0
"""How long a rank that has failed waits for the others to learn of it. They may be in an exchange that it will never
join; then only the end of its process frees them."""
AHEAD_BYTES = 2**23
"""How much of a result may wait for the client that gets it meanwhile."""
HOLD_SECONDS = 10.0
"""How long each piece waits for that client at most."""
_WORK = {VIDEO: make_video, ENCODE: encode_clip, DECODE: decode_latents}


def serve_ranks(session: Session, job: PipelineJob, steps: int) -> None:
    """Load the pipeline, then work for the front, until it has gone; `steps` are the most that a client may ask for.

    Called on every rank; does not return.
    """
    model = _opened(session, job)
    wire = Wire(socket.socket(fileno=int(os.environ[RANK_FD]))) if session.is_first else None
    if wire is not None:
        wire.send(
            {
                "event": "ready",
                "ranks": session.group.size,
                "pipeline": model.source.cls.__name__,
                "grid": model.grid.numbers(),
                "parts": degree(model.job.setup),
                "frames": default(parameters(model.source.cls), "num_frames") or 1,
                "refused": {name: in_fields(why) for name, why in refused(model).items()},
                "refused_steps": {count: in_fields(why) for count, why in refused_steps(model, steps).items()},
            }
        )
    with model.runner:
        while True:
            message = session.group.all_gather_object(None if wire is None else wire.receive(TICK))[0]
            if message is not None and "kind" in message:  # Else a late word on a task that is over.
                Turn(session, model, wire, message).run()
            elif wire is not None:
                wire.send({"event": "alive"})


def _opened(session: Session, job: PipelineJob) -> Model:
    source = found(session, job)
    setup, pipeline = loaded(session, job, source)
    limits = session.together("limits", lambda advance: limits_of(pipeline.vae))
    grid = session.together("sizes", lambda advance: grid_of(pipeline.components, limits))
    runner = session.together("spread", lambda advance: Runner(pipeline, setup, session.group, session.device))
    return Model(source=source, job=replace(job, setup=setup), runner=runner, grid=grid, limits=limits)


def in_fields(message: str) -> str:
    """A message that speaks of flags of the command line, as clients know these settings."""
    message = re.sub(r"use --frames \S+", "send these alone", message)
    return re.sub(r"--[a-z0-9-]+", lambda found: FIELDS.get(found[0], found[0]), message)


class Wire:
    """The first rank's end of the connection to the front. That the front has gone is an error."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._words = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        try:
            self._end.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _alone() from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None when none comes within so many seconds."""
        while b"\n" not in self._words:
            if not select.select([self._end], [], [], seconds)[0]:
                return None
            try:
                words = self._end.recv(65536)
            except ConnectionError as error:
                raise _alone() from error
            if not words:
                raise _alone()
            self._words += words
        line, _, self._words = self._words.partition(b"\n")
        return json.loads(line)


def _alone() -> HalovaeError:
    return HalovaeError("the front of the server has ended")


# ---- one task --------------------------------------------------------------------------------------------------------


class CancelledError(HalovaeError):
    """The client does not want the result any more."""


class Attempt:
    """One rank's part in one task, which all ranks leave together, whichever of them has a reason to.

    A rank that left it by itself would leave the others waiting for it, for good. The first rank asks at each step
    whether it is cancelled.
    """

    def __init__(self, comm: Comm, cancelled: Callable[[], bool]) -> None:
        self._comm, self._cancelled, self._leaving = comm, cancelled, False

    def step(self, problem: HalovaeError | None = None) -> None:
        """Called by all ranks at the same places of a task, at least before what they do together begins; with what
        went wrong on this one."""
        self._leaving = True
        with together(self._comm):
            if problem is not None:
                raise problem
            if self._comm.rank == 0 and self._cancelled():
                raise CancelledError
        self._leaving = False

    def run(self, task: Callable[[], None]) -> Exception | None:
        """Do this rank's part; returns, on all ranks, what ended the task before it was done. If a rank has died, it
        raises."""
        problem: Exception | None = None
        try:
            task()
        except Exception as error:
            problem = error
        try:
            if not self._leaving:
                with _ends_when_stuck(problem), together(self._comm):
                    if problem is not None:
                        raise problem
        except Exception as error:
            problem = error
        if problem is not None:
            self._comm.all_gather_object(None)
        return problem


@contextmanager
def _ends_when_stuck(problem: Exception | None) -> Iterator[None]:
    if problem is None:
        yield
        return
    message = failure_of(problem).message
    why = HalovaeError(f"{message} (and the other ranks did not learn of it in {STUCK_SECONDS:g} s)")
    timer = threading.Timer(STUCK_SECONDS, _end_process, [failure_of(why)])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(failure: Failure) -> None:
    report(failure)
    os._exit(failure.exit_code)


class Turn:
    """One task on this rank."""

    def __init__(self, session: Session, model: Model, wire: Wire | None, message: Mapping[str, Any]) -> None:
        self._session, self._model, self._wire = session, model, wire
        self._attempt = Attempt(session.group, self._is_cancelled)
        self.agree = self._attempt.step
        self._result: dict[str, Any] = {}
        self._is_unwanted, self._taken = False, 0
        path = message["input"]
        self._task = Task(
            id=message["id"],
            kind=message["kind"],
            settings=message["settings"],
            input=None if path is None else Path(path),
            output=Path(message["output"]),
        )

    def run(self) -> None:
        problem = self._attempt.run(self._work)
        if self._wire is not None:
            self._wire.send({"id": self._task.id, **self._told(problem)})
        if problem is not None:
            # A traceback holds on to tensors until it is collected; and an accelerator that has failed for good says
            # so here, which ends this process and brings a fresh one.
            problem = None
            gc.collect()
            self._session.synchronize()

    def _work(self) -> None:
        self._result = _WORK[self._task.kind](self._session, self._model, self._task, self)

    def on_frames(self, count: int) -> None:
        """Called on every rank when so many frames can be sent. Raises where the client does not want them any more."""
        if self._wire is not None:
            self._wire.send({"event": "frames", "id": self._task.id, "count": count})
            self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        """The one client that gets it meanwhile holds the work back, but not for ever: others wait for the ranks."""
        deadline = time.monotonic() + HOLD_SECONDS
        stream, is_taken = self._task.output.with_name(STREAM), self._task.settings.get("stream")
        while not self._is_cancelled():
            left = deadline - time.monotonic()
            # The thread that writes it may not have begun.
            behind = stream.stat().st_size - self._taken if is_taken and stream.exists() else 0
            if behind <= AHEAD_BYTES or left <= 0:
                return
            self._hear(left)
        raise CancelledError

    def on_step(self, done: int, total: int | None) -> None:
        """Called by all ranks together, with the number of steps done and of all."""
        self._attempt.step()
        if self._wire is not None:
            self._wire.send({"event": "progress", "id": self._task.id, "done": done, "total": total})

    def _is_cancelled(self) -> bool:
        while self._hear(0):
            pass
        return self._is_unwanted

    def _hear(self, seconds: float) -> bool:
        """Whether the front has said something within so many seconds."""
        assert self._wire is not None
        message = self._wire.receive(seconds) or {}
        self._is_unwanted |= message.get("cancel") == self._task.id
        if message.get("taken") == self._task.id:
            self._taken = message["bytes"]
        return bool(message)

    def _told(self, problem: Exception | None) -> dict[str, Any]:
        """What the front hears of the end."""
        if problem is None:
            return {"event": "done", "result": self._result}
        if isinstance(problem, CancelledError):
            return {"event": "cancelled"}
        failure = failure_of(problem)
        words = str(problem) if failure.exit_code == 2 else first_line(problem)
        if not failure.expected or failure.consequence:
            sys.stderr.write(problem.details if isinstance(problem, RankFailedError) else failure.details)
        refusal = "invalid_request" if failure.exit_code == 2 else "server_error"
        code = NO_ROOM if isinstance(problem, NoRoomError) else refusal
        # The path is this machine's own affair.
        words = in_fields(" ".join(words.replace(str(self._task.input), "the file").split()))
        named = words if failure.expected else f"{type(problem).__name__}: {words}"
        return {"event": "failed", "code": code, "message": named}
