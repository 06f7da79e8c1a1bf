"""Every family that diffusers can tile, encode and decode: on three ranks, bit for bit what diffusers gives on one."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from tiles import CUTS, run, run_alone

HALVES = [(name, half) for name, cut in CUTS.items() for half in ("encode", "decode") if getattr(cut, half)]


def compare(rank: int, name: str, half: str) -> tuple[bool, int, set[int]]:
    """Whether the bits are equal, how many chains there were, and which ranks ran them."""
    cut = CUTS[name]
    vae = cut.build()
    picture = cut.picture(half)
    found, outcome = run(cut, vae, half, picture)
    schedule = outcome.plan.schedule
    return torch.equal(found, run_alone(cut, vae, half, picture)), len(schedule.chains), set(schedule.owners)


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_three_ranks(three_ranks: Ranks, name: str, half: str) -> None:
    for equal, chains, owners in three_ranks.run(compare, name, half):
        assert chains == CUTS[name].tiles
        assert owners == {0, 1, 2}
        assert equal
