"""Clips for tests, whole and broken, made on the spot."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLIP = Path(__file__).parent.parent / "media" / "bigbuckbunny.mp4"


def bars(frames: int = 5, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """Red, green, blue and orange columns, and a white square that moves down."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    quarter = width // 4
    for column, colour in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40])):
        pixels[:, :, column * quarter : (column + 1) * quarter] = colour
    for index in range(frames):
        pixels[index, 8 * (index % 6) : 8 * (index % 6) + 8, :8] = 255
    return pixels


def make_video(
    path: Path, pixel_format: str = "yuv420p", codec: str = "libx264", frames: int = 5, **options: str
) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixel_format
        for pixels in bars(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def no_frames(folder: Path, name: str) -> Path:
    with av.open(str(folder / name), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 64, 64
        container.start_encoding()
    return folder / name


def only_sound(folder: Path) -> Path:
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder / "sound.mp4"


def content(folder: Path, data: bytes, name: str = "file.mp4") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def cut_after_header(folder: Path) -> Path:
    whole = make_video(folder / "whole.mp4", frames=30, movflags="faststart").read_bytes()
    return content(folder, whole[:-200])


def cut(folder: Path, name: str, codec: str = "libx264", **options: str) -> Path:
    whole = make_video(folder / f"whole_{name}", codec=codec, frames=30, **options).read_bytes()
    return content(folder, whole[: int(0.7 * len(whole))], name)


def cut_animation(folder: Path) -> Path:
    first, *others = [Image.fromarray(pixels) for pixels in bars(5)]
    first.save(folder / "whole.gif", save_all=True, append_images=others, duration=100)
    whole = (folder / "whole.gif").read_bytes()
    return content(folder, whole[: int(0.7 * len(whole))], "o.gif")
