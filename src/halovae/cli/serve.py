"""`halovae serve`: a pipeline behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halovae.app import launch
from halovae.app.job import Job, job_of
from halovae.app.run_options import RunOptions
from halovae.base.errors import InputError
from halovae.base.files import check_model
from halovae.cli import flags as options
from halovae.cli import generation_flags as flags
from halovae.cli import usage

if TYPE_CHECKING:
    from halovae.app.session import Session
    from halovae.serve.server_settings import ServeOptions

_TASKS = ("image-to-video", "text-to-video")
_Task = Annotated[
    str,
    typer.Option(
        "--task", metavar="|".join(_TASKS), help="Make videos from images, or from prompts alone.",
        rich_help_panel=usage.FILES,
    ),
]  # fmt: skip
_Name = Annotated[
    str | None,
    typer.Option(
        "--served-model-name", metavar="NAME", help="Let clients call the model so.", show_default="as --model",
        rich_help_panel=usage.FILES,
    ),
]  # fmt: skip
_Store = Annotated[
    Path,
    typer.Option(
        "--store", metavar="DIR", help="Keep jobs and their files in this folder.", rich_help_panel=usage.FILES
    ),
]
_Keep = Annotated[
    str,
    typer.Option(
        "--keep", metavar="TIME", help="Keep jobs for so long after their end: 90s, 30m, 12h, 7d.",
        rich_help_panel=usage.FILES,
    ),
]  # fmt: skip
_Host = Annotated[
    str,
    typer.Option(
        "--host", metavar="ADDRESS", help="Listen on this address; 0.0.0.0 is open to all machines.",
        rich_help_panel=usage.CLIENTS,
    ),
]  # fmt: skip
_Port = Annotated[
    int,
    typer.Option(
        "--port", min=0, max=65535, metavar="N", help="Listen on this port; 0 takes any that is free.",
        rich_help_panel=usage.CLIENTS,
    ),
]  # fmt: skip
_KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file", metavar="FILE", help="Refuse requests that don't show the key in this file.",
        show_default=False, rich_help_panel=usage.CLIENTS,
    ),
]  # fmt: skip


def _most(flag: str, metavar: str, words: str) -> Any:
    return typer.Option(flag, min=1, metavar=metavar, help=words, rich_help_panel=usage.CLIENTS)


_MaxQueue = Annotated[int, _most("--max-queue", "N", "Let so many jobs wait at the most.")]
_MaxUpload = Annotated[int, _most("--max-upload", "MIB", "Refuse requests larger than this.")]
_MaxPixels = Annotated[int, _most("--max-pixels", "N", "Refuse frames of more pixels than this.")]
_MaxFrames = Annotated[int, _most("--max-frames", "N", "Refuse videos of more frames than this.")]
_MaxSteps = Annotated[int, _most("--max-steps", "N", "Refuse more steps of denoising than this.")]


def serve(
    context: typer.Context,
    model: flags.PipelineModel,
    task: _Task = "image-to-video",
    served_model_name: _Name = None,
    store: _Store = Path("halovae-jobs"),
    keep: _Keep = "7d",
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key_file: _KeyFile = None,
    max_queue: _MaxQueue = 64,
    max_upload: _MaxUpload = 32,
    max_pixels: _MaxPixels = 1920 * 1088,
    max_frames: _MaxFrames = 257,
    max_steps: _MaxSteps = 100,
    crf: flags.Crf = None,
    lossless: options.Lossless = False,
    boundary_ratio: flags.BoundaryRatio = None,
    flow_shift: flags.FlowShift = None,
    ranks: options.Ranks = None,
    ulysses_degree: flags.Ulysses = 1,
    ring_degree: flags.Ring = 1,
    vae_mode: flags.VaeModeOption = None,
    vae_untiled: flags.VaeUntiled = False,
    vae_use_tiling: flags.VaeUseTiling = False,
    vae_use_slicing: flags.VaeUseSlicing = False,
    vae_encode: flags.VaeEncode = True,
    vae_decode: flags.VaeDecode = True,
    vae_patch_parallel_size: flags.VaeSize = None,
    axis: options.Axis = "auto",
    enable_layerwise_offload: flags.LayerwiseOffload = False,
    enable_cpu_offload: flags.CpuOffload = False,
    dtype: options.DtypeOption = None,
    vae_dtype: flags.VaeDtype = None,
    vae_encode_dtype: options.VaeEncodeDtype = None,
    vae_decode_dtype: options.VaeDecodeDtype = None,
    attention_backend: flags.AttentionBackend = None,
    compile: flags.Compile = False,
    device: options.Device = None,
) -> int:
    """Keep a pipeline loaded on several devices, and serve it over HTTP, as OpenAI's videos API and with a web page."""
    return _start(context, locals())


def _start(context: typer.Context, given: dict[str, Any]) -> int:
    """Become the front, or one of the ranks that a front has started."""
    if given["task"] not in _TASKS:
        raise InputError(f"--task {given['task']}: give {' or '.join(_TASKS)}")
    job = job_of(given["task"], {**given, "output": Path("video.mp4"), "dry_run": False, "json": None, "report": None})
    place, ranks = launch.place(), given["ranks"]
    if place is not None and not launch.was_launched():
        raise InputError(
            "halovae serve starts its ranks by itself: "
            f"run `halovae serve --ranks {place.local_world_size} ...` without torchrun, once on each machine"
        )
    count = place.world_size if place else 1 if ranks is None else ranks
    if place is None:
        launch.check_ranks(count)
    job.setup.check_ranks(count)
    check_model(job.model)
    chosen = _options(given, count)
    if place is None:
        return _front(chosen, context.obj)
    from halovae.app.run_ranks import run

    options = RunOptions(
        model=job.model, ranks=ranks, axis=job.setup.vae_axis, dtype=given["dtype"], device=given["device"]
    )
    return run(context, options, lambda session: _on_rank(session, job, given["max_steps"]))


def _options(given: dict[str, Any], ranks: int) -> ServeOptions:
    from halovae.serve.server_settings import Limits, ServeOptions, parse_keep, read_key

    path = given["api_key_file"]
    return ServeOptions(
        model=given["served_model_name"] or given["model"],
        task=given["task"],
        ranks=ranks,
        host=given["host"],
        port=given["port"],
        store=given["store"],
        keep=parse_keep(given["keep"]),
        key=None if path is None else read_key(path),
        limits=Limits(
            upload_bytes=given["max_upload"] * 2**20,
            pixels=given["max_pixels"],
            frames=given["max_frames"],
            steps=given["max_steps"],
            queue=given["max_queue"],
        ),
    )


def _front(chosen: ServeOptions, arguments: list[str]) -> int:
    try:
        from halovae.serve.front import serve as run_front
    except ModuleNotFoundError as error:
        raise InputError(f"halovae serve needs {error.name}: pip install 'halovae[serve]'") from error
    return run_front(chosen, arguments)


def _on_rank(session: Session, job: Job, steps: int) -> None:
    from halovae.serve.worker import serve_ranks

    serve_ranks(session, job, steps)
