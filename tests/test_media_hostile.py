"""Clips that lie about themselves, and rare kinds: read as they are, or refused in one line, in little memory."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import av
import pytest
import torch
from clips import bars, content, make_video

from halovae.base.errors import InputError
from halovae.base.memory import PeakMemory
from halovae.media import read

LIES = {
    "1e9 frames": (b"stsz", 12, 10**9),
    "1e9 frames of one length": (b"stts", 12, 10**9),
    "frames of no length": (b"stts", 16, 0),
    "no time scale": (b"mdhd", 16, 0),
    "an endless time scale": (b"mdhd", 16, 2**32 - 1),
    "an endless duration": (b"mdhd", 20, 2**32 - 1),
    "1e9 places of frames": (b"stco", 8, 10**9),
    "a track of 65535 pixels": (b"avc1", 28, 0xFFFFFFFF),
}
"""The box of the header, where in it from its name on, and the number that is put there."""


@pytest.mark.parametrize("lie", LIES)
def test_lies_in_the_header(tmp_path: Path, lie: str) -> None:
    box, offset, value = LIES[lie]
    data = bytearray(make_video(tmp_path / "whole.mp4", frames=12, movflags="faststart").read_bytes())
    place = data.index(box) + offset
    data[place : place + 4] = struct.pack(">I", value)
    memory, started = PeakMemory(torch.device("cpu")), time.monotonic()
    clip, words = None, ""
    try:
        clip = read(content(tmp_path, bytes(data)))
    except InputError as error:
        words = str(error)
    assert "\n" not in words
    assert clip is None or (1 <= len(clip.frames) <= 12 and clip.fps > 0)
    assert memory.growth < 300 * 2**20
    assert time.monotonic() - started < 30


def test_alpha_is_left_out_and_said(tmp_path: Path) -> None:
    clip = read(make_video(tmp_path / "o.mov", "argb", "qtrle"))
    assert clip.frames.shape == (5, 64, 96, 3)
    assert "the alpha channel is left out" in clip.notes


def test_hdr_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "o.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        stream.codec_context.color_trc = 16
        for pixels in bars(3):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p10le")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read(tmp_path / "o.mp4")
    assert len(clip.frames) == 3
    assert any("HDR" in note for note in clip.notes)


def test_plain_clips_need_no_word(tmp_path: Path) -> None:
    assert read(make_video(tmp_path / "o.mp4")).notes == ()
