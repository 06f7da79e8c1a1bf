"""`--dry-run`: what a run would do, from configs alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import typer
from torch import nn

from halovae.app import launch
from halovae.app.job import PipelineJob
from halovae.app.run_options import dtype_on
from halovae.app.session import device_kind
from halovae.app.settled import planned
from halovae.app.survey import Row, Survey, Way
from halovae.app.tables import table
from halovae.base.errors import HalovaeError, counted
from halovae.base.files import write_json
from halovae.base.options import HALVES
from halovae.base.quiet import quiet
from halovae.calls.dtypes import set_dtypes
from halovae.comm.bandwidth import LINKS
from halovae.exact.mesh import plan_shards
from halovae.media.vae_limits import Limits
from halovae.pipelines.generation_settings import Generation, Setup, default, parameters
from halovae.pipelines.grid_sizes import TokenGrid
from halovae.pipelines.load import find_pipeline, outline, torch_dtypes
from halovae.pipelines.parallel_vae import mode_of
from halovae.pipelines.transformers import degree
from halovae.predict.rates import rates_of


def dry_run(job: PipelineJob, ranks: int) -> int:
    """Check all that configs can tell of a run on so many ranks, and print its plan. In this process alone."""
    kind = device_kind(job.options.device)
    job = replace(job, setup=replace(job.setup, dtype=dtype_on(kind, job.options.dtype)))
    source = find_pipeline(job.model, job.task)
    for note in (*job.notes, *source.notes):
        sys.stderr.write(f"halovae: note: {note}\n")
    components = outline(source)
    limits, grid, generation = planned(source, components, job)
    sizes = _sizes(source.cls, grid, generation)
    found: dict[str, Any] = {
        "task": job.task,
        "model": source.model,
        "pipeline": source.cls.__name__,
        "ranks": ranks,
        **sizes,
        "vae": _vae(components["vae"], grid, generation, job.setup, ranks),
        "dtype": job.setup.dtype,
        "device": kind,
        "vae_halves": _halves(components["vae"], limits, sizes, job.setup, ranks, kind),
        "ranks_per_sequence": degree(job.setup),
        "parts": _parts(components, job.setup),
    }
    if "tokens" in found:
        found["tokens_per_rank"] = found["tokens"] // degree(job.setup)
    if job.json is not None:
        write_json(job.json, found)
    typer.echo(_text(found, job.setup), nl=False)
    return 0


def _sizes(cls: Any, grid: TokenGrid, generation: Generation) -> dict[str, Any]:
    frames = generation.num_frames or default(parameters(cls), "num_frames") or 1
    if generation.height is None or generation.width is None:
        return {"frames": frames}
    tokens = grid.tokens(generation.height, generation.width, frames)
    return {"height": generation.height, "width": generation.width, "frames": frames, "tokens": tokens}


def _vae(vae: nn.Module, grid: TokenGrid, generation: Generation, setup: Setup, ranks: int) -> dict[str, Any]:
    """Mode, and for each half how many ranks cut what where."""
    mode = mode_of(vae, setup)
    workers = setup.vae_size or ranks
    halves: dict[str, Any] = {}
    for half, wanted, ratio in (("encode", setup.vae_encode, grid.ratio), ("decode", setup.vae_decode, 1)):
        halves[half] = {"ranks": workers if wanted else 1}
        if mode == "exact" and generation.height and generation.width:
            scale = grid.ratio // ratio
            plan = plan_shards(
                generation.height // scale, generation.width // scale, ratio, workers if wanted else 1, setup.vae_axis
            )
            largest = [scale * size for size in plan.largest]  # In pixels.
            halves[half] |= {"shards": list(plan.shape), "largest_shard": largest}
    return {"mode": mode, **halves}


def _halves(
    vae: nn.Module, limits: Limits, sizes: dict[str, Any], setup: Setup, ranks: int, device: str
) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds of each half, and bytes on a rank, weights included, alone and in each mode; nothing for unknown sizes.

    Encode is followed for a clip as long as the video: pipelines that encode less need less. Seconds are those of the
    rates of this device, without trials of what is run: a rough guess.
    """
    if "tokens" not in sizes:
        return []
    fit = limits.fit(sizes["frames"], sizes["height"], sizes["width"])
    workers, dtypes = setup.vae_size or ranks, torch_dtypes(setup)
    torch.set_num_threads(launch.threads(ranks))
    ways = [Way(mode="exact", ranks=1)]
    if workers > 1:
        ways += [Way(mode="exact", ranks=workers, axis=setup.vae_axis), Way(mode="tile", ranks=workers)]
    try:
        rates = rates_of(torch.device(device), dtypes["decode"])
        survey = Survey(vae, limits, fit, dtypes, rates, LINKS["pcie"])
        rows = [survey.row(half, way) for half in HALVES for way in ways]
    except HalovaeError as error:
        rows = [Row(half=half, mode="exact", ranks=workers, prediction=None, refusal=str(error)) for half in HALVES]
    return [
        {
            "half": row.half, "mode": row.mode, "ranks": row.ranks,
            "seconds": row.prediction.seconds if row.prediction else None,
            "bytes": row.memory if row.prediction else None, "refusal": row.refusal,
        }
        for row in rows
    ]  # fmt: skip


