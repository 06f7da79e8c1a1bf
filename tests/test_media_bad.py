"""Clips that can't be read: one line each, never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from clips import (
    CLIP,
    content,
    cut,
    cut_after_header,
    cut_animation,
    make_video,
    no_frames,
    only_sound,
    png_of_claimed_size,
)
from PIL import Image

from halovae import media
from halovae.base.errors import InputError
from halovae.media import FrameRange, read

BAD = {
    "missing": (lambda folder: folder / "none.mp4", "does not exist"),
    "a folder": (lambda folder: folder, "is a folder"),
    "empty": (lambda folder: content(folder, b""), "is empty"),
    "text": (lambda folder: content(folder, b"hello\n" * 50), "can't be read as an image or a video"),
    "noise": (lambda folder: content(folder, random.Random(0).randbytes(5000)), "can't be read as an image or a video"),
    "cut before the header": (
        lambda folder: content(folder, CLIP.read_bytes()[:300_000]),
        "can't be read as an image or a video .*cut short",
    ),
    "cut after the header": (cut_after_header, r"is broken at frame \d+ .*--frames 0:\d+"),
    "matroska cut short": (lambda folder: cut(folder, "o.mkv"), r"is broken at frame \d+ \(the file ends early"),
    "a live recording cut short": (lambda folder: cut(folder, "o.mkv", live="1"), r"the file ends early"),
    "raw frames cut short": (lambda folder: cut(folder, "o.y4m", codec="rawvideo"), r"the file ends early"),
    "animation cut short": (cut_animation, r"is broken at frame \d .*truncated"),
    "image cut short": (
        lambda folder: content(folder, (CLIP.parent / "coffee.png").read_bytes()[:9000]),
        "can't read image .*truncated",
    ),
    "image without data": (lambda folder: content(folder, png_of_claimed_size(64, 64)), "can't read image"),
    "image of claimed size": (lambda folder: content(folder, png_of_claimed_size(10_000, 10_000)), "claims"),
    "image of absurd size": (lambda folder: content(folder, png_of_claimed_size(2**31 - 1, 2**31 - 1)), "claims"),
    "no frames, mp4": (lambda folder: no_frames(folder, "none.mp4"), "has no video in it"),
    "no frames, mkv": (lambda folder: no_frames(folder, "none.mkv"), "cut short"),
    "only sound": (only_sound, "has no video in it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_remains_of_a_cut_file_can_be_read(tmp_path: Path) -> None:
    path = cut_after_header(tmp_path)
    with pytest.raises(InputError, match="is broken") as caught:
        read(path)
    wanted = FrameRange.parse(str(caught.value).rsplit(" ", 1)[1])
    assert wanted.stop is not None
    assert len(read(path, frames=wanted).frames) == wanted.stop > 5


def test_pixel_modes_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "o.tiff")
    with pytest.raises(InputError, match="mode F"):
        read(tmp_path / "o.tiff")


def test_large_videos_are_refused_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halovae.media.opened_file.MAX_FRAME_PIXELS", 64 * 95)
    with pytest.raises(InputError, match="claims 96x64 pixels"):
        media.inspect(make_video(tmp_path / "o.mp4"))


def test_clips_that_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halovae.media.reader.MAX_CLIP_BYTES", 100_000)
    with pytest.raises(InputError, match="fewer with --frames"):
        read(CLIP, height=72)


def test_damaged_files_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Bytes flipped anywhere: frames or one line, nothing else."""
    whole = make_video(tmp_path / "whole.mp4", frames=12, movflags="faststart").read_bytes()
    refused: list[str] = []
    for seed in range(60):
        chance = random.Random(seed)
        data = bytearray(whole)
        # Half of the seeds hit the header, where sizes, counts and rates are.
        for _ in range(chance.randint(1, 20)):
            data[chance.randrange(len(data) if seed % 2 else 1200)] = chance.randrange(256)
        try:
            assert read(content(tmp_path, bytes(data))).frames.ndim == 4
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert not any("\n" in message for message in refused)
