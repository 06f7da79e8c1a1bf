"""`mode="auto"` when memory runs out on one rank: all go on together in a way that takes less, or all fail."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, prod
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import FAMILIES, run_decode
from pictures import raises
from ranks import Ranks
from tiles import CUTS, run_alone, strides
from torch import Tensor

import halovae
from halovae.api import auto
from halovae.base.errors import RankFailedError
from halovae.calls.randomness import rewound_by_failure
from halovae.comm.agreement import one_call
from halovae.exact.layout import shape_of
from halovae.exact.run import GroupRun
from halovae.tiles.tile_settings import applied

CUT = CUTS["wan21"]
"""A picture of 96 x 96 in tiles of 64 x 64."""


def allocate_too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def fail_otherwise(*drawn: Tensor) -> None:
    raise ValueError("the weather is bad")


@contextmanager
def watched(vae: Any, watch: Callable[[int], None]) -> Iterator[None]:
    """Within it, `watch` hears how many bytes each submodule of the decoder gets."""

    def hook(module: Any, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and not args[0].is_meta:
            watch(prod(shape_of(args[0])) * args[0].itemsize)  # of the shard: a network is told of the picture

    handles = [module.register_forward_pre_hook(hook) for module in vae.decoder.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def limited(vae: Any, limit: float, action: Callable[[], None] = allocate_too_much) -> Any:
    """Within it, submodules of the decoder that get more than `limit` bytes act."""
    return watched(vae, lambda count: action() if count > limit else None)


def largest(vae: Any, run: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that a submodule gets in an un-parallel run."""
    seen: list[int] = []
    with watched(vae, seen.append):
        run()
    return max(seen)


def last(handle: halovae.Handle) -> Any:
    return handle.last


def to_tiles(rank: int) -> list[str]:
    vae, latent = CUT.build(), CUT.picture("decode")
    expected = run_alone(CUT, vae, "decode", latent)
    vae.use_tiling = False
    # A tile of 64 x 64 is less than half of the picture, which a shard has.
    limit = 0.47 * largest(vae, lambda: run_decode(CUT.family, vae, latent)) if rank == 1 else inf
    with halovae.parallelize(vae, mode="auto", axis="height", verify=False) as handle:
        with limited(vae, limit):
            first = run_decode(CUT.family, vae, latent)
        told = [last(handle).mode, last(handle).choice]
        again = run_decode(CUT.family, vae, latent)
        assert last(handle).choice == told[1]
    assert torch.equal(first, expected)
    assert torch.equal(again, expected)
    return told


def test_exact_mode_gives_way_to_tiles(two_ranks: Ranks) -> None:
    for mode, words in two_ranks.run(to_tiles):
        assert mode == "tile"
        assert words.startswith("tile: exact was too large for rank 1 (RuntimeError: ")
        assert "can't allocate memory" in words


def to_smaller_tiles(rank: int) -> list[Any]:
    vae, latent = CUT.build(), CUT.picture("decode")
    vars(vae).update(strides(96, 72))
    failures = iter([allocate_too_much] * 2 if rank == 0 else [])
    too_large = limited(vae, 0, lambda: next(failures, int)())
    with halovae.parallelize(vae, mode="auto", verify=False) as handle, too_large:
        found = run_decode(CUT.family, vae, latent)
    size = int(last(handle).tile_sizes.split()[2])
    with applied(vae, strides(size, size - 24)):
        assert torch.equal(found, run_alone(CUT, vae, "decode", latent))
    return [size, last(handle).choice]


def test_tiles_give_way_to_smaller_ones(two_ranks: Ranks) -> None:
    for size, words in two_ranks.run(to_smaller_tiles):
        assert size < 96
        assert words.startswith("smaller tiles: tile was too large for rank 0 (RuntimeError: ")


def to_idle_ranks(rank: int) -> list[Any]:
    family = FAMILIES["asymmetric"]  # It has no tiles.
    vae, latent = family.build(), family.latent()
    expected = run_decode(family, vae, latent)
    limit = 0.75 * largest(vae, lambda: run_decode(family, vae, latent))
    with halovae.parallelize(vae, mode="auto", axis="height", size=1, verify=False) as handle:
        with limited(vae, limit):
            assert torch.allclose(run_decode(family, vae, latent), expected, atol=1e-4)
        return [last(handle).shape, last(handle).choice]


def test_idle_ranks_help(two_ranks: Ranks) -> None:
    for shape, words in two_ranks.run(to_idle_ranks):
        assert shape[0] * shape[1] == 2
        assert words.startswith("exact on all ranks: exact was too large for rank 0 (RuntimeError: ")


