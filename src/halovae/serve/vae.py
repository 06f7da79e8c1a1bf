"""The routes under /v1/vae: the VAE alone, for other engines. Each answers when the work is done."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Request, UploadFile
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from halovae.serve.forms import saved
from halovae.serve.store import DECODE, ENCODE
from halovae.serve.videos import finished, service_of

router = APIRouter(prefix="/v1/vae", tags=["vae"])


@router.post("/encode")
async def encode(
    request: Request, clip: Annotated[UploadFile, File(description="A video or an image.")]
) -> FileResponse:
    """A clip to latents: a safetensors file, as `halovae encode` writes."""
    return await _through(request, clip, ENCODE, "application/octet-stream")


@router.post("/decode")
async def decode(
    request: Request, latents: Annotated[UploadFile, File(description="What encode has answered.")]
) -> FileResponse:
    """Latents to a video: an mp4, as `halovae decode` writes."""
    return await _through(request, latents, DECODE, "video/mp4")


async def _through(request: Request, upload: UploadFile, kind: str, media_type: str) -> FileResponse:
    service = service_of(request)
    service.check_room()
    job = service.store.new_folder(kind)
    try:
        await saved(upload, service.store.input(job))
    except BaseException:
        service.store.drop_files(job)
        raise
    limits = service.options.limits
    settings = {"pixels": limits.pixels, "frames": limits.frames}
    submitted = service.submit(job, kind, {"settings": settings})
    try:
        await finished(request, submitted)
    except BaseException:
        service.remove(job)
        raise

    async def forget() -> None:
        service.remove(job)

    path = service.store.output(job)
    return FileResponse(path, media_type=media_type, filename=path.name, background=BackgroundTask(forget))
