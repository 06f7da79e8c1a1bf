"""The three things that ranks do for clients: make a video, encode a clip, decode latents. Run on every rank."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from halovae import media
from halovae.app.job import PipelineJob
from halovae.app.session import Session
from halovae.app.settled import settled
from halovae.base.errors import HalovaeError, InputError
from halovae.base.files import reason
from halovae.media import codec, latents_file
from halovae.media.latents_file import LatentsInfo, scaling_of
from halovae.media.vae_limits import Fit, Limits
from halovae.pipelines.generation_settings import Generation, arguments, flag, parameters
from halovae.pipelines.grid import TokenGrid
from halovae.pipelines.load import PipelineSource
from halovae.pipelines.runner import Runner
from halovae.pipelines.scheduler import check_boundary, check_steps, prepare_scheduler, shifted
from halovae.pipelines.stages import WRITE, StageTimeline
from halovae.serve.store import THUMBNAIL

OnStep = Callable[[int, int | None], None]
"""Called by all ranks together, with the number of steps done and of all."""
_PER_CALL = ("flow_shift", "boundary_ratio")
"""Settings of a pipeline's setup that a request may change for itself."""
_THUMBNAIL = (320, 320)
"""Width and height at most."""
_SETTINGS = ("negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale")
FIELDS = {
    "--image": "input_reference",
    "--fps": "fps",
    **{flag(name): name for name in (*_SETTINGS, *_PER_CALL, "prompt", "seed", "guidance_scale_2")},
}
"""The command line's flags, as clients know these settings."""


class NoRoomError(HalovaeError):
    """The result could not be written for want of room: the task can be done again when there is."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline that is loaded and spread over the ranks."""

    source: PipelineSource
    job: PipelineJob
    """What the server was started with."""
    runner: Runner
    grid: TokenGrid
    limits: Limits
    """Of the VAE."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job, as every rank gets it."""

    id: str
    kind: str
    """One of the kinds in `store`."""
    settings: Mapping[str, Any]
    input: Path | None
    """What the client has sent."""
    output: Path
    """Of the first rank."""


def refused(model: Model) -> dict[str, str]:
    """Fields of a request that this pipeline can't honour, whatever their value, and why."""
    cls, components = model.source.cls, model.runner.pipeline.components
    checks: dict[str, Callable[[], object]] = {
        "flow_shift": lambda: shifted(components["scheduler"], 1.0),
        "boundary_ratio": lambda: check_boundary(cls, components, replace(model.job.setup, boundary_ratio=0.5)),
    }
    image: dict[str, Any] = {"image": True} if "image" in parameters(cls) else {}
    for name in (*_SETTINGS, "guidance_scale_2"):
        value: Any = "" if name == "negative_prompt" else 1
        checks[name] = partial(arguments, cls, Generation(prompt="", **image, **{name: value}))
    found = {name: str(error) for name, check in checks.items() if (error := _refusal(check)) is not None}
    if components.get("transformer_2") is None:
        found.setdefault("guidance_scale_2", f"guidance_scale_2 can't be honoured: {cls.__name__} has one expert here")
    return found


def refused_steps(model: Model, most: int) -> dict[int, str]:
    """Numbers of denoising steps up to `most` that the scheduler can't take as it is set, and why."""
    pipeline = model.runner.pipeline
    checks = {
        count: partial(check_steps, type(pipeline), pipeline.scheduler, Generation(num_inference_steps=count))
        for count in range(1, most + 1)
    }
    return {count: str(error) for count, check in checks.items() if (error := _refusal(check)) is not None}


def _refusal(check: Callable[[], object]) -> InputError | None:
    try:
        check()
    except InputError as error:
        return error
    return None


def make_video(session: Session, model: Model, task: Task, on_step: OnStep) -> dict[str, Any]:
    """Make a video and, on the first rank, write it; returns what it took.

    Raises:
        InputError: settings that this pipeline can't honour, or an image that can't be read.
    """
    given = dict(task.settings)
    fps = int(given.pop("fps"))
    lossless = given.pop("lossless", model.job.lossless)
    per_call = {name: given.pop(name) for name in _PER_CALL if name in given}
    seconds = given.pop("seconds", None)
    if seconds is not None:
        given["num_frames"] = model.grid.nearest_count(seconds * fps)
    job = replace(model.job, image=task.input, generation=Generation(**given, frame_rate=fps))
    generation = settled(model.source.cls, model.runner.pipeline.components, model.grid, job)
    with _scheduled(model, per_call):
        on_step(0, generation.num_inference_steps)
        result = model.runner.run(generation, on_step)
    timeline = StageTimeline(session.device)
    if result.frames is None:
        return {}
    with timeline.stage(WRITE), _writing():
        first = Image.fromarray(result.frames[0])
        first.thumbnail(_THUMBNAIL)
        first.save(task.output.with_name(THUMBNAIL))
        media.write(task.output, result.frames, Fraction(fps), crf=model.job.crf, lossless=lossless)
    frames, height, width = result.frames.shape[:3]
    sizes = {"num_frames": frames, "height": height, "width": width, "fps": fps}
    peak = max(result.peak_memory.values(), default=0)
    return {**sizes, "seed": result.seed, "timings": {**result.seconds, **timeline.seconds}, "peak_memory": peak}


