"""Ranks leave a task together, whichever of them has a reason to."""

from __future__ import annotations

from ranks import Ranks

from halovae import comm
from halovae.base.errors import InputError
from halovae.serve.votes import Outcome, Votes

STEPS = 4


def play(rank: int, failing: list[int], at: int, cancel_at: int | None = None, user: bool = True) -> list[object]:
    """A task of some steps in which ranks fail, or the client has enough; and after it one that does not fail."""
    group, asked = comm.world(), 0

    def wants_out() -> bool:
        nonlocal asked
        asked += 1
        return cancel_at is not None and asked > cancel_at

    votes, done = Votes(group, wants_out), 0

    def task() -> None:
        nonlocal done
        for step in range(STEPS):
            votes.step()
            done += 1
            if step == at and rank in failing:
                raise InputError(f"bad on {rank}") if user else RuntimeError(f"broken on {rank}\nand more")

    outcome = votes.outcome(task)
    after = Votes(group, lambda: False).outcome(lambda: None)
    return [outcome, done, after]


def test_all_is_well(two_ranks: Ranks) -> None:
    assert two_ranks.run(play, [], 0) == [[Outcome(), STEPS, Outcome()]] * 2


def test_one_fails_and_all_leave(two_ranks: Ranks) -> None:
    for failing in (0, 1):
        for at in (0, STEPS - 1):
            for outcome, done, after in two_ranks.run(play, [failing], at):
                assert outcome == Outcome(code="invalid_request", message=f"bad on {failing}")
                assert done == at + 1
                assert after == Outcome()


def test_an_unexpected_failure_has_a_traceback(two_ranks: Ranks) -> None:
    (outcome, _, _), (other, _, _) = two_ranks.run(play, [1], 2, None, False)
    assert outcome == other
    assert (outcome.code, outcome.message) == ("server_error", "RuntimeError: broken on 1")
    assert "Traceback" in outcome.details


def test_all_fail(two_ranks: Ranks) -> None:
    for outcome, _, after in two_ranks.run(play, [0, 1], 1):
        assert outcome == Outcome(code="invalid_request", message="bad on 0")
        assert after == Outcome()


def test_a_client_has_enough(two_ranks: Ranks) -> None:
    for outcome, done, after in two_ranks.run(play, [], 0, 2):
        assert (outcome, done, after) == (Outcome(cancelled=True), 2, Outcome())
