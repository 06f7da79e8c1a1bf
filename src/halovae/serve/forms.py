"""What clients may send, and what becomes of it: a job's settings and its file."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, cast

from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.media.images import open_image, upright_rgb
from halovae.pipelines.grid import TokenGrid
from halovae.serve.server_settings import ServeOptions, ServerLimits
from halovae.serve.service import ApiError, Service
from halovae.serve.store import DECODE, ENCODE, VIDEO, Store, StoredJob

_TEXT = 20_000
"""Characters of a prompt."""
_FPS = 16
_TOLD = 20
"""Faults that one answer tells."""
_ONE_BY_ONE = asyncio.Semaphore(1)
"""A picture takes much memory while it is looked at."""
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

Count = Annotated[int | None, Field(ge=1, le=100_000)]
Number = Annotated[float | None, Field(ge=0, le=1000, allow_inf_nan=False)]
Lossless = Annotated[
    bool | None, Field(description="Whether the mp4 keeps every pixel, as RGB, which few players show.")
]


class VideoFields(BaseModel, extra="forbid"):
    """The fields of a request for a video."""

    prompt: Annotated[str, Field(max_length=_TEXT, description="What to show.")]
    model: Annotated[str | None, Field(max_length=1000, description="The one that is served.")] = None
    seconds: Annotated[float | None, Field(gt=0, le=100_000, allow_inf_nan=False, description="Length.")] = None
    size: Annotated[str | None, Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$", description="WIDTHxHEIGHT.")] = None
    width: Count = None
    height: Count = None
    num_frames: Count = None
    fps: Annotated[int, Field(ge=1, le=1000)] = _FPS
    num_inference_steps: Count = None
    guidance_scale: Number = None
    guidance_scale_2: Number = None
    flow_shift: Annotated[float | None, Field(gt=0, le=1000, allow_inf_nan=False)] = None
    boundary_ratio: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    negative_prompt: Annotated[str | None, Field(max_length=_TEXT)] = None
    lossless: Lossless = None


class ClipFields(BaseModel, extra="forbid"):
    """Those of a request to encode, besides the file."""

    stream: Annotated[bool | None, Field(description="Whether the answer begins while the clip is worked on.")] = None


class LatentsFields(ClipFields):
    """Those of a request to decode, besides the file."""

    lossless: Lossless = None


FIELDS = {VIDEO: VideoFields, ENCODE: ClipFields, DECODE: LatentsFields}
FILES = {VIDEO: "input_reference", ENCODE: "clip", DECODE: "latents"}
"""Fields of a request for a job of a kind, and the one that is its file."""


def body_of(kind: str) -> dict[str, Any]:
    """The part of an OpenAPI document for the body of such a request; one for a video may be JSON too."""
    schema, file = FIELDS[kind].model_json_schema(), FILES[kind]
    if kind != VIDEO:
        schema["required"] = [file]
    address = {"type": "string", "pattern": "^data:", "description": "The image: data:image/png;base64,..."}
    shapes = {
        "multipart/form-data": {"type": "string", "format": "binary"},
        "application/json": {"type": "object", "properties": {"image_url": address}, "required": ["image_url"]},
    }
    content = {
        form: {"schema": {**schema, "properties": {**schema["properties"], file: shape}}}
        for form, shape in shapes.items()
        if kind == VIDEO or form == _FORMS[0]
    }
    return {"requestBody": {"required": True, "content": content}}


@dataclass
class FormFaults:
    """All that is wrong with a request, to be told in one answer."""

    found: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """By field."""

    def add(self, name: str, message: str) -> None:
        self.found.setdefault(name, []).append(message)

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Go on after the block when it refuses something."""
        try:
            yield
        except InputError as error:
            self.add(name, str(error))

    def check(self) -> None:
        """Tell them all, if there are any."""
        if self.found:
            messages = [*itertools.chain.from_iterable(self.found.values())]
            more = [f"and {len(messages) - _TOLD} more faults"] if len(messages) > _TOLD else []
            told = "; ".join(messages[:_TOLD] + more)
            raise ApiError(400, told, param=next(iter(self.found)), code="invalid_value")


