"""From accepted jobs to results: one job at a time goes to the ranks, the oldest first. Its counters and errors too."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException

from halovae.base.files import first_line, reason
from halovae.serve.ranks import SILENT_SECONDS, Message, Ranks
from halovae.serve.server_settings import ServeOptions
from halovae.serve.store import COMPLETED, ERRORS, NO_ROOM, QUEUED, Store, StoredJob

ATTEMPTS = 2
"""How often a job is begun at most, when the ranks end while they work on it: it may be the job that ends them."""
_TIDY_SECONDS = 60.0
_RETRY_SECONDS = 2.0
_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)

log = logging.getLogger(__name__)


class ApiError(HTTPException):
    """A request that can't be answered as asked: by the field `param`, if it is one, and for programs by `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # What was sent as JSON may hold halves of characters, which no answer can.
        super().__init__(status, message.encode("utf-8", "backslashreplace").decode(), headers)
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode()
        self.code = code


class EndingError(ApiError):
    """Nobody can wait for a change any more."""

    def __init__(self) -> None:
        super().__init__(503, "the server is ending: ask again when it is there again", headers={"Retry-After": "5"})


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "halovae_http_requests", "Requests.", ("method", "route", "status"), registry=self._registry
        )
        self.jobs = Counter("halovae_jobs", "Jobs that are over.", ("kind", "status"), registry=self._registry)
        self.restarts = Counter("halovae_group_restarts", "Groups of ranks that ended.", registry=self._registry)
        self._waited = Histogram(
            "halovae_job_wait_seconds", "From acceptance to beginning.", buckets=_BUCKETS, registry=self._registry
        )
        self._took = Histogram(
            "halovae_job_seconds", "From beginning to end.", ("kind",), buckets=_BUCKETS, registry=self._registry
        )
        self._stages = Counter(
            "halovae_stage_seconds", "Of the first rank, by stage.", ("stage",), registry=self._registry
        )

    def gauge(self, name: str, words: str, value: Callable[[], float]) -> None:
        """Count something that is known when it is asked for."""
        Gauge(name, words, registry=self._registry).set_function(value)

    def finished(self, job: StoredJob) -> None:
        """A job is over."""
        self.jobs.labels(job.kind, job.status).inc()
        if job.started is not None and job.finished is not None:
            self._waited.observe(max(0.0, job.started - job.created))
            self._took.labels(job.kind).observe(max(0.0, job.finished - job.started))
        for stage, seconds in (job.result or {}).get("timings", {}).items():
            self._stages.labels(stage).inc(max(0.0, seconds))

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


@dataclass
class _Current:
    """What the ranks work on."""

    id: str
    progress: int = 0
    frames: int = 0
    cancelled: bool = False


