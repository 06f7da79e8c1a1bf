"""What clients may send, and what becomes of it: a job's settings and its file."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

from fastapi import File, Form, Request, UploadFile

from halovae.errors import InputError
from halovae.media.images import open_image
from halovae.pipelines.grid import Grid
from halovae.serve.errors import ApiError
from halovae.serve.service import Service
from halovae.serve.settings import Limits, ServeOptions
from halovae.serve.store import Job, Store

_TEXT = 20_000
"""Characters of a prompt."""
_FPS = 16

Count = Annotated[int | None, Form(ge=1, le=100_000)]
Number = Annotated[float | None, Form(ge=0, le=1000, allow_inf_nan=False)]
Words = Annotated[str | None, Form(max_length=_TEXT)]


async def video_form(
    request: Request,
    prompt: Annotated[str, Form(max_length=_TEXT, description="What to show.")],
    input_reference: Annotated[UploadFile | None, File(description="The image to begin with.")] = None,
    model: Annotated[str | None, Form(max_length=1000, description="The one that is served.")] = None,
    seconds: Annotated[float | None, Form(gt=0, le=100_000, allow_inf_nan=False, description="Length.")] = None,
    size: Annotated[str | None, Form(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$", description="WIDTHxHEIGHT.")] = None,
    width: Count = None,
    height: Count = None,
    num_frames: Count = None,
    fps: Annotated[int | None, Form(ge=1, le=1000)] = None,
    num_inference_steps: Count = None,
    guidance_scale: Number = None,
    guidance_scale_2: Number = None,
    flow_shift: Annotated[float | None, Form(gt=0, le=1000, allow_inf_nan=False)] = None,
    boundary_ratio: Annotated[float | None, Form(ge=0, le=1, allow_inf_nan=False)] = None,
    seed: Annotated[int | None, Form(ge=0, lt=2**63)] = None,
    negative_prompt: Words = None,
) -> VideoRequest:
    """The fields of a request for a video, checked."""
    given = {name: value for name, value in locals().items() if name not in _NOT_SETTINGS and value is not None}
    service: Service = request.app.state.service
    options = service.options
    _check_model(model, options)
    given["fps"] = fps or _FPS
    _settle_size(given, size)
    if "seconds" in given and "num_frames" in given:
        raise ApiError(400, "seconds and num_frames exclude each other: give one", param="seconds")
    _check_limits(given, options.limits)
    _check_grid(given, service.ranks.grid)
    if options.takes_image and input_reference is None:
        raise ApiError(400, f"input_reference is missing: {options.task} needs an image", param="input_reference")
    if not options.takes_image and input_reference is not None:
        raise ApiError(400, f"input_reference can't be used: this server does {options.task}", param="input_reference")
    return VideoRequest(given, input_reference)


class VideoRequest:
    """A checked request.

    Attributes:
        settings: by name; of `Generation`, of the scheduler, and `fps`, `seconds`.
        image: what was sent with it.
    """

    def __init__(self, settings: dict[str, Any], image: UploadFile | None) -> None:
        self.settings, self.image = settings, image


_NOT_SETTINGS = ("request", "input_reference", "model", "size")


def _check_model(model: str | None, options: ServeOptions) -> None:
    if model is not None and model != options.model:
        raise ApiError(
            404, f"model {model[:80]!r} is not here: this server has {options.model!r}", param="model",
            code="model_not_found",
        )  # fmt: skip


def _settle_size(given: dict[str, Any], size: str | None) -> None:
    if size is None:
        return
    width, height = map(int, size.split("x"))
    for name, value in (("width", width), ("height", height)):
        if given.setdefault(name, value) != value:
            raise ApiError(400, f"size {size} and {name} {given[name]} contradict each other: give one", param=name)


def _check_limits(given: dict[str, Any], limits: Limits) -> None:
    frames = given.get("num_frames", given.get("seconds", 0) * given["fps"])
    if frames > limits.frames:
        raise ApiError(400, f"{frames:g} frames are more than {limits.frames}: ask for fewer", param="num_frames")
    steps = given.get("num_inference_steps", 0)
    if steps > limits.steps:
        raise ApiError(
            400, f"num_inference_steps {steps} is more than {limits.steps}: ask for fewer", param="num_inference_steps"
        )  # fmt: skip
    if ("width" in given) != ("height" in given):
        raise ApiError(400, "width and height go together: give both, or neither", param="width")
    width, height = given.get("width", 1), given.get("height", 1)
    if width * height > limits.pixels:
        raise ApiError(
            400, f"{width}x{height} is more than {limits.pixels} pixels: ask for a smaller size", param="size"
        )


def _check_grid(given: dict[str, Any], grid: Grid | None) -> None:
    """As the ranks would: a client hears it at once, and not when its turn has come."""
    if grid is None:
        return
    for name, check in (("width", grid.check_side), ("height", grid.check_side), ("num_frames", grid.check_count)):
        if name not in given:
            continue
        try:
            check(name, given[name])
        except InputError as error:
            raise ApiError(400, str(error), param=name) from error


async def saved(upload: UploadFile, path: Path) -> None:
    """Write what was sent to `path`, so that it is there after a power cut too.

    Raises:
        ApiError: it is empty.
    """

    def write() -> int:
        with path.open("wb") as file:
            upload.file.seek(0)
            shutil.copyfileobj(upload.file, file)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    if not await asyncio.to_thread(write):
        raise ApiError(400, "the file that was sent is empty", param="input_reference")


async def check_image(path: Path, limits: Limits) -> None:
    """Refuse what is no still image, by its header.

    Raises:
        ApiError: says why.
    """
    try:
        size = await asyncio.to_thread(_image_size, path)
    except InputError as error:
        raise ApiError(400, str(error).replace(str(path), "input_reference"), param="input_reference") from error
    if size is None:
        raise ApiError(400, "input_reference is no still image: send a PNG, JPEG or WebP", param="input_reference")
    if size[0] * size[1] > limits.image_pixels:
        raise ApiError(
            400, f"input_reference has {size[0]}x{size[1]} pixels, more than {limits.image_pixels}",
            param="input_reference",
        )  # fmt: skip


def _image_size(path: Path) -> tuple[int, int] | None:
    with open_image(path) as image:
        return None if image is None else image.size


def video_document(job: Job, progress: int, store: Store, options: ServeOptions) -> dict[str, Any]:
    """A job as clients see it: what OpenAI's clients know, and then more."""
    settings, result = job.request["settings"], job.result or {}
    sizes = {**settings, **result}
    seconds = sizes.get("num_frames", 0) / sizes["fps"] if "num_frames" in sizes else sizes.get("seconds")
    known = "width" in sizes and "height" in sizes
    return {
        "id": job.id,
        "object": "video",
        "status": job.status,
        "progress": progress,
        "model": options.model,
        "prompt": settings.get("prompt"),
        "created_at": int(job.created),
        "started_at": None if job.started is None else int(job.started),
        "completed_at": None if job.finished is None else int(job.finished),
        "expires_at": None if job.finished is None else int(job.finished + options.keep),
        "seconds": "" if seconds is None else f"{seconds:g}",
        "size": f"{sizes['width']}x{sizes['height']}" if known else "",
        "error": job.error,
        "remixed_from_video_id": None,
        "settings": settings,
        "seed": sizes.get("seed"),
        "num_frames": sizes.get("num_frames"),
        "fps": sizes["fps"],
        "timings": result.get("timings"),
        "peak_memory": result.get("peak_memory"),
        "seconds_waited": None if job.started is None else round(job.started - job.created, 3),
        "seconds_run": None if job.started is None or job.finished is None else round(job.finished - job.started, 3),
        "attempts": job.attempts,
        "jobs_ahead": store.ahead(job) if job.status == "queued" else 0,
    }
