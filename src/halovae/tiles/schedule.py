"""Which rank runs which tiles: longest first, from shapes alone, so every rank finds the same answer by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from halovae.calls.record import NetworkCall


@dataclass(frozen=True)
class Chain:
    """Calls that share a cache, in order: they run on one rank."""

    calls: tuple[int, ...]
    cost: int


@dataclass(frozen=True)
class Schedule:
    """Who runs what."""

    chains: tuple[Chain, ...]
    """In the VAE's own order."""
    owners: tuple[int, ...]
    """The rank of each chain."""
    loads: tuple[int, ...]
    """Sum of costs of each rank at work."""

    @property
    def spread(self) -> float:
        """Largest over mean load: 1.0 is a perfect balance."""
        return max(self.loads) * len(self.loads) / sum(self.loads)

    @property
    def rounds(self) -> int:
        """Most chains on one rank."""
        return max(len(self.of(rank)) for rank in set(self.owners))

    def of(self, rank: int) -> list[Chain]:
        """A rank's chains, in the order in which they get ready."""
        mine = [chain for chain, owner in zip(self.chains, self.owners, strict=True) if owner == rank]
        return sorted(mine, key=lambda chain: chain.calls[-1])

    def calls_of(self, rank: int) -> set[int]:
        return {call for chain in self.of(rank) for call in chain.calls}


def find_chains(calls: Sequence[NetworkCall]) -> tuple[Chain, ...]:
    """Group calls that read each other's caches."""
    first = list(range(len(calls)))

    def root(call: int) -> int:
        while first[call] != call:
            call = first[call]
        return call

    for call, known in enumerate(calls):
        for earlier in known.needs:
            roots = sorted((root(call), root(earlier)))
            first[roots[1]] = roots[0]
    members: dict[int, list[int]] = {}
    for call in range(len(calls)):
        members.setdefault(root(call), []).append(call)
    return tuple(Chain(tuple(group), sum(calls[call].cost for call in group)) for group in members.values())


def assign(chains: Sequence[Chain], ranks: int) -> Schedule:
    """Give the longest chain to the rank with the least to do, then the next.

    Args:
        chains: what is to be run.
        ranks: how many ranks may work; those beyond the number of chains get nothing.
    """
    loads = [0] * ranks
    owners = [0] * len(chains)
    for number in sorted(range(len(chains)), key=lambda n: (-chains[n].cost, n)):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += chains[number].cost
    return Schedule(tuple(chains), tuple(owners), tuple(loads))
