"""Longest first, and the same on every rank."""

from __future__ import annotations

from halovae.tiles.tile_plan import TileChain, assign


def chains(*costs: int) -> list[TileChain]:
    return [TileChain((number,), cost) for number, cost in enumerate(costs)]


def test_longest_first() -> None:
    schedule = assign(chains(1, 4, 3, 3, 1), 2)
    assert schedule.owners == (0, 0, 1, 1, 0)
    assert schedule.loads == (6, 6)
    assert schedule.spread == 1


def test_in_the_order_of_the_vae() -> None:
    assert [chain.calls for chain in assign(chains(1, 4, 3, 3, 1), 2).of(0)] == [(0,), (1,), (4,)]


def test_fewer_chains_than_ranks() -> None:
    schedule = assign(chains(5), 3)
    assert schedule.owners == (0,)
    assert schedule.calls_of(2) == set()
    assert schedule.rounds == 1
    assert schedule.spread == 3
