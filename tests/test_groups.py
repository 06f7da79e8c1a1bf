"""Which ranks work and who holds the result: spare ranks, sub-groups, meshes, threads, gathers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import EXACT
from pictures import error, kl, latents, raises
from ranks import Ranks
from torch import Tensor

import halovae
from halovae.base.errors import InputError


def ranks_and_grids(rank: int) -> list[tuple[int, int]]:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    shapes: list[tuple[int, int]] = []
    for options in ({"axis": "height"}, {"axis": "width"}, {"axis": "width", "size": 2}, {"size": 1}, {"axis": "auto"}):
        with halovae.parallelize(vae, **options, verify=False) as handle:
            assert error(vae.decode(z)[0], expected) <= EXACT
            assert handle.last is not None
            shapes.append(handle.last.shape)
    return shapes


def test_more_ranks_than_rows_and_fewer_ranks_than_the_group(four_ranks: Ranks) -> None:
    per_rank = four_ranks.run(ranks_and_grids)
    assert per_rank == [[(2, 1), (1, 3), (1, 2), (1, 1), (2, 2)]] * 4


def sub_group(rank: int) -> str:
    group = dist.new_group([1, 2])
    vae, z = kl(), latents()
    if rank not in (1, 2):
        with raises(InputError, "not a process group that this process belongs to"):
            halovae.parallelize(vae, group)
        return ""
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae, group) as handle:
        assert error(vae.decode(z)[0], expected) <= EXACT
        return repr(handle)


def test_a_sub_group_that_does_not_begin_at_rank_0(four_ranks: Ranks) -> None:
    before, first, second, behind = four_ranks.run(sub_group)
    assert before == behind == ""
    assert "2 of 2 at work; this is rank 0" in first
    assert "this is rank 1" in second


def test_processes_that_have_not_joined_a_group_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun, when nobody has called init_process_group."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    vae = kl()
    for start in (lambda: halovae.parallelize(vae), halovae.sharded):
        with pytest.raises(
            InputError, match=r"2 processes were started .*: call torch\.distributed\.init_process_group"
        ):
            start()
    halovae.optimize(vae).restore()


def two_groups(rank: int) -> None:
    """Each rank is in two groups, and two threads use them at once, each for its own VAE."""
    groups = [dist.new_group(list(range(dist.get_world_size()))) for _ in range(2)]
    vaes, inputs = [kl(seed=seed) for seed in range(2)], [latents(seed=5), latents(seed=6)]
    expected = [vae.decode(z)[0] for vae, z in zip(vaes, inputs, strict=True)]
    found: list[Any] = [None, None]
    handles = [halovae.parallelize(vae, group, verify=False) for vae, group in zip(vaes, groups, strict=True)]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[i] = vaes[i].decode(inputs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in (range(2) if rank == 0 else (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle, one, other in zip(handles, found, expected, strict=True):
        handle.restore()
        assert error(one, other) <= EXACT


def test_two_groups_at_once(two_ranks: Ranks) -> None:
    two_ranks.run(two_groups)


def disjoint_groups(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    vae, z = kl(), latents(seed=rank // 2)
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae, groups[rank // 2]):
        assert error(vae.decode(z)[0], expected) <= EXACT


def test_two_disjoint_groups_at_once(four_ranks: Ranks) -> None:
    four_ranks.run(disjoint_groups)


def meshes(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vae"))
    with halovae.parallelize(vae, grid["vae"]) as handle:
        assert error(vae.decode(z)[0], expected) <= EXACT
        assert "of 2" in repr(handle)
    with raises(InputError, r"2-dimensional DeviceMesh: pass one of its dimensions"):
        halovae.parallelize(vae, grid)


def test_a_dimension_of_a_device_mesh(four_ranks: Ranks) -> None:
    four_ranks.run(meshes)


def one_vae_two_threads(rank: int) -> None:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(vae.decode(z)[0])

    with halovae.parallelize(vae, verify=False):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    assert all(error(one, expected) <= EXACT for one in found)


def test_threads_that_share_a_vae_take_turns(two_ranks: Ranks) -> None:
    two_ranks.run(one_vae_two_threads)


# ---- gather ----------------------------------------------------------------------------------------------------------


def gathers(rank: int, axis: Any) -> list[tuple[Tensor, dict[str, tuple[int, int]]]]:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    outcomes: list[tuple[Tensor, dict[str, tuple[int, int]]]] = []
    for gather in ("all", "first", "shard"):
        with halovae.parallelize(vae, axis=axis, gather=gather, verify=False) as handle:
            result = vae.decode(z).sample
            assert handle.last is not None
            (top, bottom), (left, right) = extents = handle.last.extents["height"], handle.last.extents["width"]
            outcomes.append((result, dict(zip(("height", "width"), extents, strict=True))))
            if gather == "all" or (gather == "first" and rank == 0):
                assert error(result, expected) <= EXACT
            elif bottom > top:
                assert error(result, expected[..., top:bottom, left:right]) <= EXACT
            else:
                assert result.shape == (2, 3, 0, 0)
    return outcomes


@pytest.mark.parametrize("axis", ["height", "width", (2, 2), (1, 3)])
def test_who_holds_the_output(four_ranks: Ranks, axis: Any) -> None:
    per_rank = four_ranks.run(gathers, axis)
    _, _, shards = zip(*per_rank, strict=True)
    covered = torch.zeros(40, 56)
    for _, extents in shards:
        covered[slice(*extents["height"]), slice(*extents["width"])] += 1
    assert bool((covered == 1).all())


# ---- disagreements and bad input -------------------------------------------------------------------------------------
