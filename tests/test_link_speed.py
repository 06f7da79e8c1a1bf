"""Links are measured alike on all ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks

from halovae import comm
from halovae.comm.bandwidth import LINKS, LinkSpeed, measure, measure_all

CPU = torch.device("cpu")


def both(rank: int) -> tuple[list[LinkSpeed], LinkSpeed]:
    """All links, and what is said of the group."""
    ranks = comm.connect()
    return measure_all(ranks, CPU), measure(ranks, CPU)


def test_links_are_the_same_everywhere(three_ranks: Ranks) -> None:
    results = three_ranks.run(both)
    for links, slowest in results:
        assert (links, slowest) == results[0]
        assert len(links) == 2
        assert all(0 < link.latency < 1 and link.bandwidth > 1e6 for link in (*links, slowest))


@pytest.mark.parametrize("name", LINKS)
def test_seconds_grow_with_size(name: str) -> None:
    link = LINKS[name]
    assert link.seconds(0) == link.latency < link.seconds(2**20) < link.seconds(2**30)


def test_words() -> None:
    assert str(LinkSpeed(latency=1e-4, bandwidth=2e9)) == "0.10 ms, 2.00 GB/s each way"