class Service:
    """The jobs of one server. Everything in it happens in one event loop.

    What becomes of a job is written down when the store can be written. Until then nothing new is begun; `trouble` says
    why, and is empty when it can.
    """

    def __init__(self, options: ServeOptions, store: Store, ranks: Ranks, metrics: Metrics) -> None:
        self.options, self.store, self.ranks, self.metrics = options, store, ranks, metrics
        self.trouble = ""
        self._unwritten: deque[Callable[[], object]] = deque()
        self._free_wanted = 0
        self._current: _Current | None = None
        self._stopped = self._leaving = False
        self._change = asyncio.Event()
        """Of the next thing that changes."""
        self._tidying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if waiting := self.store.count(QUEUED):
            log.info("recovered %s", _count(waiting, "job"))
        self._tidying = asyncio.create_task(self._tidy())

    def leave(self) -> None:
        """The server is about to end: who waits for a change hears it now."""
        self._leaving = True
        self._changed()

    async def stop(self) -> None:
        """Leave what the ranks work on for the next start."""
        self._stopped = True
        current, self._current = self._current, None
        if current is not None and not current.cancelled:
            # It is no fault of the job.
            self._write(lambda: self.store.requeue(current.id, counts=False))
        if self._tidying is not None:
            self._tidying.cancel()
            with suppress(asyncio.CancelledError):
                await self._tidying

    # ---- for clients -------------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Turn a job away when too many wait, with the seconds after which there should be room, or when it can't be
        kept."""
        if self.trouble:
            raise _not_kept(self.trouble)
        waiting = self.store.count(QUEUED)
        if waiting >= self.options.limits.queue:
            seconds = max(1, math.ceil(self.store.usual_seconds()))
            raise ApiError(
                429,
                f"{waiting} jobs wait already: try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, job: str, kind: str, request: Mapping[str, Any]) -> StoredJob:
        """Accept a job whose files are in its folder."""
        self.check_room()
        added = self.store.add(job, kind, request)
        self._changed()
        self._dispatch()
        return added

    def remove(self, job: str) -> None:
        """Forget a job; if it runs, the ranks leave it at their next step."""
        found = self.store.get(job)
        if found is None:
            return
        self.store.remove(job)
        if self._current is not None and self._current.id == job:
            self._current.cancelled = True
            self.ranks.send({"cancel": job})
        if not found.is_over:
            self.metrics.jobs.labels(found.kind, "cancelled").inc()
        self._changed()

    def taken(self, job: str, count: int) -> None:
        """A client has got so many bytes of what a running job has made so far."""
        self.ranks.send({"taken": job, "bytes": count})

    def no_room(self, error: Exception) -> ApiError:
        """What to say when a request has failed by one of the store's `ERRORS`.

        It may have wanted more than others do: they are turned away only when there is no room for them either.
        """
        if not self.trouble:
            try:
                self.store.check_room()
            except ERRORS as again:
                self._wait_for_room(again)
        return _not_kept(_why(error))

    def progress(self, job: StoredJob) -> int:
        """In percent. Of a running job: of its steps."""
        if job.status == COMPLETED:
            return 100
        return self._current.progress if self._current is not None and self._current.id == job.id else 0

    def frames_ready(self, job: StoredJob) -> int:
        """How many frames can be watched already, while it runs."""
        return self._current.frames if self._current is not None and self._current.id == job.id else 0

    async def changes(self, job: str, seconds: float) -> AsyncIterator[StoredJob | None]:
        """The job now, and whenever something has changed or so many seconds have passed, until it is over or gone
        (None).

        Raises:
            EndingError: the server ends before that.
        """
        while True:
            change, found = self._change, self.store.get(job)  # What changes while the caller is at this is not missed.
            yield found
            if found is None or found.is_over:
                return
            if self._leaving:
                raise EndingError
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(change.wait(), seconds)

    def health(self) -> dict[str, Any]:
        """Whether every rank answers, and what is going on."""
        silent = time.monotonic() - self.ranks.heard
        # While ranks work they speak at every step only; a rank that dies or stops then ends the group.
        answers = self.ranks.ready and (self._current is not None or silent < SILENT_SECONDS)
        state = "ready" if answers else "silent" if self.ranks.ready else "loading" if not self.ranks.trouble else ""
        try:
            queued = self.store.count(QUEUED)
        except ERRORS as error:
            self.no_room(error)
            queued = None
        return {
            "status": f"the store can't be written: {self.trouble}" if self.trouble else state or "restarting",
            "ready": answers and not self.trouble,
            "ranks": self.options.ranks,
            "busy": self._current is not None,
            "queued": queued,
            "starts": self.ranks.starts,
            "last_trouble": self.ranks.trouble or None,
        }

    # ---- for the ranks -----------------------------------------------------------------------------------------------

    def on_message(self, message: Message) -> None:
        """What the first rank says."""
        current = self._current
        if message["event"] == "ready":
            log.info("ready: %s on %s", self.options.model, _count(self.options.ranks, "rank"))
        if current is not None and message.get("id") == current.id:
            if message["event"] == "progress":
                # Decoding and writing come after the last step.
                current.progress = int(95 * message["done"] / (message["total"] or math.inf))
            elif message["event"] == "frames":
                current.frames = message["count"]
            else:
                self._current = None
                self._conclude(current, message)
            self._changed()
        self._dispatch()

    def on_end(self, why: str) -> None:
        """The ranks have ended. What they worked on is run again, or given up."""
        current, self._current = self._current, None
        self.metrics.restarts.inc()

        def put_back() -> None:
            job = None if current is None or current.cancelled else self.store.get(current.id)
            if job is not None and job.attempts < ATTEMPTS:
                self.store.requeue(job.id)
            elif job is not None:
                self._fail(job.id, "server_error", f"the ranks ended {ATTEMPTS} times while they worked on it: {why}")

        self._write(put_back)
        self._changed()

    def _dispatch(self) -> None:
        """Give the ranks the next job, if they are free."""
        try:
            while not self._stopped and not self.trouble and self._current is None and self.ranks.ready:
                job = self.store.next()
                if job is None:
                    return
                if job.attempts < ATTEMPTS:
                    self.store.begin(job.id)
                    self._hand_over(job)
                else:  # The server itself has ended with it.
                    why = f"the server ended {ATTEMPTS} times while it worked on this job"
                    self._fail(job.id, "server_error", why)
                self._changed()
        except ERRORS as error:
            self._wait_for_room(error)

    def _hand_over(self, job: StoredJob) -> None:
        self._current = _Current(job.id)
        path = self.store.input(job.id)
        self.ranks.send(
            {
                "id": job.id,
                "kind": job.kind,
                "settings": job.request["settings"],
                "input": str(path) if path.exists() else None,
                "output": str(self.store.output(job.id)),
            }
        )

    def _conclude(self, current: _Current, message: Message) -> None:
        job = current.id
        if current.cancelled:
            self.store.drop_files(job)
        elif message["event"] == "done":
            self._write(lambda: self._finished(self.store.complete(job, message["result"])))
        elif message.get("code") == NO_ROOM:
            # More than this was free, and not enough: less than twice as much would only be tried in vain.
            with suppress(OSError):
                self._free_wanted = 2 * self.store.free
            self._write(lambda: self.store.requeue(job, counts=False))
            self._wait_for_room(message["message"])
        else:
            self._write(lambda: self._fail(job, message["code"], message["message"]))

    def _fail(self, job: str, code: str, message: str) -> None:
        self._finished(self.store.fail(job, code, message))

    def _finished(self, job: StoredJob | None) -> None:
        if job is not None:
            self.metrics.finished(job)
            log.info("%s %s%s", job.id, job.status, f": {job.error['message']}" if job.error else "")

    # ---- for the store -----------------------------------------------------------------------------------------------

    def _write(self, change: Callable[[], object]) -> None:
        """Change the store, now or as soon as it can be written."""
        self._unwritten.append(change)
        try:
            self._write_down()
        except ERRORS as error:
            self._wait_for_room(error)

    def _write_down(self) -> None:
        while self._unwritten:
            self._unwritten[0]()
            self._unwritten.popleft()

    def _wait_for_room(self, error: Exception | str) -> None:
        """Accept and begin nothing until the store can be written."""
        if not self.trouble:
            log.error("the store can't be written: %s; no job is accepted or begun until it can", _why(error))
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._recover)
        self.trouble = _why(error)

    def _recover(self) -> None:
        if self._stopped:
            return
        try:
            self.store.check_room(self._free_wanted)
            self._write_down()
        except ERRORS as error:
            self.trouble = _why(error)
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._recover)
            return
        log.info("the store can be written again")
        self.trouble, self._free_wanted = "", 0
        self._dispatch()
        self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _tidy(self) -> None:
        while True:
            try:
                self.store.expire(self.options.keep)
            except ERRORS as error:
                self.no_room(error)
            await asyncio.sleep(_TIDY_SECONDS)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _why(error: Exception | str) -> str:
    return error if isinstance(error, str) else reason(error) if isinstance(error, OSError) else first_line(error)


def _not_kept(why: str) -> ApiError:
    return ApiError(
        507, f"the server can't store this: {why}; try again when there is room", code=NO_ROOM,
        headers={"Retry-After": f"{math.ceil(_RETRY_SECONDS)}"},
    )  # fmt: skip
