"""Ranks leave a task together, whichever of them has a reason to."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import Ranks

from halovae import comm
from halovae.base.errors import InputError, RankFailedError
from halovae.serve import worker
from halovae.serve.store import DECODE, STREAM
from halovae.serve.worker import Attempt, CancelledError

STEPS = 4


def play(rank: int, failing: list[int], at: int, cancel_at: int | None = None) -> list[object]:
    """A task of some steps in which ranks fail, or the client has enough; and after it one that does not fail."""
    group, asked = comm.world(), 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return cancel_at is not None and asked > cancel_at

    attempt, done = Attempt(group, cancelled), 0

    def task() -> None:
        nonlocal done
        for step in range(STEPS):
            attempt.step()
            done += 1
            if step == at and rank in failing:
                raise InputError(f"bad on {rank}")

    problem = attempt.run(task)
    details = problem.details if isinstance(problem, RankFailedError) else ""
    # A failure of another rank is also of the class of what that one has met.
    kind = RankFailedError if isinstance(problem, RankFailedError) else type(problem)
    return [kind, str(problem), "in task" in details, done, Attempt(group, lambda: False).run(lambda: None)]


def everything(rank: int) -> dict[str, list[object]]:
    return {
        "well": play(rank, [], 0),
        "both": play(rank, [0, 1], 1),
        "cancelled": play(rank, [], 0, 2),
        **{f"rank {each} at {at}": play(rank, [each], at) for each in (0, 1) for at in (0, STEPS - 1)},
    }


def test_ranks_leave_a_task_together(two_ranks: Ranks) -> None:
    both = two_ranks.run(everything)
    for rank, found in enumerate(both):
        assert found["well"] == [type(None), "None", False, STEPS, None]
        assert found["both"] == [InputError, f"bad on {rank}", False, 2, None]
        for each in (0, 1):
            for at in (0, STEPS - 1):
                own = [InputError, f"bad on {each}", False, at + 1, None]
                told = [RankFailedError, f"rank {each} failed: bad on {each}", True, at + 1, None]
                assert found[f"rank {each} at {at}"] == (own if rank == each else told)
    first, second = (found["cancelled"] for found in both)
    assert first == [CancelledError, "", False, 2, None]
    assert second[0] is RankFailedError
    assert second[3:] == [2, None]


def test_clients_are_told_of_fields_and_not_of_flags() -> None:
    cut = worker.in_fields(
        "the file is broken at frame 9 (the file ends early); the first 9 can be read: use --frames 0:9"
    )
    assert cut.endswith("; the first 9 can be read: send these alone")
    assert worker.in_fields("--num-frames 6 and --fps 0 are wrong") == "num_frames 6 and fps 0 are wrong"


def test_a_reader_holds_the_work_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has taken enough, and not for ever; one that leaves ends the work."""
    monkeypatch.setattr(worker, "AHEAD_BYTES", 10)
    monkeypatch.setattr(worker, "HOLD_SECONDS", 0.2)
    front, end = socket.socketpair()
    task: dict[str, Any] = {"id": "a", "kind": DECODE, "settings": {"stream": True}, "input": None}
    message = {**task, "output": str(tmp_path / "output.mp4")}
    session: Any = SimpleNamespace(group=None)
    turn = worker.Turn(session, session, worker.Wire(end), message)
    turn.on_frames(1)  # Nothing is written yet.
    (tmp_path / STREAM).write_bytes(bytes(100))
    for said, least, most in (("", 0.2, 9.0), ('{"taken": "a", "bytes": 95}\n', 0.0, 0.2)):
        front.sendall(said.encode())
        started = time.monotonic()
        turn.on_frames(1)
        assert least <= time.monotonic() - started < most
    front.sendall(b'{"cancel": "a"}\n')
    with pytest.raises(CancelledError):
        turn.on_frames(2)
    front.close()
    end.close()