async def accepted(request: Request) -> StoredJob:
    """Take in a request for a video: its fields checked, its image on the disk."""
    service: Service = request.app.state.service
    service.check_room()
    faults = FormFaults()
    async with _closing(request):
        sent = await _body(request, faults, (*_FORMS, "application/json"))
        image = _image_of(sent.pop(FILES[VIDEO], None), service.options, faults)
        settings = _settings_of(sent, service, faults)
        with _new_folder(service.store, VIDEO) as job:
            if image is not None:
                path = service.store.input(job)
                await asyncio.to_thread(_save, image, path)
                async with _ONE_BY_ONE:
                    await asyncio.to_thread(_check_image, path, service.options.limits, faults)
            faults.check()
            return service.submit(job, VIDEO, {"settings": settings})


async def accepted_file(request: Request, kind: str, meanwhile: bool) -> StoredJob:
    """Take in a request of another kind, of which a file is all but everything; `meanwhile` says that the answer begins
    before the end of the work, whatever the fields say."""
    service: Service = request.app.state.service
    service.check_room()
    faults, limits, name = FormFaults(), service.options.limits, FILES[kind]
    async with _closing(request):
        sent = await _body(request, faults, _FORMS[:1])
        file = sent.pop(name, None)
        if not isinstance(file, UploadFile) or not file.size:
            what = "empty" if isinstance(file, UploadFile) else "missing, or cut short"
            faults.add(name, f"{name} is {what}: send a file, in a form")
        settings = _fields_of(FIELDS[kind], sent, faults)
        faults.check()
        with _new_folder(service.store, kind) as job:
            await asyncio.to_thread(_save, file.file, service.store.input(job))
            settings |= {"stream": True} if meanwhile else {}
            settings |= {"pixels": limits.pixels, "frames": limits.frames}
            return service.submit(job, kind, {"settings": settings})


@asynccontextmanager
async def _closing(request: Request) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await request.close()


async def _body(request: Request, faults: FormFaults, kinds: Sequence[str]) -> dict[str, Any]:
    """The fields of a request, by name, from a body of one of these kinds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise ApiError(400, f"the body is of type {kind[:80]!r}: send {' or '.join(kinds)}")
    if kind in _FORMS:
        form = await request.form()
        for name, count in Counter(name for name, _ in form.multi_items()).items():
            if count > 1:
                faults.add(name, f"{name[:80]!r} is given {count} times: give it once")
        return dict(form)
    try:
        found = await request.json()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no JSON object: send the fields by name")
    return cast("dict[str, Any]", found)


def _image_of(value: Any, options: ServeOptions, faults: FormFaults) -> IO[bytes] | None:
    name = FILES[VIDEO]
    if value is None:
        if options.takes_image:
            faults.add(name, f"{name} is missing: {options.task} needs an image")
        return None
    if not options.takes_image:
        faults.add(name, f"{name} can't be used: this server does {options.task}")
    if isinstance(value, UploadFile):
        if value.size:
            return value.file
        faults.add(name, f"{name} is empty")
        return None
    address = cast("dict[str, Any]", value).get("image_url") if isinstance(value, dict) else None
    found = re.fullmatch(r"data:[^,]*;base64,(.+)", address, re.DOTALL) if isinstance(address, str) else None
    try:
        if found is not None and len(cast("dict[str, Any]", value)) == 1:
            return io.BytesIO(base64.b64decode(found[1], validate=True))
    except ValueError:
        pass
    faults.add(
        name, f"{name} is no image: send a file, or {{'image_url': 'data:image/png;base64,...'}} with the image in it"
    )
    return None


def _fields_of(model: type[BaseModel], sent: Mapping[str, Any], faults: FormFaults, **spare: Any) -> dict[str, Any]:
    """What the fields ask for, as far as they can be understood; `spare` stands for what is missing and has to be."""
    for name in sent:
        if name not in model.model_fields:
            faults.add(name, f"{name[:80]!r} is no field here")
    known = {name: value for name, value in sent.items() if name in model.model_fields}
    try:
        fields = model.model_validate(known)
    except ValidationError as error:
        for each in error.errors():
            name, message = described(each)
            faults.add(name, message)
            known.pop(name, None)
        fields = model.model_validate({**spare, **known})
    return fields.model_dump(exclude_none=True)


def _settings_of(sent: dict[str, Any], service: Service, faults: FormFaults) -> dict[str, Any]:
    given = _fields_of(VideoFields, sent, faults, prompt="")
    facts, limits = service.ranks.facts, service.options.limits
    model, size, served = given.pop("model", None), given.pop("size", None), service.options.model
    if model is not None and model != served:
        why = f"model {model[:80]!r} is not here: this server has {served!r}"
        raise ApiError(404, why, param="model", code="model_not_found")
    for name, value in zip(("width", "height"), map(int, size.split("x") if size else ()), strict=False):
        if given.setdefault(name, value) != value:
            faults.add(name, f"size {size} and {name} {given[name]} contradict each other: give one")
    if "seconds" in given and "num_frames" in given:
        faults.add("seconds", "seconds and num_frames exclude each other: give one")
    _check_limits(given, limits, faults)
    _check_grid(given, service.ranks.grid, facts, faults)
    for name, why in facts.get("refused", {}).items():
        if name in given:
            faults.add(name, why)
    steps = str(given.get("num_inference_steps"))
    if steps in facts.get("refused_steps", {}) and "flow_shift" not in given:  # It moves the noise levels.
        faults.add("num_inference_steps", facts["refused_steps"][steps])
    return given


def _check_limits(given: Mapping[str, Any], limits: ServerLimits, faults: FormFaults) -> None:
    frames = given.get("num_frames", given.get("seconds", 0) * given["fps"])
    if frames > limits.frames:
        faults.add("num_frames", f"{frames:g} frames are more than {limits.frames}: ask for fewer")
    steps = given.get("num_inference_steps", 0)
    if steps > limits.steps:
        faults.add("num_inference_steps", f"num_inference_steps {steps} is more than {limits.steps}: ask for fewer")
    if ("width" in given) != ("height" in given):
        faults.add("width", "width and height go together: give both, or neither")
    width, height = given.get("width", 1), given.get("height", 1)
    if width * height > limits.pixels:
        faults.add("size", f"{width}x{height} is more than {limits.pixels} pixels: ask for a smaller size")


def _check_grid(given: Mapping[str, Any], grid: TokenGrid | None, facts: Mapping[str, Any], faults: FormFaults) -> None:
    """As the ranks would: a client hears it at once, and not when its turn has come."""
    if grid is None:
        return
    before = len(faults.found)
    for name, check in (("width", grid.check_side), ("height", grid.check_side), ("num_frames", grid.check_count)):
        with faults.noted(name):
            if name in given:
                check(name, given[name])
    if len(faults.found) == before and "width" in given and "height" in given and "seconds" not in given:
        frames = given.get("num_frames", facts.get("frames", 1))
        with faults.noted("size"):
            grid.check_tokens(given["height"], given["width"], frames, facts.get("parts", 1), mark="")


@contextmanager
def _new_folder(store: Store, kind: str) -> Iterator[str]:
    """A job's folder, which is there after the block only if all went well in it."""
    job = store.new_folder(kind)
    try:
        yield job
    except BaseException:
        store.drop_files(job)
        raise


