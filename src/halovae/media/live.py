"""An mp4 that is still being written, as `write` does it for who watches: its codec, and its pictures one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from PIL import Image

from halovae.media.video import to_rgb

_HEAD = 8
"""Bytes of length and kind at the beginning of each box of an mp4."""


def codec_words(beginning: bytes) -> str:
    """The codec as browsers name it, such as avc1.64001f; nothing where there is too little of the file so far."""
    profile = _settings(beginning)[1:4]
    return f"avc1.{profile.hex()}" if len(profile) == 3 else ""


def _settings(words: bytes) -> bytes:
    """The decoder's settings."""
    at = words.find(b"avcC")
    return words[at + 4 : at - 4 + int.from_bytes(words[at - 4 : at], "big")] if at >= 4 else b""


class LivePictures:
    """The pictures of such a file, which comes in parts of any length."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._decoder: Any = None

    def feed(self, words: bytes) -> Iterator[Image.Image]:
        """The pictures that are whole with the next part of the file."""
        self._bytes += words
        while len(self._bytes) >= _HEAD:
            size, kind = int.from_bytes(self._bytes[:4], "big"), bytes(self._bytes[4:_HEAD])
            if len(self._bytes) < size:
                return
            content = bytes(self._bytes[_HEAD:size])
            del self._bytes[:size]
            if kind == b"moov":
                self._decoder = av.CodecContext.create("h264", "r")
                self._decoder.extradata = _settings(content)
            elif kind == b"mdat":  # One frame.
                for frame in self._decoder.decode(av.Packet(content)):
                    yield to_rgb(Path("stream.mp4"), frame, frame.width)
