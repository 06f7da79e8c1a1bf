"""What whoever starts a server may choose."""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass, field
from pathlib import Path

from halovae.base.errors import InputError

RANK_FD = "HALOVAE_SERVE_RANK_FD"
"""Environment of the first rank: the number of its end of the connection to the front."""
_OWN_FILES = 64
"""Descriptors for all but clients."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def most_requests() -> int:
    """How many there may be at once, of the number of files that this process may open.

    A quarter of that: each request has a connection, and a file or two of its own; connections that are to be turned
    away, and those that come at the same instant, take a quarter each at most.
    """
    spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_FILES
    return min(max(spare // 4, 1), 1000)


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What one request, and all of them together, may ask for."""

    upload_bytes: int = 32 * 2**20
    """Of a whole request."""
    pixels: int = 1920 * 1088
    """Of a frame that is made, encoded or decoded."""
    image_pixels: int = 2**25
    """Of a picture that is sent."""
    frames: int = 257
    steps: int = 100
    queue: int = 64
    """Jobs that may wait; the next one is turned away."""
    requests: int = field(default_factory=most_requests)
    """At once."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a server is reached, and what it keeps."""

    model: str
    """The name that it goes by."""
    task: str
    """One of `pipelines.TASKS`."""
    ranks: int
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    store: Path = Path("halovae-jobs")
    """Folder of the jobs and their files."""
    keep: int = 7 * 86400
    """Seconds from the end of a job until it is removed."""
    key: str | None = None
    """What every request has to show; None: nothing."""
    limits: ServerLimits = field(default_factory=ServerLimits)

    @property
    def takes_image(self) -> bool:
        return self.task == "image-to-video"


def parse_keep(text: str) -> int:
    """Seconds, from words such as "90s", "30m", "12h" or "7d"."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None or int(match[1]) < 1:
        raise InputError(f"--keep {text}: give a time such as 90s, 30m, 12h or 7d")
    return int(match[1]) * _UNITS[match[2]]


def read_key(path: Path) -> str:
    """The key in a file, without white space around it. It has to be one that a header can carry, and nobody
    guesses."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--api-key-file {path} can't be read: {error}") from error
    if len(key) < 16 or re.fullmatch(r"[!-~]+", key) is None:
        raise InputError(f"--api-key-file {path}: the key needs 16 or more printable ASCII characters, without spaces")
    return key
