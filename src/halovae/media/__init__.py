"""Videos and images to frames and back: 8-bit RGB, arrays of shape (frames, height, width, 3)."""

from halovae.media.film import Film
from halovae.media.frame_range import FrameRange
from halovae.media.reader import Clip, Header, inspect, read
from halovae.media.writer import CRF, SUFFIXES, Frames, check_still, write

__all__ = [
    "CRF",
    "SUFFIXES",
    "Clip",
    "Film",
    "FrameRange",
    "Frames",
    "Header",
    "check_still",
    "inspect",
    "read",
    "write",
]
