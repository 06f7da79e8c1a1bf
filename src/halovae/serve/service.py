"""From accepted jobs to results: one job at a time goes to the ranks, the oldest first."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from halovae.serve.errors import ApiError
from halovae.serve.group import SILENT_SECONDS, Ranks
from halovae.serve.metrics import Metrics
from halovae.serve.settings import ServeOptions
from halovae.serve.store import COMPLETED, QUEUED, Job, Store
from halovae.serve.wire import Message

ATTEMPTS = 2
"""How often a job is begun at most, when the ranks end while they work on it: it may be the job that ends them."""
_TIDY_SECONDS = 60.0


@dataclass
class _Current:
    """What the ranks work on."""

    id: str
    progress: int = 0
    cancelled: bool = False


class Service:
    """The jobs of one server. Everything in it happens in one event loop.

    Args:
        options: of the server.
        store: where jobs are kept.
        ranks: who does them.
        metrics: what is counted.
    """

    def __init__(self, options: ServeOptions, store: Store, ranks: Ranks, metrics: Metrics) -> None:
        self.options, self.store, self.ranks, self.metrics = options, store, ranks, metrics
        self._current: _Current | None = None
        self._stopped = False
        self._changes = asyncio.Condition()
        self._notices: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._tidying = asyncio.create_task(self._tidy())

    async def stop(self) -> None:
        """Leave what the ranks work on for the next start."""
        self._stopped = True
        current, self._current = self._current, None
        if current is not None and not current.cancelled:
            # It is no fault of the job.
            self.store.requeue(current.id, counts=False)
        if self._tidying is not None:
            self._tidying.cancel()
            with suppress(asyncio.CancelledError):
                await self._tidying

    # ---- for clients -------------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Turn a job away when too many wait.

        Raises:
            ApiError: 429, with the seconds after which there should be room.
        """
        waiting = self.store.count(QUEUED)
        if waiting >= self.options.limits.queue:
            seconds = max(1, math.ceil(self.store.usual_seconds()))
            raise ApiError(
                429,
                f"{waiting} jobs wait already: try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, job: str, kind: str, request: Mapping[str, Any]) -> Job:
        """Accept a job whose files are in its folder.

        Raises:
            ApiError: 429; the folder is removed.
        """
        try:
            self.check_room()
        except ApiError:
            self.store.drop_files(job)
            raise
        added = self.store.add(job, kind, request)
        self._changed()
        self._dispatch()
        return added

    def remove(self, job: str) -> None:
        """Forget a job; if it runs, the ranks leave it at their next step."""
        found = self.store.get(job)
        if found is None:
            return
        if self._current is not None and self._current.id == job:
            self._current.cancelled = True
            self.ranks.send({"cancel": job})
        if not found.is_over:
            self.metrics.jobs.labels(found.kind, "cancelled").inc()
        self.store.remove(job)
        self._changed()

    def progress(self, job: Job) -> int:
        """In percent. Of a running job: of its steps."""
        if job.status == COMPLETED:
            return 100
        return self._current.progress if self._current is not None and self._current.id == job.id else 0

    async def changes(self, job: str, seconds: float) -> AsyncIterator[Job | None]:
        """The job now, and whenever something has changed, until it is over or gone (None).

        Args:
            job: its id.
            seconds: after so many without a change it is told once more.
        """
        while True:
            found = self.store.get(job)
            yield found
            if found is None or found.is_over:
                return
            async with self._changes:
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._changes.wait(), seconds)

    def health(self) -> dict[str, Any]:
        """Whether every rank answers, and what is going on."""
        silent = time.monotonic() - self.ranks.heard
        # While ranks work they speak at every step only; a rank that dies or stops then ends the group.
        answers = self.ranks.ready and (self._current is not None or silent < SILENT_SECONDS)
        state = "ready" if answers else "silent" if self.ranks.ready else "loading" if not self.ranks.trouble else ""
        return {
            "status": state or "restarting",
            "ready": answers,
            "ranks": self.options.ranks,
            "busy": self._current is not None,
            "queued": self.store.count(QUEUED),
            "starts": self.ranks.starts,
            "last_trouble": self.ranks.trouble or None,
        }

    # ---- for the ranks -----------------------------------------------------------------------------------------------

    def on_message(self, message: Message) -> None:
        """What the first rank says."""
        current = self._current
        if current is not None and message.get("id") == current.id:
            if message["event"] == "progress":
                # Decoding and writing come after the last step.
                current.progress = int(95 * message["done"] / (message["total"] or math.inf))
            else:
                self._current = None
                self._conclude(current, message)
            self._changed()
        self._dispatch()

    def on_end(self, why: str) -> None:
        """The ranks have ended. What they worked on is run again, or given up."""
        current, self._current = self._current, None
        self.metrics.restarts.inc()
        job = None if current is None or current.cancelled else self.store.get(current.id)
        if job is not None and job.attempts < ATTEMPTS:
            self.store.requeue(job.id)
        elif job is not None:
            self._fail(job, "server_error", f"the ranks ended {ATTEMPTS} times while they worked on it: {why}")
        self._changed()

    def _dispatch(self) -> None:
        """Give the ranks the next job, if they are free."""
        while (
            not self._stopped and self._current is None and self.ranks.ready and (job := self.store.next()) is not None
        ):
            if job.attempts >= ATTEMPTS:  # The server itself has ended with it.
                self._fail(job, "server_error", f"the server ended {ATTEMPTS} times while it worked on this job")
                continue
            self.store.begin(job.id)
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
            self._changed()

    def _conclude(self, current: _Current, message: Message) -> None:
        job = self.store.get(current.id)
        if job is None or current.cancelled:
            self.store.drop_files(current.id)
        elif message["event"] == "done":
            self.metrics.finished(self.store.complete(job.id, message["result"]))
        else:
            self._fail(job, message["code"], message["message"])

    def _fail(self, job: Job, code: str, message: str) -> None:
        self.metrics.finished(self.store.fail(job.id, code, message))

    def _changed(self) -> None:
        async def notify() -> None:
            async with self._changes:
                self._changes.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._notices.add(task)
        task.add_done_callback(self._notices.discard)

    async def _tidy(self) -> None:
        while True:
            self.store.expire(self.options.keep)
            await asyncio.sleep(_TIDY_SECONDS)
