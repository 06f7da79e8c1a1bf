"""`--report` of a dataset: what it took, what was set aside, and a few of its items decoded beside their sources."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch

from halovae.app.pages import command
from halovae.datasets.buckets import Bucket, take
from halovae.datasets.items import Item
from halovae.datasets.latents import Latents
from halovae.datasets.progress import Done
from halovae.datasets.run_dataset import DatasetRun
from halovae.evaluation import compare_clips
from halovae.evaluation.report import ClipSection, Report
from halovae.evaluation.scores import decibel
from halovae.media import codec, models

_SHOWN = 4
_FAULTS = 100


def page(run: DatasetRun, done: Done, words: Sequence[str]) -> Report:
    """The report of a run.

    Args:
        run: that has encoded.
        done: what it did.
        words: the command line.
    """
    found = Latents(run.folder.root)
    vae = models.load(run.source, dtype=torch.float32, device=torch.device("cpu"))
    sections = [_section(run, vae, found, item, bucket) for item, bucket in _few(run.clips) if item.key in found.keys]
    faults = list(run.folder.faults.values())
    rows = [("set aside", "why"), *((fault.path, fault.why) for fault in faults[:_FAULTS])]
    facts = {
        "Items": f"{done.items}: {done.encoded} encoded, {done.there} there already, {done.failed} failed",
        "VAE": f"{run.source.model} ({run.source.class_name}), {run.job.dtype}",
        "Devices": f"{run.devices} {run.kind}, busy {100 * done.busy:.0f} % of the time",
        "Time": f"{timedelta(seconds=round(done.seconds))}, {done.rate:.1f} frames per second",
        "Buckets": ", ".join(map(str, run.buckets)),
        "Format": f"{run.job.layout.format}, {run.job.layout.store} in {run.job.layout.dtype}",
    }
    shards = [f"{bucket} on {count} devices" for bucket, count in done.groups.items() if count > 1]
    if shards:
        facts["Shards"] = ", ".join(shards)
    return Report(
        title=f"{run.asked.source} through {run.source.model}",
        verdict=f"{done.encoded + done.there} of {done.items} items are encoded, {done.failed} were set aside.",
        facts=facts,
        costs=rows if faults else (),
        costs_text=f"{len(faults)} in all." if len(faults) > _FAULTS else "",
        clips=sections,
        command=command(words),
    )


def _few(clips: Sequence[tuple[Item, Bucket]]) -> list[tuple[Item, Bucket]]:
    """Evenly from the whole list."""
    step = max(1, len(clips) // _SHOWN)
    return list(clips[::step][:_SHOWN])


def _section(run: DatasetRun, vae: torch.nn.Module, found: Latents, item: Item, bucket: Bucket) -> ClipSection:
    source = take(item, bucket, run.fps).pixels
    _, latents, _ = found.read(found.keys[item.key])
    with torch.inference_mode():
        sample = codec.decode(vae, run.limits, latents.to(torch.float32))
    frames = codec.to_frames(sample)
    compared = compare_clips(source, frames)
    return ClipSection(
        title=item.key,
        text=f"Brought to {bucket}, encoded, and decoded again: PSNR {decibel(compared.psnr)}. {item.caption}".rstrip(),
        reference_name="Source",
        result_name="Decoded",
        reference=source,
        result=frames,
        found=compared,
    )
