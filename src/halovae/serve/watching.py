"""A video for who watches it while it is made: an mp4 in fragments, or its pictures."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.types import Receive, Scope, Send

from halovae.media.reader import opened
from halovae.media.video import LivePictures, codec_words
from halovae.serve.service import ApiError, EndingError, Service
from halovae.serve.store import COMPLETED, ENCODE, PARTS_END, PARTS_TYPE, RUNNING, VIDEO, StoredJob, around_part

T = TypeVar("T")
MP4, PARTS, JPEG, PNG = "video/mp4", "multipart/x-mixed-replace", "image/jpeg", "image/png"
KINDS = (MP4, PARTS, JPEG, PNG)
"""What can be asked for. Pictures come as parts of one answer; they are JPEGs, unless PNG is asked for."""
_LOOK = 0.2
"""Seconds between two looks at a file that grows, where nothing else tells."""
_CHUNK = 2**16
_QUALITY = 90
After = Callable[[], object]


def _nothing() -> None:
    return


def wanted(accept: str) -> str:
    """The kind that a client likes best of those that there are, by the header `Accept`."""
    found: list[tuple[float, str]] = []
    for words in accept.split(","):
        kind, _, rest = words.strip().lower().partition(";")
        weight = re.search(r"\bq=([\d.]{1,5})", rest)
        pattern = re.escape(kind.strip()).replace(r"\*", ".*")
        match = next((each for each in KINDS if re.fullmatch(pattern, each)), None)
        liking = float(weight[1]) if weight and weight[1].count(".") < 2 and weight[1] != "." else 1.0
        if match is not None and liking > 0:
            found.append((liking, match))
    if not found:
        raise ApiError(406, f"Accept: {accept[:80]!r} names nothing that there is: ask for {' or '.join(KINDS)}")
    return max(found, key=lambda each: each[0])[1]


class LiveAnswer(StreamingResponse):
    """An answer without an end where what it tells of has none: so its client knows. What is to be done `after` it is
    done in the event loop, however it ends."""

    def __init__(self, words: AsyncIterator[bytes] | Iterator[bytes], kind: str, after: After) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        super().__init__(words, media_type=kind, headers=headers)
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()

    async def stream_response(self, send: Send) -> None:
        with suppress(_BrokenOffError, EndingError):
            await super().stream_response(send)


class _BrokenOffError(Exception):
    """There will be no more of it."""


def of_file(path: Path, kind: str, after: After = _nothing) -> LiveAnswer:
    """A finished video as pictures."""

    def pictures() -> Iterator[Image.Image]:
        with opened(path) as source:
            yield from (shown.picture for shown in source.pictures)

    return _in_parts(_in_threads(pictures()), kind, after)


def in_one_part(path: Path, after: After) -> LiveAnswer:
    """Finished latents as those that come in parts."""

    def parts() -> Iterator[bytes]:
        with path.open("rb") as file:
            head, end = around_part(path.stat().st_size)
            yield head
            while words := file.read(_CHUNK):
                yield words
            yield end + PARTS_END

    return LiveAnswer(parts(), PARTS_TYPE, after)


def of_job(service: Service, job: StoredJob, kind: str, after: After = _nothing) -> LiveAnswer | None:
    """A video that is being made, from its beginning on; None where there is nothing of it yet."""
    try:
        file = service.store.stream(job.id).open("rb")
    except FileNotFoundError:
        return None
    job = service.store.get(job.id) or job  # It may have begun since it was looked up.
    beginning = file.read(_CHUNK)
    file.seek(0)
    words = _growing(service, job, file)
    if job.kind == ENCODE and beginning:
        return LiveAnswer(words, PARTS_TYPE, after)
    codec = codec_words(beginning) if job.kind != ENCODE else None
    if not codec:
        file.close()
        return None
    if kind == MP4:
        return LiveAnswer(words, f'{MP4}; codecs="{codec}"', after)
    return _in_parts(_decoded(words), kind, after)


async def _growing(service: Service, job: StoredJob, file: IO[bytes]) -> AsyncIterator[bytes]:
    """What is in the file of a running job, and what comes, until the job is over."""
    with file:
        async for now in service.changes(job.id, _LOOK):
            while words := file.read(_CHUNK):
                yield words
                if job.kind != VIDEO:  # Else any number of clients may watch, each as it likes.
                    service.taken(job.id, file.tell())
            if now is not None and now.status == COMPLETED:
                return
            if now is None or now.status != RUNNING or now.attempts != job.attempts:
                raise _BrokenOffError


async def _decoded(chunks: AsyncIterator[bytes]) -> AsyncIterator[Image.Image]:
    pictures = LivePictures()
    async for words in chunks:
        async for picture in _in_threads(pictures.feed(words)):
            yield picture


async def _in_threads(values: Iterator[T]) -> AsyncIterator[T]:
    """Values whose making takes a while."""
    while (value := await asyncio.to_thread(next, values, None)) is not None:
        yield value


def _in_parts(pictures: AsyncIterator[Image.Image], kind: str, after: After) -> LiveAnswer:
    kind = PNG if kind == PNG else JPEG

    def part(picture: Image.Image) -> bytes:
        content = io.BytesIO()
        picture.save(content, format="PNG" if kind == PNG else "JPEG", quality=_QUALITY)
        head = f"--frame\r\nContent-Type: {kind}\r\nContent-Length: {content.tell()}\r\n\r\n"
        return head.encode() + content.getvalue() + b"\r\n"

    async def parts() -> AsyncIterator[bytes]:
        async for picture in pictures:
            yield await asyncio.to_thread(part, picture)
        yield b"--frame--\r\n"

    return LiveAnswer(parts(), f"{PARTS}; boundary=frame", after)
