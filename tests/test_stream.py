"""Streams: the pieces are one call bit for bit, on several ranks, in any mode; they end alike on all ranks."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from families import FAMILIES, run_decode
from ranks import Ranks
from tiles import CUTS

import halovae
from halovae.base.memory import allocated_by

WALKS = {
    "wan21": [1, 4, 4],
    "wan22": [1, 4, 4],
    "qwenimage": [1, 4, 4],
    "cogvideox": [9, 8],
    "magvit": [1, 4, 4],
    "kvae_video": [17, 8],
    "hunyuan_video_framewise": [14, 7],
    "kandinsky6_sr": [17, 4],
}
"""Frames of each piece."""
WHOLE = ("vidtok", "mochi", "ltx", "cosmos")


def latents(name: str, frames: int | None = None) -> torch.Tensor:
    latent = FAMILIES[name].latent(torch.float64)
    return (
        latent if frames is None else latent[:, :, :1].repeat(1, 1, frames, 1, 1) + torch.arange(frames).view(-1, 1, 1)
    )


def stream_of(name: str, vae: Any, handle: halovae.Handle, latent: torch.Tensor) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(handle.decode_stream(latent, **FAMILIES[name].decode_kwargs(latent)))


def pieces_on_ranks(rank: int, name: str, **options: Any) -> tuple[list[int], bool, int]:
    """Frames of each piece, whether they are one call of ours, and what the report says."""
    vae, latent = FAMILIES[name].build().to(torch.float64), latents(name)
    with halovae.parallelize(vae, untiled=True, verify=False, **options) as handle:
        whole = run_decode(FAMILIES[name], vae, latent)
        pieces = stream_of(name, vae, handle, latent)
        last = handle.last
        assert last
        assert 0 < last.first_seconds <= last.seconds
        return [piece.shape[2] for piece in pieces], torch.equal(torch.cat(pieces, 2), whole), last.pieces


@pytest.mark.parametrize("name", [name for name in (*WALKS, *WHOLE) if name in FAMILIES])
def test_pieces_are_one_call(two_ranks: Ranks, name: str) -> None:
    for frames, is_equal, pieces in two_ranks.run(pieces_on_ranks, name):
        assert is_equal
        assert pieces == len(frames)
        assert frames == WALKS.get(name, frames)
        assert len(frames) == 1 or name in WALKS


def test_frames_that_are_blended_in_time() -> None:
    """Each piece is made of two calls, and what the VAE writes into one result is not there for the next piece."""
    family = FAMILIES["ltx"]
    vae, latent = family.build().to(torch.float64), latents("ltx", 5)
    vae.use_framewise_decoding, vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = True, 16, 8
    with halovae.optimize(vae) as handle:
        whole = run_decode(family, vae, latent)
        pieces = list(handle.decode_stream(latent))
    assert [piece.shape[2] for piece in pieces] == [10, 8, 15]
    assert torch.equal(torch.cat(pieces, 2), whole)


def test_frames_that_are_cropped_at_the_beginning() -> None:
    """The VAE leaves out the first frames of whatever it joins: so later pieces come with blank ones before them."""
    vae, latent = FAMILIES["mochi"].build().to(torch.float64), latents("mochi", 5)
    vae.use_framewise_decoding = True
    with halovae.optimize(vae) as handle:
        whole = run_decode(FAMILIES["mochi"], vae, latent)
        for given in (latent, iter(latent.split(1, 2))):
            pieces = list(handle.decode_stream(given))
            assert [piece.shape[2] for piece in pieces] == [7, 12, 6]
            assert torch.equal(torch.cat(pieces, 2), whole)


@pytest.mark.parametrize("name", ["allegro_tiled", "hunyuan_video15", "ltx", "wan21"])
def test_tiles_that_do_not_stream_are_one_piece(name: str) -> None:
    """Their VAE makes all frames at once, or tiles are chosen for a whole clip."""
    cut = CUTS[name]
    vae, latent = cut.build(), cut.picture("decode")
    fit = halovae.Options(tiles="fit" if name == "wan21" else "own")
    with torch.no_grad(), halovae.parallelize(vae, mode="tile", options=fit) as handle:
        whole = run_decode(cut.family, vae, latent)
        for given in (iter(latent.split(1, 2)), *([] if name == "wan21" else [latent])):
            [piece] = handle.decode_stream(given)
            assert torch.equal(piece, whole)
            assert handle.last
            assert handle.last.pieces == 1


def ends(rank: int) -> None:
    """Streams that end early, fail, or are in the way of other calls, one after the other on one handle."""
    vae, latent = FAMILIES["wan21"].build().to(torch.float64), latents("wan21")
    expected = run_decode(FAMILIES["wan21"], vae, latent)

    def works(handle: halovae.Handle) -> None:
        assert torch.allclose(run_decode(FAMILIES["wan21"], vae, latent), expected, rtol=0, atol=1e-5)
        assert [piece.shape[2] for piece in handle.decode_stream(latent)] == [1, 4, 4]
        assert not vae._feat_map or not any(isinstance(kept, torch.Tensor) for kept in vae._feat_map)

    with halovae.parallelize(vae, verify=False, axis="height") as handle:
        for given, named in (((), {"z": latent}), ((latent, False), {})):
            assert [piece.shape[2] for piece in handle.decode_stream(*given, **named)] == [1, 4, 4]

        for frames in handle.decode_stream(latent):  # All leave the loop.
            assert frames.shape[2] == 1
            break
        del frames
        assert handle.last
        assert handle.last.pieces == 2  # The second one was made ahead.
        works(handle)

        with handle.decode_stream(latent) as stream:  # One leaves, the others go on.
            assert len(list(islice(stream, 1 if rank else None))) == (1 if rank else 2)
        works(handle)

        with handle.decode_stream(latent) as stream:  # Another call in between.
            next(stream)
            with pytest.raises(halovae.InputError, match="a stream of this handle is open"):
                vae.decode(latent)
            with pytest.raises(halovae.InputError, match="a stream of this handle is open"):
                next(handle.decode_stream(latent))
        works(handle)

        # Who leaves the block by an exception has failed; the others don't take what there is for all of it.
        failing = pytest.raises(OSError if rank else halovae.RankFailedError, match="no space left")
        with failing, handle.decode_stream(latent) as stream:
            for _ in islice(stream, 2 - rank):
                pass
            if rank:
                raise OSError("no space left")
            next(stream)
        works(handle)

        def refuse(module: Any, args: Any) -> None:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 2:
                raise ValueError("no second step")

        calls = 0
        hook = vae.decoder.register_forward_pre_hook(refuse)
        stream = handle.decode_stream(latent)
        assert next(stream).shape[2] == 1
        with pytest.raises(ValueError if rank else halovae.RankFailedError, match="no second step"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
        hook.remove()
        works(handle)

        with pytest.raises(halovae.DisagreementError, match="arguments"):
            next(handle.decode_stream(latent[:, :, : 2 + rank]))
        with pytest.raises(halovae.InputError, match="no picture"):
            next(handle.decode_stream())
        with pytest.raises(halovae.InputError, match="give an iterable of tensors"):
            handle.encode_stream(None)
        works(handle)
        stream = handle.decode_stream(latent)
        next(stream)
    with pytest.raises(halovae.InputError, match="restored while its stream was open"):
        next(stream)  # What came before is not all of it.
    with pytest.raises(StopIteration):
        next(stream)
    assert torch.equal(run_decode(FAMILIES["wan21"], vae, latent), expected)


def test_streams_end_alike_on_all_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(ends)


def unbegun(rank: int, leaver: int) -> None:
    """One rank leaves a stream before it has asked for a piece: before or after the others begin to wait for it."""
    vae, latent = FAMILIES["wan21"].build().to(torch.float64), latents("wan21", 2)
    clip = torch.linspace(-1, 1, 3 * 5 * 48 * 48, dtype=torch.float64).reshape(1, 3, 5, 48, 48)
    expected, is_late = run_decode(FAMILIES["wan21"], vae, latent), False

    def wait(leaves: bool) -> None:
        if leaves is is_late:
            time.sleep(0.2)

    with halovae.parallelize(vae, verify=False, axis="height") as handle:

        def left_by(leave: Callable[[Any], None], words: str = "") -> None:
            nonlocal is_late
            for make in (
                lambda: handle.decode_stream(latent),
                lambda: handle.decode_stream(latent.split(1, 2)),
                lambda: handle.encode_stream([clip]),
            ):
                is_late = not is_late
                wait(rank == leaver)
                if rank == leaver:
                    leave(make())
                elif words:
                    with pytest.raises(halovae.RankFailedError, match=words), make() as stream:
                        next(stream)
                else:
                    assert list(make()) == []
                if is_late:  # Else the others come to the next stream with nothing in between.
                    assert torch.allclose(run_decode(FAMILIES["wan21"], vae, latent), expected, rtol=0, atol=1e-5)

        def fail(stream: Any) -> None:
            with pytest.raises(OSError, match="no space left"), stream:
                raise OSError("no space left")

        left_by(lambda stream: stream.close())
        left_by(fail, "no space left")
        with pytest.raises(halovae.DisagreementError):  # After a failed call ranks connect anew.
            vae.decode(latent[:, :, : 1 + (rank == leaver)])
        left_by(lambda stream: None)  # Nobody holds it any more.
        with pytest.raises(halovae.DisagreementError, match="ranks disagree on call"):
            next(handle.decode_stream(latent)) if rank == leaver else vae.decode(latent)

        comm: Any = handle._comm
        said = comm._link._agreements
        for number in range(3):  # All leave theirs, when they like.
            if rank == number:
                time.sleep(0.1)
            with handle.decode_stream(latent), handle.encode_stream([clip]):
                pass
        assert comm._link._agreements == said
        vae.decode(latent)
        assert len(comm._link._forgone) <= 1  # Of the stream that the others have not made.
        assert not any(comm._link._said.values())


@pytest.mark.parametrize("leaver", [0, 1])
def test_who_never_begins_is_not_waited_for(three_ranks: Ranks, leaver: int) -> None:
    three_ranks.run(unbegun, leaver)


def ways(rank: int) -> None:
    """Who gets the pieces, ranks without a shard, several steps in a call, tiles."""
    family = FAMILIES["wan21"]
    vae = family.build().to(torch.float64)
    for options in (
        {"gather": "shard", "axis": "width"},
        {"size": 2, "options": halovae.Options(frames_per_call=3)},
        {"size": 2, "gather": "first"},
        {"mode": "tile"},
        {"mode": "auto"},
    ):
        count = 5 if "options" in options else 3
        latent = latents("wan21", count)
        with halovae.parallelize(vae, verify=False, **options) as handle:
            whole = run_decode(family, vae, latent)
            assert handle.last
            steps = handle.last.steps
            pieces = list(handle.decode_stream(latent))
            assert handle.last.steps == steps
            expected = len(steps) or count
            assert handle.last.pieces == len(pieces) == expected, options
            parts = list(handle.decode_stream(latent.split((count + 1) // 2, 2)))
            assert handle.last.pieces == len(parts) == expected
            assert torch.equal(torch.cat(parts, 2), torch.cat(pieces, 2)) or whole.numel() == 0, options
            joined = pieces[0] if whole.numel() == 0 and len(pieces) == 1 else torch.cat(pieces, 2)
            assert torch.equal(joined, whole), options
    assert isinstance(steps, tuple)


def test_who_gets_the_pieces(three_ranks: Ranks) -> None:
    three_ranks.run(ways)


def test_memory_does_not_grow_with_the_clip() -> None:
    """Of one call it does: that holds all frames, and joins them."""
    cpu, peaks = torch.device("cpu"), {}
    vae = FAMILIES["wan21"].build()
    with halovae.optimize(vae) as handle:
        engine: Any = handle._engine
        for frames in (9, 33):
            latent = latents("wan21", frames).float()
            for emit in (None, lambda frames: None):
                run = functools.partial(engine.run, "decode", latent, (latent,), {}, emit)
                run()
                peaks[frames, emit is None] = allocated_by(run, cpu)
    assert peaks[33, True] > 1.5 * peaks[9, True]  # What a step takes is in both.
    assert peaks[33, False] < 1.1 * peaks[9, False] + latents("wan21", 33).nbytes
    assert peaks[33, False] < 0.6 * peaks[33, True]


def test_caches_of_joined_steps_go_with_the_next_part() -> None:
    """Not only when the garbage is collected, which on a GPU comes too late."""
    vae, latent = FAMILIES["wan21"].build(), latents("wan21", 17).float()
    with halovae.optimize(vae, options=halovae.Options(frames_per_call=2)) as handle:
        engine: Any = handle._engine
        call, stream = (
            functools.partial(engine.run, "decode", latent, (latent,), {}, emit) for emit in (None, lambda frames: None)
        )
        call(), stream()
        gc.disable()
        try:
            assert allocated_by(stream, torch.device("cpu")) < allocated_by(call, torch.device("cpu"))
        finally:
            gc.enable()
