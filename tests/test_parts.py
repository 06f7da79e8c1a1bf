"""Clips that come in parts: the pieces are one call bit for bit, whatever the parts are; all ranks end alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, run_decode, run_encode, run_half
from family_table import PIECES
from ranks import Ranks

import halovae

Build = tuple[Any, torch.Tensor, torch.Tensor]


def build(name: str, frames: int, latents: int) -> Build:
    """A VAE, a clip and latents that are no still picture."""
    family = FAMILIES[name]
    sample, latent = family.sample(torch.float64), family.latent(torch.float64)
    contrast = 1 + 0.1 * torch.arange(100, dtype=torch.float64).view(-1, 1, 1)
    made = [
        torch.cat([tensor] * max(1, -(-count // tensor.shape[2])), 2)[:, :, :count] * contrast[:count]
        for tensor, count in ((sample, frames), (latent, latents))
    ]
    return family.build().to(torch.float64), made[0] / 4, made[1]


def parameters(piece: Any) -> torch.Tensor:
    value = piece[0]
    return value if torch.is_tensor(value) else value.parameters


def streams(rank: int, name: str, frames: int, latents: int, count: bool) -> list[list[int]]:
    """Both halves from iterators with parts of uneven length; frames of each piece."""
    vae, clip, latent = build(name, frames, latents)
    found: list[list[int]] = []
    with halovae.parallelize(vae, untiled=True, verify=False) as handle:
        moments = run_encode(vae, clip)
        given = {"count": frames} if count else {}
        pieces = [parameters(piece) for piece in handle.encode_stream(clip.split(3, 2), **given)]
        assert handle.last
        assert handle.last.pieces == len(pieces)
        assert torch.equal(torch.cat(pieces, 2), moments)
        found.append([piece.shape[2] for piece in pieces])
        if not latents:  # Exact mode refuses this half.
            return [*found, []]
        video = run_decode(FAMILIES[name], vae, latent)
        given = {"count": latents} if count else {}
        pieces = list(handle.decode_stream(iter(latent.split(2, 2)), **given))
        assert torch.equal(torch.cat(pieces, 2), video)
        found.append([piece.shape[2] for piece in pieces])
    return found


ALONE = (
    "qwenimage", "wan22", "mochi", "kvae_video", "kandinsky6_sr",
    "hunyuan_video_framewise", "minimax_h3",
)  # fmt: skip
"""In a world of one: their caches are kept as those of the others are, or they have none. `test_stream` has them on
shards, `test_tile_stream` the last one on ranks."""


@pytest.mark.parametrize("name", [name for name in PIECES if name in FAMILIES])
def test_parts_are_one_call(two_ranks: Ranks, name: str) -> None:
    *given, encoded, decoded = PIECES[name]
    found = [streams(0, name, *given)] if name in ALONE else two_ranks.run(streams, name, *given)
    assert all(pieces == [encoded, decoded] for pieces in found)


def joined(rank: int) -> list[Any]:
    """Steps that go together in a call do so in parts: from the same ones on, and so with the same bits."""
    vae, clip, latent = build("wan21", 33, 9)
    found: list[Any] = []
    with halovae.parallelize(vae, verify=False, options=halovae.Options(frames_per_call=3)) as handle:
        for half, given in (("encode", clip), ("decode", latent)):
            whole = run_half("wan21", vae, half, given)
            assert handle.last
            found.append(handle.last.steps)
            pieces, steps = list[torch.Tensor](), list[Any]()
            for piece in getattr(handle, f"{half}_stream")(given.split(2, 2)):
                pieces.append(parameters(piece) if half == "encode" else piece)
                steps.append((pieces[-1].shape[2], handle.last.steps))
            assert torch.equal(torch.cat(pieces, 2), whole)
            found.append(steps)
            with handle.session() as session:
                parts = given.split([5, 12, 16] if half == "encode" else [2, 3, 4], 2)
                pieces = [parameters(getattr(session, half)(part)) for part in parts]
                assert torch.equal(torch.cat(pieces, 2), whole)
                found.append(handle.last.steps)
    return found


def test_steps_go_together(two_ranks: Ranks) -> None:
    steps = (1, 1, 3, 3, 1)
    encoded = [(1, ()), (1, ()), (3, (3,)), (3, (3,)), (1, ())]
    decoded = [(1, ()), (4, ()), (12, (3,)), (12, (3,)), (4, ())]
    for found in two_ranks.run(joined):
        assert found == [steps, encoded, (3, 1), steps, decoded, (3, 1)]


def sessions(rank: int) -> None:
    """Two at once, calls in between, other sizes, the limit; memory that does not grow."""
    vae, clip, latent = build("wan21", 16, 10)
    with halovae.parallelize(vae, verify=False, axis="height", options=halovae.Options(sessions=2)) as handle:
        video, other = (run_decode(FAMILIES["wan21"], vae, value) for value in (latent, latent.flip(2)[:, :, :4]))
        moments = run_encode(vae, clip)
        with handle.session() as one, handle.session() as two:
            found: list[list[torch.Tensor]] = [[], []]
            held: list[int] = []
            for at in range(0, 10, 2):
                found[0].append(one.decode(latent[:, :, at : at + 2]).sample)
                if at < 4:
                    found[1].append(two.decode(latent.flip(2)[:, :, at : at + 2]).sample)
                held.append(one.state_bytes)
                if at == 4:
                    assert torch.equal(run_decode(FAMILIES["wan21"], vae, latent[:, :, :2]), video[:, :, :5])
            assert torch.equal(torch.cat(found[0], 2), video)
            assert torch.equal(torch.cat(found[1], 2), other)
            assert held[-1] == held[2] > 0
            # Frames that are too few for a step wait for those that follow.
            parts = [two.encode(part) for part in clip.split((5, 2, 4, 5), 2)]
            assert parts[1] is None
            assert torch.equal(torch.cat([parameters(part) for part in parts if part], 2), moments)
            with pytest.raises(halovae.InputError, match="one clip has one size"):
                one.decode(latent[..., :-1])
            with pytest.raises(halovae.InputError, match="2 sessions are open"):
                handle.session()
        assert one.state_bytes == 0
        with pytest.raises(halovae.InputError, match="session 1 is closed"):
            one.decode(latent)
        lost = [handle.session(), handle.session()]
        del lost  # Nobody can close them any more.
        three = handle.session()
    with pytest.raises(halovae.InputError, match="is closed"):
        three.decode(latent)
    vae, _, latent = build("cogvideox", 9, 5)
    with halovae.parallelize(vae, verify=False) as handle, handle.session() as four:
        parts = [four.decode(part).sample for part in latent[:, :, :4].split(2, 2)]
        assert torch.equal(torch.cat(parts, 2), run_decode(FAMILIES["cogvideox"], vae, latent[:, :, :4]))
        with pytest.raises(halovae.InputError, match="can't go on with 1 frames"):
            four.decode(latent[:, :, 4:])


def test_a_session_goes_on_as_one_call(two_ranks: Ranks) -> None:
    two_ranks.run(sessions)


def ends(rank: int) -> None:
    """Iterators that differ, raise, or yield what can't be used, and streams that are left, one after the other."""
    vae, clip, _ = build("wan21", 13, 2)
    expected = run_encode(vae, clip)

    def broken() -> Iterator[torch.Tensor]:
        yield clip[:, :, :6]
        if rank:
            raise OSError("the disk is gone")
        yield clip[:, :, 6:]

    with halovae.parallelize(vae, verify=False, axis="height") as handle:

        def works() -> None:
            pieces = [parameters(piece) for piece in handle.encode_stream(clip)]
            assert [piece.shape[2] for piece in pieces] == [1, 1, 1, 1]
            assert torch.allclose(torch.cat(pieces, 2), expected, rtol=0, atol=1e-5)

        def fails(error: Any, match: str, frames: Any, **given: Any) -> None:
            with pytest.raises(error, match=match) as raised:
                list(handle.encode_stream(frames, **given))
            assert "\n" not in str(raised.value).splitlines()[0]

        fails(OSError if rank else halovae.RankFailedError, "the disk is gone", broken())
        works()
        fails(halovae.DisagreementError, "ranks disagree", clip[:, :, : 5 if rank else 13].split(2, 2))
        fails(halovae.DisagreementError, "ranks disagree", [clip[:, :, : 9 if rank else 13]])
        fails(halovae.InputError, "one clip has one size", [clip[:, :, :5], clip[:, :, 5:, :-8]])
        fails(halovae.InputError, "got no frames", [])
        fails(halovae.InputError, "got 13 frames, but count is 20", [clip], count=20)
        fails(halovae.InputError, "but count is 9", [clip], count=9)
        fails(halovae.InputError, "got a int", [3])
        fails(halovae.InputError, "got a tensor of shape", [clip[0]])
        with handle.session() as session:
            for make in (lambda frames: list(handle.encode_stream(frames)), session.encode):
                with pytest.raises(halovae.InputError, match=r"takes no 2 channels, on one rank either: use 3$"):
                    make(clip[:, :2])
                with pytest.raises(halovae.InputError, match=r"use float64, as its weights are$"):
                    make(clip.float())
        with pytest.raises(halovae.InputError, match="count is 0"):
            handle.encode_stream([clip], count=0)
        works()

        read = iter(clip.split(1, 2))
        with handle.encode_stream(read) as stream:  # One leaves, the others go on.
            for number, _ in enumerate(stream):
                if rank and number == 1:
                    break
        assert sum(1 for _ in read) == 8 - 4 * (1 - rank)  # Nothing is read ahead.
        works()
        failing = pytest.raises(OSError if rank else halovae.RankFailedError, match="no space left")
        with failing, handle.encode_stream([clip]) as stream:
            next(stream)
            if rank:
                raise OSError("no space left")
            next(stream)
        works()
        stream = handle.encode_stream([clip])
        next(stream)
        assert torch.allclose(run_encode(vae, clip), expected, rtol=0, atol=1e-5)  # A call in between.
        next(stream)
    stream.close()
    assert not list(stream)


def test_parts_end_alike_on_all_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(ends)