def to_single_steps(rank: int) -> list[Any]:
    vae, latent = CUT.build(), torch.cat([CUT.picture("decode")] * 3, 2)[:, :, :5]
    vae.use_tiling = False
    expected = run_decode(CUT.family, vae, latent)
    # Of the whole picture and one frame: a shard has half of that, and three times as much in merged steps.
    limit = 1.2 * largest(vae, lambda: run_decode(CUT.family, vae, latent)) if rank else inf
    with halovae.parallelize(vae, mode="auto", options=halovae.Options(frames_per_call=3), verify=False) as handle:
        run_decode(CUT.family, vae, latent)
        told = [last(handle).steps]
        with limited(vae, limit):
            found = run_decode(CUT.family, vae, latent)
    assert torch.allclose(found, expected, atol=1e-4)
    return [*told, last(handle).steps, last(handle).choice]


def test_several_steps_give_way_to_single_ones(two_ranks: Ranks) -> None:
    for before, after, words in two_ranks.run(to_single_steps):
        assert max(before) == 3
        assert after == ()
        assert words.startswith("exact step by step: exact was too large for rank 1 (RuntimeError: ")


def to_the_end(rank: int, spoiler: int) -> None:
    """Every way is too large for rank 1; `spoiler` fails otherwise. The next call is right."""
    vae, latent = CUT.build(), CUT.picture("decode")
    with halovae.parallelize(vae, mode="auto", verify=False) as handle:
        limit = 0 if rank in (1, spoiler) else inf
        action = fail_otherwise if rank == spoiler else allocate_too_much
        kind, text = (RankFailedError, "rank .* failed: .*(can't allocate memory|the weather)")
        if rank in (1, spoiler):
            kind, text = (Exception, "can't allocate memory|the weather is bad|rank .* failed")
        with limited(vae, limit, action), raises(kind, text):
            run_decode(CUT.family, vae, latent)
        found = run_decode(CUT.family, vae, latent)
        assert last(handle).mode == ("tile" if spoiler < 0 else "exact")
    if spoiler < 0:
        assert torch.equal(found, run_alone(CUT, vae, "decode", latent))


def test_after_the_last_way_all_fail(two_ranks: Ranks) -> None:
    two_ranks.run(to_the_end, -1)


@pytest.mark.parametrize("spoiler", [0, 1])
def test_other_failures_are_raised_at_once(two_ranks: Ranks, spoiler: int) -> None:
    two_ranks.run(to_the_end, spoiler)


def in_streams(rank: int) -> None:
    """One rank runs out of memory, and the others may have handed out the piece already: all do the same."""
    vae, latent = CUT.build(), torch.cat([CUT.picture("decode")] * 3, 2)[:, :, :3]
    tiled = run_alone(CUT, vae, "decode", latent)
    vae.use_tiling = False
    gather_part = GroupRun.gather_part

    def short_at(piece: int) -> Any:
        """Within it, the second rank can't hold a piece that all have put together."""
        pieces = iter(range(1, 99))

        def run_out(work: GroupRun, part: Tensor | None) -> Tensor:
            found = gather_part(work, part)
            if rank == 1 and next(pieces) == piece:
                allocate_too_much()
            return found

        return patch.object(GroupRun, "gather_part", run_out)

    with halovae.parallelize(vae, mode="auto", axis="height", verify=False) as handle:
        whole = run_decode(CUT.family, vae, latent)
        for piece in (1, 2):
            with short_at(piece), handle.decode_stream(latent) as stream:
                got = 0
                with raises(RuntimeError, "can't allocate memory"):
                    for _ in stream:
                        got += 1
            assert got == piece - rank
            assert torch.equal(torch.cat([*handle.decode_stream(latent)], 2), whole)
            assert last(handle).choice == "exact: it gives the un-tiled result"
        comm: Any = handle._comm
        assert not comm._link._forgone

        # Before any rank has a piece, it is not too late for another way.
        failures = iter([allocate_too_much] if rank == 1 else [])
        with limited(vae, 0, lambda: next(failures, int)()):
            assert torch.equal(torch.cat([*handle.decode_stream(latent)], 2), tiled)
        assert last(handle).choice.startswith("tile: exact was too large for rank 1 (RuntimeError: ")


def test_streams_give_way_as_long_as_no_piece_is_out(two_ranks: Ranks) -> None:
    two_ranks.run(in_streams)


