"""What is encoded in one go: a clip, or several of one size. The same for the same list of clips on any machine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from halovae.datasets.buckets import Bucket
from halovae.datasets.formats import Storage
from halovae.datasets.items import Item

_PIXELS = 2**22
"""In one go, at the most: more of them keep no device busier."""
_CLIPS = 8


@dataclass(frozen=True, kw_only=True)
class Job:
    """How clips are read, encoded and written: what every worker has to know."""

    layout: Storage
    device: str
    """Its kind."""
    dtype: str
    """That the VAE computes in."""
    fps: str | None
    """As a fraction."""
    threads: int
    """Of each device, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Clips of one size that are encoded together."""

    bucket: Bucket
    items: tuple[Item, ...]
    wanted: tuple[bool, ...]
    """Which of them. The others are there already, and leave a gap: neighbours don't change the bits of a clip, but
    their number may."""

    @property
    def keys(self) -> list[str]:
        return [item.key for item, wanted in zip(self.items, self.wanted, strict=True) if wanted]

    def singly(self) -> list[Unit]:
        """Its clips one by one, for a device with too little memory for all of them."""
        pairs = zip(self.items, self.wanted, strict=True)
        return [Unit(bucket=self.bucket, items=(item,), wanted=(True,)) for item, wanted in pairs if wanted]


def together(bucket: Bucket) -> int:
    """How many clips of a bucket make a unit."""
    return min(_CLIPS, max(1, _PIXELS // bucket.pixels))


def group_sizes(devices: int) -> list[int]:
    """How many devices a clip may get, the smallest first."""
    return sorted({*(2**power for power in range(devices.bit_length())), devices})


def units_of(clips: Sequence[tuple[Item, Bucket]], there: Collection[str]) -> list[Unit]:
    """The units that have something to do, the largest first.

    Args:
        clips: all of the dataset, in order.
        there: keys of those that are finished.
    """
    groups: dict[Bucket, list[Item]] = {}
    for item, bucket in clips:
        groups.setdefault(bucket, []).append(item)
    found: list[Unit] = []
    for bucket in sorted(groups, key=lambda one: one.pixels, reverse=True):
        items, count = groups[bucket], together(bucket)
        for begin in range(0, len(items), count):
            chosen = tuple(items[begin : begin + count])
            wanted = tuple(item.key not in there for item in chosen)
            if any(wanted):
                found.append(Unit(bucket=bucket, items=chosen, wanted=wanted))
    return found
