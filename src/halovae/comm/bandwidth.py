"""How fast messages between ranks are: measured, or taken from a table."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from halovae.comm import Comm

_ROUNDS = 50
_BIG_ROUNDS = 5
_BIG = 16 * 2**20
"""Bytes of a message that shows the bandwidth: longer than any latency hides."""


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """Between two ranks."""

    latency: float
    """Seconds of an exchange of next to nothing."""
    bandwidth: float
    """Bytes per second each way, both ways at once."""

    def seconds(self, size: int) -> float:
        """Of an exchange of `size` bytes each way."""
        return self.latency + size / self.bandwidth

    def __str__(self) -> str:
        return f"{self.latency * 1e3:.2f} ms, {self.bandwidth / 1e9:.2f} GB/s each way"


LINKS = {
    "nvlink": LinkSpeed(latency=15e-6, bandwidth=300e9),
    "pcie": LinkSpeed(latency=30e-6, bandwidth=20e9),
    "ethernet": LinkSpeed(latency=100e-6, bandwidth=1.2e9),
}
"""Round figures for planning: NVLink 4 and PCIe 4 x16 at two thirds of their nominal rate each way, 10 gigabit
Ethernet; latencies of one exchange through NCCL or gloo."""


def measure(comm: Comm, device: torch.device) -> LinkSpeed:
    """The slowest link between neighbours of a group of two ranks or more. Called by all; the same on all of them."""
    links = measure_all(comm, device)
    return LinkSpeed(latency=max(link.latency for link in links), bandwidth=min(link.bandwidth for link in links))


def measure_all(comm: Comm, device: torch.device) -> list[LinkSpeed]:
    """What each rank and the next measure while all others are idle. Called by all ranks; the same on all of them."""
    links: list[LinkSpeed] = []
    for one in range(comm.size - 1):
        mine = _between(comm, 2 * one + 1 - comm.rank, device) if comm.rank in (one, one + 1) else None
        link = comm.all_gather_object(mine)[one]
        assert isinstance(link, LinkSpeed)
        links.append(link)
    return links


def _between(comm: Comm, peer: int, device: torch.device) -> LinkSpeed:
    latency = _exchange_seconds(comm, peer, 8, _ROUNDS, device)
    seconds = _exchange_seconds(comm, peer, _BIG, _BIG_ROUNDS, device)
    return LinkSpeed(latency=latency, bandwidth=_BIG / max(seconds - latency, 1e-9))


def _exchange_seconds(comm: Comm, peer: int, size: int, rounds: int, device: torch.device) -> float:
    """Seconds that two ranks take to swap `size` bytes, both ways at once as halos do; the median."""
    mine = torch.zeros(size, dtype=torch.uint8, device=device)
    theirs = torch.empty_like(mine)
    seconds: list[float] = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        comm.exchange([(peer, mine)], [(peer, theirs)])
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    # The first one sets the connection up.
    return sorted(seconds[1:])[rounds // 2]