def _parts(components: Mapping[str, Any], setup: Setup) -> list[dict[str, Any]]:
    """Parameters and bytes of each network."""
    rows: list[dict[str, Any]] = []
    for name, part in components.items():
        if isinstance(part, nn.Module):
            count = sum(parameter.numel() for parameter in part.parameters())
            size = count * getattr(torch, setup.dtype).itemsize
            if name == "vae":
                with quiet():
                    set_dtypes(part, torch_dtypes(setup))
                size = sum(parameter.nbytes for parameter in part.parameters())
            rows.append({"part": name, "class": type(part).__name__, "parameters": count, "bytes": size})
    return rows


def _text(found: dict[str, Any], setup: Setup) -> str:
    ranks, parts = found["ranks"], found["ranks_per_sequence"]
    where = f"{counted(ranks, 'rank')} in {found['dtype']} on {found['device']}"
    lines = [f"{found['model']} ({found['pipeline']}), {found['task']} on {where}"]
    if "tokens" in found:
        lines.append(
            f"{counted(found['frames'], 'frame')} of {found['width']}x{found['height']}: "
            f"{found['tokens']} tokens, {found['tokens_per_rank']} on each of {counted(parts, 'rank')}"
        )
    lines += [f"VAE {half}: {_half(found['vae'], half)}" for half in ("encode", "decode")]
    lines.append(_halves_text(found["vae_halves"]))
    rows: list[tuple[str, ...]] = [("part", "class", "parameters", "weights")]
    rows += [
        (part["part"], part["class"], f"{part['parameters'] / 1e6:.1f} M", f"{part['bytes'] / 2**30:.2f} GiB")
        for part in found["parts"]
    ]
    total = sum(part["bytes"] for part in found["parts"])
    where = "on the host" if setup.layerwise_offload or setup.cpu_offload else "on each rank's device"
    lines += [table(rows).rstrip("\n"), f"weights {where}: {total / 2**30:.2f} GiB"]
    return "".join(f"{line}\n" for line in lines if line)


def _halves_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines: list[tuple[str, ...]] = [("VAE", "mode", "ranks", "seconds, roughly", "memory of a rank, predicted")]
    refused: list[str] = []
    for row in rows:
        if row["bytes"] is None:
            refused.append(f"VAE {row['half']}, {row['mode']} on {row['ranks']}: {row['refusal']}")
        else:
            seconds, memory = f"{row['seconds']:.2f}", f"{row['bytes'] / 2**30:.2f} GiB"
            lines.append((row["half"], row["mode"], str(row["ranks"]), seconds, memory))
    return "\n".join([table(lines).rstrip("\n"), *refused])


def _half(vae: dict[str, Any], half: str) -> str:
    plan = vae[half]
    if plan["ranks"] == 1:
        return "each rank alone"
    if "shards" not in plan:
        return f"{vae['mode']} on {plan['ranks']} ranks"
    rows, columns = plan["shards"]
    height, width = plan["largest_shard"]
    return f"exact on {plan['ranks']} ranks, {rows} x {columns} shards of up to {width}x{height} pixels"
