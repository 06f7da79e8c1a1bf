"""The three things that ranks do for clients: make a video, encode a clip, decode latents. Run on every rank."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from halovae import media
from halovae.app.clip_files import Coder, Take, latents_info
from halovae.app.job import PipelineJob
from halovae.app.session import Session
from halovae.app.settled import settled
from halovae.base.errors import HalovaeError, InputError
from halovae.base.files import reason
from halovae.media import codec, latents_file
from halovae.media.latents_file import KEY
from halovae.media.vae_limits import Limits
from halovae.pipelines.generation_settings import Generation, arguments, flag, parameters
from halovae.pipelines.grid import TokenGrid
from halovae.pipelines.load import PipelineSource, torch_dtypes
from halovae.pipelines.runner import Runner
from halovae.pipelines.scheduler import check_boundary, check_steps, prepare_scheduler, shifted
from halovae.pipelines.stages import WRITE, StageTimeline
from halovae.serve.store import PARTS_END, STREAM, THUMBNAIL, VIDEO, around_part

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


class Watch(Protocol):
    """Who is told of the work on a task, and may end it."""

    def on_step(self, done: int, total: int | None) -> None:
        """Called by all ranks together, with the number of steps done and of all."""

    def on_frames(self, count: int) -> None:
        """Called on the first rank with the number of frames that can be sent. Waits for a client that is far behind,
        and raises where there is none any more."""

    def agree(self, problem: HalovaeError | None = None) -> None:
        """Called by all ranks together, with what went wrong on this one; raises on all if anything did, or if the
        client does not want the result any more."""


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

    def coder(self, session: Session, watch: Watch) -> Coder:
        """What encodes and decodes for one task."""
        vae, streams, dtypes = self.runner.pipeline.vae, self.runner.streams, torch_dtypes(self.job.setup)
        return Coder(
            session=session, vae=vae, limits=self.limits, dtypes=dtypes, streams=streams, agree=watch.agree
        )  # fmt: skip


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


def make_video(session: Session, model: Model, task: Task, watch: Watch) -> dict[str, Any]:
    """Make a video and, on the first rank, write it meanwhile; returns what it took.

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
    with _scheduled(model, per_call), ExitStack() as stack:
        watch.on_step(0, generation.num_inference_steps)
        timeline = StageTimeline(session.device)
        settings = {"crf": model.job.crf, "lossless": lossless}
        take = stack.enter_context(_writing_video(session, task, Fraction(fps), watch, **settings))
        result = model.runner.run(generation, watch.on_step, take)
        with timeline.stage(WRITE):  # What of it is left.
            stack.close()
    if not session.is_first:
        return {}
    frames, height, width = result.sizes
    sizes = {"num_frames": frames, "height": height, "width": width, "fps": fps}
    peak = max(result.peak_memory.values(), default=0)
    return {**sizes, "seed": result.seed, "timings": {**result.seconds, **timeline.seconds}, "peak_memory": peak}


@contextmanager
def _writing_video(session: Session, task: Task, fps: Fraction, watch: Watch, **settings: Any) -> Iterator[Take]:
    """Within it, the first rank writes the video of a task: as its result, and for who watches meanwhile."""
    writers, count = list[media.Writer](), 0
    with ExitStack() as stack:
        if session.is_first:
            stream = task.output.with_name(STREAM)
            stream.unlink(missing_ok=True)  # Of an attempt before: another file, for who still reads that one.
            for path, live in ((task.output, False), (stream, True)):
                writers.append(stack.enter_context(media.Writer(path, fps, live=live, **settings)))

        def take(frames: media.Frames) -> None:
            nonlocal count
            with _writing():
                for frame in frames:
                    if not count and task.kind == VIDEO:
                        first = Image.fromarray(frame)
                        first.thumbnail(_THUMBNAIL)
                        first.save(task.output.with_name(THUMBNAIL))
                    for writer in writers:
                        writer.put(frame)
                    count += 1
            watch.on_frames(count)

        yield take
        with _writing():
            stack.close()


def encode_clip(session: Session, model: Model, task: Task, watch: Watch) -> dict[str, Any]:
    """Encode a clip to latents, as `halovae encode` does.

    Raises:
        InputError: no clip that can be read.
    """
    assert task.input is not None
    given = dict(task.settings)
    watched = given.pop("stream", False)
    film = _open_clip(task.input, **given)
    fit = model.limits.fit(film.count, *film.size)
    coder = model.coder(session, watch)
    info = latents_info(model.source.model, coder.vae, film, fit)
    with ExitStack() as stack:
        stream = None
        if session.is_first and watched:
            stream = stack.enter_context(task.output.with_name(STREAM).open("wb"))
        writer = stack.enter_context(latents_file.LatentsWriter(task.output, model.limits.time_dim))

        def take(piece: Tensor) -> None:
            if not session.is_first:
                return
            with _writing():
                writer.put(piece)
                if stream is not None:
                    content = latents_file.content_of({KEY: piece}, info.to_metadata())
                    head, end = around_part(len(content))
                    stream.write(head + content + end)
                    stream.flush()
            if stream is not None:
                watch.on_frames(writer.shape[model.limits.time_dim])

        watch.agree()
        coder.encode(coder.frames(film, fit), fit, take, at_once=0 if watched else codec.LONG)
        if not session.is_first:
            return {}
        with _writing():
            if stream is not None:
                stream.write(PARTS_END)
            writer.finish(info)
        return {"shape": list(writer.shape)}


def decode_latents(session: Session, model: Model, task: Task, watch: Watch) -> dict[str, Any]:
    """Decode latents to a video, as `halovae decode` does.

    Raises:
        InputError: no latents, or those of another VAE.
    """
    assert task.input is not None
    given = dict(task.settings)
    lossless = given.pop("lossless", model.job.lossless)
    given.pop("stream", None)  # The front's affair.
    encoded, info = latents_file.load(task.input)
    _check_size(info.frames, info.height, info.width, **given)
    coder = model.coder(session, watch)
    latents_file.check_shape(encoded, info, model.limits, type(coder.vae).__name__)
    watch.agree()
    with _writing_video(session, task, info.fps, watch, times=info.times, lossless=lossless) as take:
        coder.decode(encoded, info, lambda frames: take(codec.frames_of(frames)))
    return {"num_frames": info.frames, "height": info.height, "width": info.width} if session.is_first else {}


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


def _open_clip(path: Path, pixels: int, frames: int) -> media.Film:
    header, count = media.inspect(path), 0

    def advance() -> None:
        nonlocal count
        count += 1
        _check_size(count, header.height, header.width, pixels, frames)

    return media.Film(path, advance=advance)


def _check_size(count: int, height: int, width: int, pixels: int, frames: int) -> None:
    if count > frames:
        raise InputError(f"the clip has more than {frames} frames: send it in parts")
    if height * width > pixels:
        raise InputError(f"the clip has frames of {width}x{height}: {pixels} pixels at most")


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
