"""Streams and sessions in tiles: the pieces are one call bit for bit, on ranks that have unlike numbers of tiles."""

from __future__ import annotations

import functools
from itertools import islice
from typing import Any

import pytest
import torch
from family_table import IN_TILES
from ranks import Ranks
from tiles import CUTS, Cut, tensor_of

import halovae
from halovae.base.memory import allocated_by
from halovae.tiles import batches


def build(cut: Cut, half: str, count: int, settings: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """A VAE, and a clip that is no still picture."""
    vae, picture = cut.build(), cut.picture(half, cut.size * 2 // 3, cut.size)
    vae.enable_tiling()
    vars(vae).update(cut.settings | settings)
    clip = torch.cat([picture] * (count // picture.shape[2] + 1), 2)[:, :, :count]
    return vae, clip * (1 + 0.1 * torch.arange(count).view(-1, 1, 1)) / 4


def streams(rank: int, name: str) -> tuple[list[int], bool]:
    """Frames of each piece of a tensor and of an iterator, and whether they are one call."""
    (count, settings, expected), cut = IN_TILES[name], CUTS[name]
    vae, clip = build(cut, "decode", count, settings)
    kwargs = cut.family.decode_kwargs(clip)
    with torch.no_grad(), halovae.parallelize(vae, mode="tile", gather="first") as handle:
        whole = vae.decode(clip, **kwargs)[0]
        pieces = list(handle.decode_stream(clip, **kwargs))
        assert handle.last
        assert handle.last.pieces == len(pieces) == len(expected)
        assert handle.last.mode == "tile"
        parts = list(handle.decode_stream(clip.split(2, 2), count=count, **kwargs)) if name in ("wan21", "ltx") else []
    if rank > 0:
        assert all(piece.shape[-2:] == (0, 0) for piece in pieces) or len(pieces) == 1
        return [piece.shape[2] for piece in pieces], True
    equal = torch.equal(torch.cat(pieces, 2), whole) and (not parts or torch.equal(torch.cat(parts, 2), whole))
    return [piece.shape[2] for piece in pieces], equal


@pytest.mark.parametrize("name", [name for name in IN_TILES if name in CUTS])
def test_pieces_are_one_call(two_ranks: Ranks, three_ranks: Ranks, name: str) -> None:
    """Ranks with unlike numbers of tiles come with the first two: how tiles are divided asks no VAE."""
    for frames, equal in (three_ranks if name in ("wan21", "ltx") else two_ranks).run(streams, name):
        assert frames == IN_TILES[name][-1]
        assert equal


@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
@torch.no_grad()
def test_what_a_stage_leaves_for_the_next_is_not_batched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where equal tiles go together in one call: not those whose caches go on."""
    monkeypatch.setattr(batches, "_by_itself", lambda device: False)
    monkeypatch.setattr(batches.Batches, "_seconds", lambda self, run: (run(), 1.0)[1])
    (count, settings, _), cut = IN_TILES[name], CUTS[name]
    vae, clip = build(cut, "decode", count, settings)
    kwargs = cut.family.decode_kwargs(clip)
    with halovae.parallelize(vae, mode="tile") as handle:
        whole = vae.decode(clip, **kwargs)[0]
        pieces = list(handle.decode_stream(clip, **kwargs))
    assert len(pieces) > 1
    assert torch.equal(torch.cat(pieces, 2), whole)


def test_memory_does_not_grow_with_the_clip() -> None:
    """What a call takes does: it holds the results of all tiles until the last of them."""
    peaks: dict[tuple[int, bool], int] = {}
    vae, clip = build(CUTS["minimax_h3"], "decode", 77, {})
    with torch.no_grad(), halovae.optimize(vae) as handle:
        engine: Any = handle._engine
        for count in (22, 77):
            latent = clip[:, :, :count]
            for emit in (None, lambda frames: None):
                run = functools.partial(engine.run, "decode", latent, (latent,), {}, emit)
                run()
                peaks[count, emit is None] = allocated_by(run, torch.device("cpu"))
    assert peaks[77, False] < 1.1 * peaks[22, False]
    assert peaks[77, False] < 0.4 * peaks[77, True]


def goes_on(rank: int) -> None:
    """A clip that is encoded while it is read, sessions, streams that are left or fail; one handle each."""
    vae, clip = build(CUTS["minimax_h3"], "encode", 22, {})
    with torch.no_grad(), halovae.parallelize(vae) as handle:
        moments = tensor_of(vae.encode(clip))
        pieces = [tensor_of(piece) for piece in handle.encode_stream(clip.split(6, 2))]
        assert [piece.shape[2] for piece in pieces] == [2, 5]
        assert torch.equal(torch.cat(pieces, 2), moments)

    vae, clip = build(CUTS["wan21"], "decode", 4, {})
    with torch.no_grad(), halovae.parallelize(vae, mode="tile") as handle:
        video = vae.decode(clip).sample
        with handle.session() as session:
            parts = [session.decode(part).sample for part in clip.split(2, 2)]
            assert torch.equal(torch.cat(parts, 2), video)
            assert session.state_bytes > clip[:, :, :1].nbytes  # Caches of this rank's tiles.

        with handle.decode_stream(clip) as stream:  # One leaves, the others go on.
            assert len(list(islice(stream, 1 if rank else None))) == (1 if rank else 2)
        assert torch.equal(vae.decode(clip).sample, video)

        def refuse(module: Any, args: Any) -> None:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 3:
                raise ValueError("no third tile")

        calls = 0
        hook = vae.decoder.register_forward_pre_hook(refuse)
        with pytest.raises(ValueError if rank == 1 else halovae.RankFailedError, match="no third tile"):
            list(handle.decode_stream(clip))
        hook.remove()
        assert torch.equal(torch.cat(list(handle.decode_stream(clip)), 2), video)


def test_clips_go_on_and_end_alike_on_all_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(goes_on)