def with_little_left(rank: int) -> None:
    """What the failed attempt held is gone before the arguments are cast anew; where that fails too, all fail."""
    vae, latent = CUT.build(), CUT.picture("decode")
    dtype = {"decode": torch.float64}
    seen, alive = list[Any](), list[bool]()
    with halovae.parallelize(vae, mode="auto", axis="height", verify=False, dtype=dtype) as handle:
        expected = run_decode(CUT.family, vae, latent)
        given, is_short = handle._dtypes.given, iter([False, rank == 1])

        def see(module: Any, args: Any) -> None:
            seen.append(weakref.ref(args[0]))

        def watch(*args: Any) -> Any:
            alive.extend(ref() is not None for ref in seen)
            if next(is_short, False):
                allocate_too_much()
            return given(*args)

        with patch.object(handle._dtypes, "given", watch):
            first = vae.decoder.conv_in.register_forward_pre_hook(see)
            later = vae.decoder.mid_block.register_forward_pre_hook(lambda *_: allocate_too_much())
            with raises(RuntimeError, "can't allocate memory"):
                run_decode(CUT.family, vae, latent)
            first.remove()
            later.remove()
        assert alive
        assert not any(alive)
        assert torch.equal(run_decode(CUT.family, vae, latent), expected)
        assert last(handle).choice == "exact: it gives the un-tiled result"


def test_a_retreat_needs_no_memory_that_the_attempt_still_holds(two_ranks: Ranks) -> None:
    two_ranks.run(with_little_left)


@contextmanager
def then_interrupted(comm: Any) -> Iterator[None]:
    with one_call(comm):
        yield
    raise KeyboardInterrupt


def interrupted(rank: int, moment: str) -> None:
    """Ctrl-C on one rank while all choose a way, or look for one that takes less. The next call is right on both."""
    vae, latent = CUT.build(), CUT.picture("decode")
    expected = run_decode(CUT.family, vae, latent)
    stopped = {
        "in a choice": patch.object(auto, "Choice", side_effect=KeyboardInterrupt),
        "early in a retreat": patch.object(auto.AutoEngine, "_leaner", side_effect=KeyboardInterrupt),
        "late in a retreat": patch.object(auto, "one_call", then_interrupted),
    }[moment]
    with halovae.parallelize(vae, mode="auto", axis="height", verify=False):
        if moment != "in a choice":
            run_decode(CUT.family, vae, latent)
        failures = iter([allocate_too_much] if rank == 0 else [])
        with limited(vae, 0, lambda: next(failures, int)()):
            if rank:
                with stopped, pytest.raises(KeyboardInterrupt):
                    run_decode(CUT.family, vae, latent)
            elif moment != "late in a retreat":
                with raises(Exception, "can't allocate memory|KeyboardInterrupt"):
                    run_decode(CUT.family, vae, latent)
                next(failures, None)
            # Else the first rank makes its call once more, and the other one comes to it with its next call.
            assert torch.allclose(run_decode(CUT.family, vae, latent), expected, atol=1e-4)
        assert torch.allclose(run_decode(CUT.family, vae, latent), expected, atol=1e-4)


@pytest.mark.parametrize("moment", ["in a choice", "early in a retreat", "late in a retreat"])
def test_who_is_interrupted_goes_on_with_the_others(two_ranks: Ranks, moment: str) -> None:
    two_ranks.run(interrupted, moment)


def test_alone() -> None:
    vae, latent = CUT.build(), CUT.picture("decode")
    expected = run_alone(CUT, vae, "decode", latent)
    vae.use_tiling = False
    limit = 0.75 * largest(vae, lambda: run_decode(CUT.family, vae, latent))
    with halovae.parallelize(vae, mode="auto") as handle:
        with limited(vae, limit):
            assert torch.equal(run_decode(CUT.family, vae, latent), expected)
        assert last(handle).choice.startswith("tile: exact was too large for rank 0")


def test_what_a_failed_attempt_drew_is_drawn_again() -> None:
    given = torch.Generator().manual_seed(3)
    before = torch.get_rng_state(), given.get_state()
    with pytest.raises(ValueError, match="weather"), rewound_by_failure(torch.device("cpu"), given):
        fail_otherwise(torch.rand(1), torch.rand(1, generator=given))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(given.get_state(), before[1])


@torch.no_grad()
def test_autocast_makes_a_picture_of_another_number_format_right() -> None:
    vae, latent = FAMILIES["kl"].build().float(), FAMILIES["kl"].latent().bfloat16()
    refusals = iter([halovae.NotExactError("an operator can't be sharded")])

    def refuse(module: Any, args: Any) -> None:
        if not args[0].is_meta and (refusal := next(refusals, None)):
            raise refusal

    vae.decoder.register_forward_pre_hook(refuse)
    with halovae.parallelize(vae, mode="auto", verify=False) as handle, torch.autocast("cpu", torch.bfloat16):
        vae.decode(latent)
        assert last(handle).mode == "tile"
