"""The routes under /v1/vae: the VAE alone, for other engines. Each answers when the work is done."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from halovae.serve.forms import accepted_file, body_of
from halovae.serve.store import DECODE, ENCODE
from halovae.serve.video_routes import finished, service_of

router = APIRouter(prefix="/v1/vae", tags=["vae"])


@router.post("/encode", openapi_extra=body_of("clip"))
async def encode(request: Request) -> FileResponse:
    """A clip, a video or an image, to latents: a safetensors file, as `halovae encode` writes."""
    return await _through(request, "clip", ENCODE, "application/octet-stream")


@router.post("/decode", openapi_extra=body_of("latents"))
async def decode(request: Request) -> FileResponse:
    """Latents, as encode has answered, to a video: an mp4, as `halovae decode` writes."""
    return await _through(request, "latents", DECODE, "video/mp4")


async def _through(request: Request, name: str, kind: str, media_type: str) -> FileResponse:
    service = service_of(request)
    job = (await accepted_file(request, kind, name)).id
    try:
        await finished(request, job)
    except BaseException:
        service.remove(job)
        raise

    async def forget() -> None:
        service.remove(job)

    path = service.store.output(job)
    return FileResponse(path, media_type=media_type, filename=path.name, background=BackgroundTask(forget))
