"""Tiles on ranks: how many there are, who waits, who gets the result, and what a failure does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tiles import CUTS, run, run_alone, tensor_of

from halovae import comm
from halovae.base.errors import DisagreementError, InputError, RankFailedError
from halovae.calls.target import Target
from halovae.comm.agreement import one_call
from halovae.tiles.tile_plan import Planner, packed, unpacked
from halovae.tiles.tile_runner import TileRunner

WAN = CUTS["wan21"]


def count(rank: int, name: str, half: str, height: int, width: int) -> tuple[bool, int, float]:
    """Whether diffusers gives the same bits, the number of chains, and largest over mean load."""
    cut = CUTS[name]
    vae = cut.build()
    picture = cut.picture(half, height, width)
    found, outcome = run(cut, vae, half, picture)
    schedule = outcome.plan.schedule
    equal = torch.equal(found, run_alone(cut, vae, half, picture))
    # Of several pictures a convolution may leave its result in another layout, whose sums have other last bits.
    two = torch.cat([picture, picture.flip(-1)])
    equal = equal and torch.equal(run(cut, vae, half, two)[0], run_alone(cut, vae, half, two))
    return equal, len(schedule.chains), schedule.spread


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize(("name", "height", "width", "tiles"), [("wan21", 64, 64, 1), ("kl", 144, 240, 15)])
def test_counts(two_ranks: Ranks, name: str, half: str, height: int, width: int, tiles: int) -> None:
    for equal, found, spread in two_ranks.run(count, name, half, height, width):
        assert equal
        assert found == tiles
        assert 1 <= spread <= (1.1 if tiles > 1 else 2)


def with_spares(rank: int, gather: str) -> tuple[bool, tuple[int, ...]]:
    vae, picture = WAN.build(), WAN.picture("decode")
    with patch.object(Planner, "plan", autospec=True, side_effect=Planner.plan) as plan:
        found, _ = run(WAN, vae, "decode", picture, ranks=2, gather=gather)
    assert plan.call_count == (rank == 0)  # One plans for all.
    return torch.equal(found, run_alone(WAN, vae, "decode", picture)) if found.numel() else False, tuple(found.shape)


def test_spare_ranks_share(three_ranks: Ranks) -> None:
    assert all(equal for equal, _ in three_ranks.run(with_spares, "all"))


def test_only_the_first_gets_the_result(three_ranks: Ranks) -> None:
    (equal, _), *others = three_ranks.run(with_spares, "first")
    assert equal
    assert others == [(False, (1, 3, 5, 0, 0))] * 2


def in_sub_group(rank: int) -> bool:
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    vae, picture = WAN.build(), WAN.picture("encode")
    found, outcome = run(WAN, vae, "encode", picture, group=groups[min(rank, 1)])
    assert set(outcome.plan.schedule.owners) == ({0} if rank == 0 else {0, 1})
    return torch.equal(found, run_alone(WAN, vae, "encode", picture))


def test_sub_groups(three_ranks: Ranks) -> None:
    assert all(three_ranks.run(in_sub_group))


def failing(rank: int, bad_rank: int) -> tuple[str, bool]:
    """The error when a tile fails, and whether the group works afterwards."""
    vae, picture = WAN.build(), WAN.picture("decode")
    group = comm.connect()
    runner = TileRunner(group, Target(vae), ranks=2)
    runs = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal runs
        runs += not args[0].is_meta
        if rank == bad_rank and runs == 2:
            raise ValueError("the weather is bad")

    hook = vae.decoder.register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises((RankFailedError, ValueError)) as caught, one_call(group):
            runner.run("decode", (picture,), {})
        problem = f"{caught.type.__name__}: {caught.value}"
        hook.remove()
        with one_call(group):
            found = tensor_of(runner.run("decode", (picture,), {}).result)
    return problem, torch.equal(found, run_alone(WAN, vae, "decode", picture))


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_failing_tile_fails_on_all_ranks(two_ranks: Ranks, bad_rank: int) -> None:
    cause = "ValueError: the weather is bad"
    errors = [cause if rank == bad_rank else f"RankFailedError: rank {bad_rank} failed: {cause}" for rank in range(2)]
    assert two_ranks.run(failing, bad_rank) == [(error, True) for error in errors]


def with_other_tiles(rank: int) -> str:
    vae, picture = WAN.build(), WAN.picture("decode")
    vae.tile_sample_min_width -= 8 * rank
    try:
        run(WAN, vae, "decode", picture)
    except DisagreementError as error:
        return str(error)
    return "none"


def test_other_tiles_on_another_rank(two_ranks: Ranks) -> None:
    assert all("different tiles" in error for error in two_ranks.run(with_other_tiles))


def fitted(rank: int) -> tuple[bool, int, Any]:
    vae, picture = CUTS["kl"].build(), CUTS["kl"].picture("decode", 64, 64)
    found, outcome = run(CUTS["kl"], vae, "decode", picture, fit=True)
    before = vae.tile_sample_min_size
    vae.__dict__.update(outcome.plan.settings)
    equal = torch.equal(found, run_alone(CUTS["kl"], vae, "decode", picture))
    return equal and before == 64, len(set(outcome.plan.schedule.owners)), outcome.plan.tiles


def test_fit_gives_every_rank_work(three_ranks: Ranks) -> None:
    for equal, at_work, tiles in three_ranks.run(fitted):
        assert equal
        assert at_work == 3
        assert tiles.size < (64, 64)
        assert tiles.overlap == (16, 16)


def test_what_is_a_ranks_own_is_in_no_plan_for_others() -> None:
    plan = TileRunner(comm.SoloComm(), Target(WAN.build()), ranks=2).plan("decode", (WAN.picture("decode"),), {})
    sent = packed(plan)
    assert sent
    assert unpacked(sent).schedule == plan.schedule
    for own in (torch.Generator(), torch.zeros(1)):
        assert packed(replace(plan, settings={"own": own})) is None


def test_shards_are_refused() -> None:
    with pytest.raises(InputError, match="'all' or 'first'"):
        TileRunner(comm.SoloComm(), Target(WAN.build()), ranks=1, gather="shard")


def raising(rank: int) -> str:
    try:
        run(WAN, WAN.build(), "decode", torch.randn(1, 5, 3, 12, 12))
    except Exception as error:
        return type(error).__name__
    return "none"


def test_an_error_of_the_vae_is_shown_as_it_is(two_ranks: Ranks) -> None:
    assert two_ranks.run(raising) == ["RuntimeError"] * 2
