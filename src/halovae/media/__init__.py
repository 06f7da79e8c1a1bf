"""Videos and images to frames and back: 8-bit RGB, arrays of shape (frames, height, width, 3)."""

from halovae.media.reader import Clip, Film, FrameRange, Header, inspect, read
from halovae.media.writer import CRF, SUFFIXES, Frames, Writer, check_still, write

__all__ = [
    "CRF",
    "SUFFIXES",
    "Clip",
    "Film",
    "FrameRange",
    "Frames",
    "Header",
    "Writer",
    "check_still",
    "inspect",
    "read",
    "write",
]
