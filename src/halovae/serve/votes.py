"""How the ranks stay together in one task: at every step each says how it stands, and all draw the same conclusion.

Nothing else would do. A rank that left a task by itself would leave the others waiting for it, for good.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from halovae.app.watch import Failure, failure_of, report
from halovae.base.errors import HalovaeError, InputError, NotExactError, RankFailedError
from halovae.base.files import first_line
from halovae.comm import Comm
from halovae.serve.store import NO_ROOM

STUCK_SECONDS = 120.0
"""How long a rank that has failed waits for the others to learn of it. They may be in an exchange that it will never
join; then only the end of its process frees them."""
_GOING, _CANCEL, _DONE, _FAILED = "going", "cancel", "done", "failed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a task, the same on all ranks."""

    cancelled: bool = False
    code: str | None = None
    """Of a failure: "invalid_request", "server_error" or `store.NO_ROOM`. None: the task was done."""
    message: str = ""
    details: str = ""
    """The traceback of a failure that nobody expected."""


@dataclass(frozen=True)
class _Vote:
    kind: str
    outcome: Outcome | None = None
    consequence: bool = False
    """Whether another rank is to blame."""


class NoRoomError(HalovaeError):
    """The result could not be written for want of room: the task can be done again when there is."""


class _Left(Exception):
    """The ranks leave the task together."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class Votes:
    """One rank's part in one task.

    Args:
        comm: of all ranks.
        wants_out: asked at each step, on the first rank, whether the task shall be cancelled.
    """

    def __init__(self, comm: Comm, wants_out: Callable[[], bool]) -> None:
        self._comm, self._wants_out = comm, wants_out

    def step(self) -> None:
        """Called by all ranks at the same places of a task, at least before what they do together begins."""
        cancel = self._comm.rank == 0 and self._wants_out()
        votes = self._comm.all_gather_object(_Vote(_CANCEL if cancel else _GOING))
        outcome = _failure(votes)
        if outcome is None and votes[0].kind == _CANCEL:
            outcome = Outcome(cancelled=True)
        if outcome is not None:
            raise _Left(outcome)

    def outcome(self, task: Callable[[], None]) -> Outcome:
        """Do this rank's part; how it went for all.

        Raises:
            RankFailedError: a rank has died: there is no group any more.
        """
        try:
            task()
            own = _Vote(_DONE)
        except _Left as left:
            return left.outcome
        except Exception as error:
            own = _Vote(_FAILED, _described(error), isinstance(error, RankFailedError))
        with _ends_when_stuck(own):
            votes = self._comm.all_gather_object(own)
        return _failure(votes) or Outcome()


def _failure(votes: Sequence[_Vote]) -> Outcome | None:
    failed = [vote for vote in votes if vote.kind == _FAILED]
    causes = [vote for vote in failed if not vote.consequence] or failed
    return causes[0].outcome if causes else None


def _described(error: Exception) -> Outcome:
    refused = isinstance(error, (InputError, NotExactError))
    message = str(error) if isinstance(error, HalovaeError) else f"{type(error).__name__}: {first_line(error)}"
    return Outcome(
        code="invalid_request" if refused else NO_ROOM if isinstance(error, NoRoomError) else "server_error",
        message=" ".join(message.split()),
        details="" if isinstance(error, HalovaeError) else "".join(traceback.format_exception(error)),
    )


@contextmanager
def _ends_when_stuck(vote: _Vote) -> Iterator[None]:
    if vote.outcome is None:
        yield
        return
    why = f"{vote.outcome.message} (and the other ranks did not learn of it in {STUCK_SECONDS:g} s)"
    timer = threading.Timer(STUCK_SECONDS, _end_process, [failure_of(HalovaeError(why))])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(failure: Failure) -> Any:
    report(failure)
    os._exit(failure.exit_code)