def _save(upload: IO[bytes], path: Path) -> None:
    """Write what was sent, so that it is there after a power cut too."""
    with path.open("wb") as file:
        upload.seek(0)
        shutil.copyfileobj(upload, file)
        file.flush()
        os.fsync(file.fileno())


def _check_image(path: Path, limits: ServerLimits, faults: FormFaults) -> None:
    """Refuse what is no still image, or not the whole of one."""
    name = FILES[VIDEO]
    try:
        with open_image(path) as image:
            if image is None:
                faults.add(name, f"{name} is no still image: send a PNG, JPEG or WebP")
            elif image.width * image.height > limits.image_pixels:
                faults.add(name, f"{name} has {image.width}x{image.height} pixels, more than {limits.image_pixels}")
            else:
                upright_rgb(path, image)
    except InputError as error:
        faults.add(name, str(error).replace(str(path), name))


def described(error: Mapping[str, Any]) -> tuple[str, str]:
    """The field that one of pydantic's errors blames, and what to say of it."""
    name, value = str((*error["loc"], "request")[0]), error.get("input")
    shown = f" ({str(value)[:60]!r})" if isinstance(value, (str, int, float)) else ""
    return name, f"{name}{shown}: {error['msg']}"


def video_document(
    job: StoredJob, progress: int, frames_ready: int, store: Store, options: ServeOptions
) -> dict[str, Any]:  # fmt: skip
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
        "frames_ready": result.get("num_frames", frames_ready),
        "fps": sizes["fps"],
        "timings": result.get("timings"),
        "peak_memory": result.get("peak_memory"),
        "seconds_waited": None if job.started is None else round(job.started - job.created, 3),
        "seconds_run": None if job.started is None or job.finished is None else round(job.finished - job.started, 3),
        "attempts": job.attempts,
        "jobs_ahead": store.ahead(job) if job.status == "queued" else 0,
    }
