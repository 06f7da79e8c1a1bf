"""Links are measured once per group, and alike on all ranks."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks

from halovae import comm
from halovae.comm.bandwidth import LINKS, LinkSpeed, measure, measure_all

CPU = torch.device("cpu")


def twice(rank: int) -> tuple[list[LinkSpeed], bool, int]:
    """All links, whether a second look gives the very same, and the messages of that look."""
    ranks = comm.connect()
    every = measure_all(ranks, CPU)
    first = measure(ranks, CPU)
    again = comm.connect()
    return every, measure(again, CPU) is first, again.traffic.messages


def test_measured_once_and_the_same_everywhere(three_ranks: Ranks) -> None:
    results = three_ranks.run(twice)
    for links, same, messages in results:
        assert links == results[0][0]
        assert same
        assert messages == 0
        assert len(links) == 2
        assert all(0 < link.latency < 1 and link.bandwidth > 1e6 for link in links)


@pytest.mark.parametrize("name", LINKS)
def test_seconds_grow_with_size(name: str) -> None:
    link = LINKS[name]
    assert link.seconds(0) == link.latency < link.seconds(2**20) < link.seconds(2**30)


def test_words() -> None:
    assert str(LinkSpeed(latency=1e-4, bandwidth=2e9)) == "0.10 ms, 2.00 GB/s each way"
