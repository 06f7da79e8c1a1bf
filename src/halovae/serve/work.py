"""The three things that ranks do for clients: make a video, encode a clip, decode latents. Run on every rank."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from halovae import media
from halovae.app.job import PipelineJob
from halovae.app.session import Session
from halovae.app.settled import settled
from halovae.base.errors import HalovaeError, InputError
from halovae.base.files import reason
from halovae.comm.agreement import together
from halovae.media import codec, latents_file
from halovae.media.latents_file import KEY, LatentsInfo, scaling_of
from halovae.media.vae_limits import Fit, Limits
from halovae.pipelines.generation_settings import Generation, arguments, flag, parameters
from halovae.pipelines.grid import TokenGrid
from halovae.pipelines.load import PipelineSource
from halovae.pipelines.runner import Runner
from halovae.pipelines.scheduler import check_boundary, check_steps, prepare_scheduler, shifted
from halovae.pipelines.stages import WRITE, StageTimeline
from halovae.serve.store import PARTS_END, STREAM, THUMBNAIL, VIDEO, around_part

OnStep = Callable[[int, int | None], None]
"""Called by all ranks together, with the number of steps done and of all."""
OnFrames = Callable[[int], None]
"""Called on the first rank with the number of frames that can be sent. Waits for a client that is far behind, and
raises where there is none any more."""
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


def make_video(
    session: Session, model: Model, task: Task, on_step: OnStep, on_frames: OnFrames
) -> dict[str, Any]:  # fmt: skip
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
    with _scheduled(model, per_call):
        on_step(0, generation.num_inference_steps)
        timeline = StageTimeline(session.device)
        with _Output(session, task, Fraction(fps), on_frames, crf=model.job.crf, lossless=lossless) as output:
            result = model.runner.run(generation, on_step, output.take)
            with timeline.stage(WRITE):
                output.finish()
    if not session.is_first:
        return {}
    frames, height, width = result.sizes
    sizes = {"num_frames": frames, "height": height, "width": width, "fps": fps}
    peak = max(result.peak_memory.values(), default=0)
    return {**sizes, "seed": result.seed, "timings": {**result.seconds, **timeline.seconds}, "peak_memory": peak}


class _Output:
    """The video of a task, written on the first rank while it is made: as its result, and for who watches meanwhile."""

    def __init__(
        self, session: Session, task: Task, fps: Fraction, on_frames: OnFrames, **settings: Any
    ) -> None:  # fmt: skip
        self._open, self._writers, self._count = ExitStack(), list[media.Writer](), 0
        self._task, self._on_frames = task, on_frames
        if session.is_first:
            stream = task.output.with_name(STREAM)
            stream.unlink(missing_ok=True)  # Of an attempt before: another file, for who still reads that one.
            for path, live in ((task.output, False), (stream, True)):
                self._writers.append(self._open.enter_context(media.Writer(path, fps, live=live, **settings)))

    def take(self, frames: media.Frames) -> None:
        with _writing():
            for frame in frames:
                if not self._count and self._task.kind == VIDEO:
                    first = Image.fromarray(frame)
                    first.thumbnail(_THUMBNAIL)
                    first.save(self._task.output.with_name(THUMBNAIL))
                for writer in self._writers:
                    writer.put(frame)
                self._count += 1
        self._on_frames(self._count)

    def finish(self) -> None:
        """Wait until all is written."""
        with _writing():
            self._open.close()

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)


def encode_clip(
    session: Session, model: Model, task: Task, on_step: OnStep, on_frames: OnFrames
) -> dict[str, Any]:  # fmt: skip
    """Encode a clip to latents, as `halovae encode` does.

    Raises:
        InputError: no clip that can be read.
    """
    assert task.input is not None
    given = dict(task.settings)
    watched = given.pop("stream", False)
    film = _open_clip(task.input, **given)
    fit = model.limits.fit(film.count, *film.size)
    vae = model.runner.pipeline.vae
    info = LatentsInfo(
        model=model.source.model,
        model_class=type(vae).__name__,
        scaling=scaling_of(vae.config),
        fps=film.pace.fps,
        times=film.pace.times,
        **vars(fit),
    )
    with ExitStack() as stack:
        stream = None
        if session.is_first and watched:
            stream = stack.enter_context(task.output.with_name(STREAM).open("wb"))
        writer = stack.enter_context(latents_file.LatentsWriter(task.output, model.limits.time_dim))
        stack.enter_context(torch.inference_mode())
        on_step(0, fit.padded_frames)
        frames = _Counted(codec.padded(film, fit, vae.dtype, session.device))
        encode = model.runner.streams.get("encode")
        at_once = 0 if watched else codec.LONG
        pieces = codec.encode_pieces(vae, model.limits, frames, fit.padded_frames, stream=encode, at_once=at_once)
        for piece in stack.enter_context(closing(pieces)):
            with together(session.group), _writing():
                if session.is_first:
                    writer.put(piece)
                if stream is not None:
                    content = latents_file.content_of({KEY: piece}, info.to_metadata())
                    head, end = around_part(len(content))
                    stream.write(head + content + end)
                    stream.flush()
                    on_frames(frames.count)
            on_step(frames.count, fit.padded_frames)
        if not session.is_first:
            return {}
        with _writing():
            if stream is not None:
                stream.write(PARTS_END)
            writer.finish(info)
        return {"shape": list(writer.shape)}


class _Counted(Iterator[Tensor]):
    """Frames, and how many were taken."""

    def __init__(self, frames: Iterator[Tensor]) -> None:
        self._frames, self.count = frames, 0

    def __next__(self) -> Tensor:
        frame = next(self._frames)
        self.count += 1
        return frame


def decode_latents(
    session: Session, model: Model, task: Task, on_step: OnStep, on_frames: OnFrames
) -> dict[str, Any]:  # fmt: skip
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
    vae = model.runner.pipeline.vae
    latents_file.check_shape(encoded, info, model.limits, type(vae).__name__)
    calls, count = codec.decode_calls(vae, model.limits, encoded), 0

    def place(part: Tensor) -> Tensor:
        return part.to(session.device, vae.dtype)

    fit = Fit(**{name: getattr(info, name) for name in Fit.__dataclass_fields__})
    made = _Output(session, task, info.fps, on_frames, times=info.times, lossless=lossless)
    with _stepping(on_step, calls) as after, made as output:
        stream = model.runner.streams.get("decode")
        with closing(codec.decode_pieces(vae, model.limits, encoded, after, stream, place)) as pieces:
            for piece in pieces:
                if session.is_first:
                    fit.check(fit.padded_frames, *piece.shape[2:])
                    output.take(codec.frames_of(fit.crop_piece(piece, count)))
                    count += piece.shape[1]
        if not session.is_first:
            return {}
        fit.check(count, fit.padded_height, fit.padded_width)
        output.finish()
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
