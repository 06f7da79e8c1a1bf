"""The routes under /v1/videos, and those of the VAE alone under /v1/vae."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from halovae.serve import watching as watch
from halovae.serve.forms import FILES, accepted, accepted_file, body_of, video_document
from halovae.serve.service import ApiError, EndingError, Service
from halovae.serve.store import COMPLETED, DECODE, ENCODE, FAILED, QUEUED, VIDEO, StoredJob

_HEARTBEAT = 10.0
"""Seconds after which a stream of events says that it is still there."""
_PRESENCE = 0.5
"""Seconds between two looks whether a client that waits is still there."""

router = APIRouter(prefix="/v1/videos", tags=["videos"])
vae = APIRouter(prefix="/v1/vae", tags=["vae"])
_BODY = body_of(VIDEO)
_PICTURES: dict[int | str, dict[str, Any]] = {200: {"content": {kind: {} for kind in watch.KINDS}}}


async def _service(request: Request) -> Service:
    return request.app.state.service


Serving = Annotated[Service, Depends(_service)]
"""The service behind a request."""


async def _video(service: Serving, video_id: Annotated[str, InPath(max_length=100, pattern=r"^[ -~]*$")]) -> StoredJob:
    return _known(service, video_id)


Video = Annotated[StoredJob, Depends(_video)]
"""That a path names."""


@router.post("", openapi_extra=_BODY)
async def create(request: Request, service: Serving) -> dict[str, Any]:
    """Accept a job; it runs when those before it are done."""
    return _document(service, await accepted(request))


@router.post("/sync", openapi_extra=_BODY)
async def create_and_wait(request: Request, service: Serving) -> FileResponse:
    """Make a video and answer with it. A client that hangs up cancels it."""
    job = await accepted(request)
    return _content(service, await _finished(request, service, job.id))


@router.get("")
async def list_videos(
    service: Serving,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Videos by the time they were asked for."""
    start = None if after is None else _known(service, after, "after")
    jobs = service.store.videos(start, limit + 1, newest_first=order == "desc")
    data = [_document(service, job) for job in jobs[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": len(jobs) > limit}


@router.get("/{video_id}")
async def retrieve(service: Serving, video: Video) -> dict[str, Any]:
    """One job: its status, progress in percent, seconds by stage, and its error."""
    return _document(service, video)


@router.delete("/{video_id}")
async def delete(service: Serving, video: Video) -> dict[str, Any]:
    """Forget a video; a job that waits or runs is cancelled."""
    service.remove(video.id)
    return _gone(video.id)


@router.get("/{video_id}/content")
async def content(
    service: Serving,
    video: Video,
    variant: Annotated[Literal["video", "thumbnail", "input_reference"], Query()] = "video",
) -> FileResponse:
    """The mp4; its first frame, small, as a JPEG; or the image that it was made from. Ranges too."""
    return _content(service, video, variant)


@router.get("/{video_id}/stream", responses=_PICTURES)
async def stream(request: Request, service: Serving, video: Video) -> Response:
    """The video while it is decoded, and afterwards. By `Accept` an mp4, which comes in fragments, or its pictures."""
    kind = watch.wanted(request.headers.get("accept", "*/*"))
    async for job in service.changes(video.id, _PRESENCE):
        if job is None or await request.is_disconnected():
            break
        if job.status == QUEUED:
            ahead = service.store.ahead(job)
            waits = f"it waits, with {ahead} jobs before it" if ahead else "it waits for its turn"
            raise ApiError(409, f"this video is queued: {waits}; ask again when it is in_progress", code="not_ready")
        if job.is_over:
            found = _content(service, job)
            return found if kind == watch.MP4 else watch.of_file(service.store.output(job.id), kind)
        if service.frames_ready(job) and (answer := watch.of_job(service, job, kind)) is not None:
            return answer
    raise ApiError(404, f"video {video.id!r} was removed", param="video_id", code="not_found")


@router.get("/{video_id}/events")
async def events(service: Serving, video: Video) -> StreamingResponse:
    """The job now and at each change, as server-sent events, until it is over."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(service, video.id), media_type="text/event-stream", headers=headers)


async def _events(service: Service, video_id: str) -> AsyncIterator[str]:
    last = ""
    with suppress(EndingError):
        async for job in service.changes(video_id, _HEARTBEAT):
            line = json.dumps(_gone(video_id) if job is None else _document(service, job))
            yield ": still here\n\n" if line == last else f"data: {line}\n\n"
            last = line


@vae.post("/encode", openapi_extra=body_of(ENCODE))
async def encode(request: Request, service: Serving) -> Response:
    """A clip, a video or an image, to latents: a safetensors file, as `halovae encode` writes. With `stream` the answer
    is multipart/mixed and begins with the first latents: each part is such a file of the latents of further frames.
    """
    return await _through(request, service, ENCODE, "application/octet-stream")


@vae.post("/decode", openapi_extra=body_of(DECODE), responses=_PICTURES)
async def decode(request: Request, service: Serving) -> Response:
    """Latents, as encode has answered, to a video: an mp4, as `halovae decode` writes. With `stream`, and for pictures
    by `Accept`, the answer begins with the first frames.
    """
    kind = watch.wanted(request.headers.get("accept", "*/*"))
    return await _through(request, service, DECODE, watch.MP4, kind)


async def _through(
    request: Request, service: Service, kind: str, media_type: str, watched: str = watch.MP4
) -> Response:  # fmt: skip
    """Answers when the work is done or, where it is watched, while it is; keeps nothing of it."""
    accepted = await accepted_file(request, kind, watched != watch.MP4)
    job, meanwhile = accepted.id, accepted.request["settings"].get("stream")
    try:
        async for now in _progress(request, service, job):
            if meanwhile and service.frames_ready(now):
                answer = watch.of_job(service, now, watched, lambda: service.remove(job))
                if answer is not None:
                    return answer
        if kind == ENCODE and meanwhile:
            return watch.in_one_part(service.store.output(job), lambda: service.remove(job))
        if watched != watch.MP4:
            return watch.of_file(service.store.output(job), watched, lambda: service.remove(job))
    except BaseException:
        service.remove(job)
        raise

    async def forget() -> None:
        service.remove(job)

    path = service.store.output(job)
    return FileResponse(path, media_type=media_type, filename=path.name, background=BackgroundTask(forget))


async def _progress(request: Request, service: Service, job: str) -> AsyncIterator[StoredJob]:
    """A job at each change until it is completed, as long as the client waits for it.

    Raises:
        ApiError: it has failed, or was removed.
    """
    async for now in service.changes(job, _PRESENCE):
        if now is None:
            raise ApiError(409, "the job was removed before it was done", code="cancelled")
        if now.status == FAILED:
            error = now.error or {}
            refused = error.get("code") == "invalid_request"
            param = FILES[now.kind] if refused and now.kind != VIDEO else None
            raise ApiError(400 if refused else 500, str(error.get("message")), param=param, code=error.get("code"))
        yield now
        if now.status != COMPLETED and await request.is_disconnected():
            service.remove(now.id)


async def _finished(request: Request, service: Service, job: str) -> StoredJob:
    """Wait for a job's end."""
    async for now in _progress(request, service, job):
        if now.status == COMPLETED:
            return now
    raise ApiError(409, "the job has no end", code="cancelled")


def _known(service: Service, video_id: str, param: str = "video_id") -> StoredJob:
    job = service.store.get(video_id)
    if job is None or job.kind != VIDEO:
        raise ApiError(404, f"there is no video {video_id!r}", param=param, code="not_found")
    return job


def _gone(video_id: str) -> dict[str, Any]:
    return {"id": video_id, "object": "video.deleted", "deleted": True}


def _document(service: Service, job: StoredJob) -> dict[str, Any]:
    return video_document(job, service.progress(job), service.frames_ready(job), service.store, service.options)


class _File(FileResponse):
    """Says in the shape of all errors that there is no such part of it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def checked(message: Message) -> None:
            if message.get("status", 200) >= 400:
                asked, size = Headers(scope=scope).get("range", "")[:80], Path(self.path).stat().st_size
                why = f"Range: {asked!r} can't be used: ask for bytes=FIRST-LAST of the {size} bytes that there are"
                raise ApiError(416, why, headers={"Content-Range": f"bytes */{size}"})
            await send(message)

        await super().__call__(scope, receive, checked)


def _content(service: Service, job: StoredJob, variant: str = "video") -> FileResponse:
    store = service.store
    path, kind = {
        "video": (store.output(job.id), "video/mp4"),
        "thumbnail": (store.thumbnail(job.id), "image/jpeg"),
        # What clients send is never told to be anything that a browser would run.
        "input_reference": (store.input(job.id), "application/octet-stream"),
    }[variant]
    if variant != "input_reference" and job.status == FAILED:
        raise ApiError(409, f"this video has failed: {(job.error or {}).get('message')}", code="failed")
    if variant != "input_reference" and job.status != COMPLETED:
        raise ApiError(409, f"this video is {job.status}: wait until it is completed", code="not_ready")
    if not path.exists():
        raise ApiError(404, f"this job has no {variant} in the server's store", code="not_found")
    return _File(
        path,
        media_type=kind,
        filename=f"{job.id}{path.suffix}",
        content_disposition_type="inline",
        headers={"X-Video-Id": job.id, "X-Content-Type-Options": "nosniff"},
    )