def encode_clip(session: Session, model: Model, task: Task, on_step: OnStep) -> dict[str, Any]:
    """Encode a clip to latents, as `halovae encode` does.

    Raises:
        InputError: no clip that can be read.
    """
    assert task.input is not None
    clip = _read_clip(task.input, **task.settings)
    fit = model.limits.fit(*clip.frames.shape[:3])
    vae = model.runner.pipeline.vae
    padded = fit.pad(codec.to_tensor(clip.frames, vae.dtype, session.device))
    calls = fit.padded_frames if model.limits.per_frame else 1
    with _stepping(on_step, calls) as after:
        encoded = codec.encode(vae, model.limits, padded, after)
    if not session.is_first:
        return {}
    info = LatentsInfo(
        model=model.source.model,
        model_class=type(vae).__name__,
        scaling=scaling_of(vae.config),
        fps=clip.fps,
        times=clip.times,
        **vars(fit),
    )
    with _writing():
        latents_file.save(task.output, encoded, info)
    return {"shape": list(encoded.shape)}


def decode_latents(session: Session, model: Model, task: Task, on_step: OnStep) -> dict[str, Any]:
    """Decode latents to a video, as `halovae decode` does.

    Raises:
        InputError: no latents, or those of another VAE.
    """
    assert task.input is not None
    given = dict(task.settings)
    lossless = given.pop("lossless", model.job.lossless)
    encoded, info = latents_file.load(task.input)
    _check_size(info.frames, info.height, info.width, **given)
    vae = model.runner.pipeline.vae
    latents_file.check_shape(encoded, info, model.limits, type(vae).__name__)
    encoded = encoded.to(session.device, vae.dtype)
    calls = codec.decode_calls(vae, model.limits, encoded)
    with _stepping(on_step, calls) as after:
        sample = codec.decode(vae, model.limits, encoded, after)
    if not session.is_first:
        return {}
    fit = Fit(**{name: getattr(info, name) for name in Fit.__dataclass_fields__})
    with _writing():
        media.write(task.output, codec.Frames(fit.crop(sample)), info.fps, times=info.times, lossless=lossless)
    return {"num_frames": info.frames, "height": info.height, "width": info.width}


@contextmanager
def _writing() -> Iterator[None]:
    """What can't be written is no fault of the request."""
    try:
        yield
    except (InputError, OSError) as error:
        cause = error.__cause__ if isinstance(error, InputError) else error
        if not isinstance(cause, OSError):
            raise
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError(reason(cause)) from error
        raise HalovaeError(f"can't write the result: {reason(cause)}") from error


def _read_clip(path: Path, pixels: int, frames: int) -> media.Clip:
    header, count = media.inspect(path), 0

    def advance() -> None:
        nonlocal count
        count += 1
        _check_size(count, header.height, header.width, pixels, frames)

    return media.read(path, advance=advance)


def _check_size(count: int, height: int, width: int, pixels: int, frames: int) -> None:
    if count > frames:
        raise InputError(f"the clip has more than {frames} frames: send it in parts")
    if height * width > pixels:
        raise InputError(f"the clip has frames of {width}x{height}: {pixels} pixels at most")


@contextmanager
def _stepping(on_step: OnStep, calls: int) -> Iterator[Callable[[], None]]:
    done = 0

    def after() -> None:
        nonlocal done
        done += 1
        on_step(done, calls)

    on_step(0, calls)
    with torch.inference_mode():
        yield after


@contextmanager
def _scheduled(model: Model, changes: Mapping[str, Any]) -> Iterator[None]:
    """Within it, the scheduler is as one request wants it."""
    pipeline = model.runner.pipeline
    scheduler, ratio = pipeline.scheduler, pipeline.config.get("boundary_ratio")
    prepare_scheduler(pipeline, replace(model.job.setup, **{**dict.fromkeys(_PER_CALL), **changes}))
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        if "boundary_ratio" in changes:
            pipeline.register_to_config(boundary_ratio=ratio)
