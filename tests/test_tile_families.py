"""Every family that diffusers can tile, encode and decode: on ranks, bit for bit what diffusers gives on one."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from tiles import CUTS, run, run_alone

UNEVEN = ("kl", "consistency", "wan21", "ltx2", "hunyuan_video_framewise", "minimax_h3")
"""On three ranks, which get unlike numbers of tiles: 4, 8 or 9 tiles, with a generator, caches in time, other overlaps.
The others are on two."""

HALVES = [(name, half) for name, cut in CUTS.items() for half in ("encode", "decode") if getattr(cut, half)]


def in_tiles(rank: int, name: str, half: str) -> tuple[torch.Tensor, int, set[int], bool]:
    """The tensor, the number of chains, the ranks that ran them, and whether diffusers gives the same bits."""
    cut = CUTS[name]
    vae = cut.build()
    picture = cut.picture(half)
    found, outcome = run(cut, vae, half, picture)
    schedule = outcome.plan.schedule
    alone = rank > 0 or torch.equal(found, run_alone(cut, vae, half, picture))
    return found, len(schedule.chains), set(schedule.owners), alone


@pytest.mark.parametrize(("name", "half"), HALVES)
def test_ranks_give_what_diffusers_gives(two_ranks: Ranks, three_ranks: Ranks, name: str, half: str) -> None:
    ranks = three_ranks if name in UNEVEN else two_ranks
    results = ranks.run(in_tiles, name, half)
    for found, chains, owners, equal in results:
        assert chains == CUTS[name].chains(half)
        assert owners == set(range(ranks.size))
        assert equal
        assert torch.equal(found, results[0][0])
