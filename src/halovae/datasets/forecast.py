"""What a dataset will take before it is encoded: devices and memory of each bucket, hours, and bytes on the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from halovae import comm
from halovae.app.survey import Row, Survey
from halovae.app.tables import counted
from halovae.base.memory import free_bytes
from halovae.comm.bandwidth import LINKS
from halovae.datasets.buckets import Bucket
from halovae.datasets.formats import Storage
from halovae.datasets.units import Job, group_sizes
from halovae.media import models, vae_limits
from halovae.predict.rates import GivenSpeed, MeasuredSpeed

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one clip of a bucket takes."""

    ranks: int | None
    """Devices; None: it fits into the memory of no number of them."""
    bytes: float
    """On each of them."""
    more: float
    """Bytes of a further clip in one go."""
    room: float
    """Bytes that each device has."""
    seconds: float | None
    """On these devices; None: not asked for, or not known."""


def needs(job: Job, buckets: Sequence[Bucket], devices: int, memory: float | None, timed: bool) -> list[Need]:
    """What clips take, told on a device.

    Args:
        job: how they are encoded.
        buckets: of the clips.
        devices: how many there are; on a CPU they share its memory.
        memory: bytes of each device; None: what is free.
        timed: try the VAE's operators on this device, to tell seconds.
    """
    on_cpu = job.device == "cpu"
    device = torch.device("cpu") if on_cpu else comm.default_device()
    free = free_bytes(device) if memory is None else memory
    room = 2**60 if free is None else free / devices if memory is None and on_cpu else free
    dtype, threads = getattr(torch, job.dtype), torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        speed = MeasuredSpeed(device, dtype) if timed else GivenSpeed(flops=1e12, bandwidth=1e12, device=device)
        limits = vae_limits.limits_of(models.find_skeleton(job.layout.model)[1])
        return [_need(job, limits, bucket, group_sizes(devices), room, speed, timed) for bucket in buckets]
    finally:
        torch.set_num_threads(threads)


def _need(
    job: Job, limits: vae_limits.Limits, bucket: Bucket, sizes: Sequence[int], room: float,
    speed: MeasuredSpeed | GivenSpeed, timed: bool,
) -> Need:  # fmt: skip
    _, vae = models.find_skeleton(job.layout.model)
    dtype = getattr(torch, job.dtype)
    fit = limits.fit(bucket.frames, bucket.height, bucket.width)
    survey = Survey(vae, limits, fit, {"encode": dtype, "decode": dtype}, speed, LINKS["nvlink"])
    alone = survey.exact("encode", 1).prediction
    if alone is None:  # A VAE in tiles: what it takes shows when it runs.
        return Need(ranks=1, bytes=0, more=0, room=room, seconds=None)
    tried: list[Row] = []
    for row in (survey.exact("encode", ranks) for ranks in sizes):
        if row.prediction is not None:
            tried.append(row)
            if row.memory <= room:
                break
    row = min(tried, key=lambda row: row.memory)
    ranks = row.ranks if row.memory <= room else None
    seconds = row.prediction.seconds if timed and row.prediction is not None else None
    return Need(ranks=ranks, bytes=row.memory, more=alone.memory, room=room, seconds=seconds)


def plan(
    needs: Mapping[Bucket, Need], counts: Counter[Bucket], devices: int, limits: vae_limits.Limits, layout: Storage
) -> list[str]:
    """Lines of text: where the clips of each bucket go, and what all of them take.

    Args:
        needs: of each bucket.
        counts: how many clips it has.
        devices: how many there are.
        limits: of the VAE.
        layout: of the results.
    """
    lines: list[str] = []
    total, seconds = 0, 0.0
    for bucket, need in needs.items():
        size = counts[bucket] * _bytes(limits, bucket, layout)
        total += size
        room = f"{need.bytes / _GIB:.2f} GiB"
        where = f"on 1 device, {room}" if need.ranks == 1 else f"on {need.ranks} devices as shards, {room} each"
        if need.ranks is None:
            where = f"on no number of devices: {room} of {need.room / _GIB:.2f} GiB"
        words = [f"{bucket}: {counted(counts[bucket], 'item')}", where, f"{size / _MIB:.1f} MiB of latents"]
        if need.seconds is not None:
            # A group that does not divide the devices leaves some of them without work.
            seconds += counts[bucket] * need.seconds / max(1, devices // (need.ranks or devices))
            words.append(f"{need.seconds:.3g} s each")
        lines.append(", ".join(words))
    took = timedelta(seconds=round(seconds))
    lines.append(f"{total / _MIB:.1f} MiB to write" + (f", about {took} of encoding" if seconds else ""))
    return lines


def _bytes(limits: vae_limits.Limits, bucket: Bucket, layout: Storage) -> int:
    """Of the latents of one item."""
    frames = bucket.frames if limits.per_frame or not limits.period else 1 + (bucket.frames - 1) // limits.period
    numbers = limits.latent_channels * frames * (bucket.height // limits.ratio) * (bucket.width // limits.ratio)
    return numbers * getattr(torch, layout.dtype).itemsize * (2 if layout.store == "parameters" else 1)
