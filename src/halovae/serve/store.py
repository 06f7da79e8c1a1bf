"""Jobs on disk: rows in SQLite, and a folder of files for each. What is accepted here outlives the process.

The order of writing makes it so: files are on the disk before the row that names them, and the row before the client
hears of it. A folder without a row is what a crash has left behind, and is removed at the next start.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from halovae.base.errors import InputError
from halovae.base.files import first_line, reason

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
VIDEO, ENCODE, DECODE = "video", "encode", "decode"
"""Kinds of jobs. Whoever asks for the last two waits for the answer: they end with the connection."""
INPUT = "input"
"""Name of what the client has sent, in a job's folder."""
ERRORS = (sqlite3.Error, OSError)
"""What a store raises when its disk is full or fails. It can be used again as soon as there is room."""
NO_ROOM = "no_room"
"""Code of a failure for want of room: of a request, or of a job that is run again when there is."""
_ROOM = 2**20
"""Bytes that have to be free for work to go on."""
THUMBNAIL = "thumbnail.jpg"
"""Name of a video's first frame, beside it."""
STREAM = ".stream"
"""Name of what clients get while it is made, beside the result; it goes when the job is over, or at the next start."""
_BOUNDARY = "latents"
PARTS_TYPE = f"multipart/mixed; boundary={_BOUNDARY}"
"""Of latents that are sent while further ones are made: each part is a whole file of latents."""
PARTS_END = f"--{_BOUNDARY}--\r\n".encode()
_OUTPUTS = {VIDEO: "output.mp4", ENCODE: "output.safetensors", DECODE: "output.mp4"}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    status TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,
    result TEXT,
    error TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
"""


def around_part(size: int) -> tuple[bytes, bytes]:
    """What is before and behind a part of so many bytes of an answer in `PARTS_TYPE`."""
    head = f"--{_BOUNDARY}\r\nContent-Type: application/octet-stream\r\nContent-Length: {size}\r\n\r\n"
    return head.encode(), b"\r\n"


@dataclass(frozen=True, kw_only=True)
class StoredJob:
    """One job, as it is on disk."""

    number: int
    """Grows from job to job."""
    id: str
    kind: str
    status: str
    created: float
    """Seconds since the epoch."""
    started: float | None
    finished: float | None
    attempts: int
    """How often it was begun."""
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None

    @property
    def is_over(self) -> bool:
        return self.status in (COMPLETED, FAILED)


class Store:
    """The jobs of one server, in a folder that no other server uses. One thread uses it at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._files.mkdir(mode=0o700, exist_ok=True)
            self._lock = _locked(folder / "lock")
        except OSError as error:
            raise InputError(f"--store {folder} can't be used: {reason(error)}") from error
        self._files = self._files.resolve()
        try:
            # Made and closed on one thread, used on another.
            self._base = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None, check_same_thread=False)
            self._base.row_factory = sqlite3.Row
            self._base.execute("PRAGMA journal_mode=WAL")
            # Else a power cut could lose the last jobs that clients have heard of.
            self._base.execute("PRAGMA synchronous=FULL")
            self._base.executescript(_SCHEMA)
            self._recover()
        except sqlite3.Error as error:
            self.close()
            full = ", and its disk is full: make room" if self.free < _ROOM else ""
            raise InputError(f"--store {folder}: its jobs.sqlite can't be used: {first_line(error)}{full}") from error

    def close(self) -> None:
        self._base.close()
        self._lock.close()

    def check_room(self, free: int = 0) -> None:
        """See whether files can be written, and whether the disk has so many bytes."""
        with tempfile.TemporaryFile(dir=self._files) as file:
            file.write(bytes(_ROOM))
            file.flush()
            os.fsync(file.fileno())
        if self.free < free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def free(self) -> int:
        """Bytes that are free."""
        return shutil.disk_usage(self._files).free

    @property
    def files(self) -> Path:
        """The folder that uploads pass through on their way to their job."""
        return self._files

    # ---- files -------------------------------------------------------------------------------------------------------

    def new_folder(self, kind: str) -> str:
        """Make room for a job's files; returns the job's id."""
        job = f"{kind}_{secrets.token_hex(12)}"
        (self._files / job).mkdir(mode=0o700)
        return job

    def input(self, job: str) -> Path:
        return self._files / job / INPUT

    def output(self, job: str) -> Path:
        return self._files / job / _OUTPUTS[job.partition("_")[0]]

    def thumbnail(self, job: str) -> Path:
        return self._files / job / THUMBNAIL

    def stream(self, job: str) -> Path:
        return self._files / job / STREAM

    def drop_files(self, job: str) -> None:
        shutil.rmtree(self._files / job, ignore_errors=True)

    # ---- rows --------------------------------------------------------------------------------------------------------

    def add(self, job: str, kind: str, request: Mapping[str, Any]) -> StoredJob:
        """Accept a job whose files are there."""
        _sync_folder(self._files / job)
        _sync_folder(self._files)
        self._base.execute(
            "INSERT INTO jobs (id, kind, status, created, request) VALUES (?, ?, ?, ?, ?)",
            (job, kind, QUEUED, time.time(), json.dumps(request)),
        )
        added = self.get(job)
        assert added is not None
        return added

    def get(self, job: str) -> StoredJob | None:
        return self._first("SELECT * FROM jobs WHERE id = ?", (job,))

    def next(self) -> StoredJob | None:
        """The job that has waited longest."""
        return self._first("SELECT * FROM jobs WHERE status = ? ORDER BY number LIMIT 1", (QUEUED,))

    def begin(self, job: str) -> None:
        self._base.execute(
            "UPDATE jobs SET status = ?, started = ?, attempts = attempts + 1 WHERE id = ?", (RUNNING, time.time(), job)
        )

    def requeue(self, job: str, *, counts: bool = True) -> None:
        """Run it again, before those that came later; `counts`: the attempt that has ended is one of its attempts."""
        query = "UPDATE jobs SET status = ?, started = NULL, attempts = attempts - ? WHERE id = ?"
        self._base.execute(query, (QUEUED, 0 if counts else 1, job))

    def complete(self, job: str, result: Mapping[str, Any]) -> StoredJob | None:
        """None: it was removed in the meantime."""
        with suppress(FileNotFoundError):
            _sync_folder(self._files / job)
        return self._end(job, COMPLETED, "result", result)

    def fail(self, job: str, code: str, message: str) -> StoredJob | None:
        """None: it was removed in the meantime."""
        return self._end(job, FAILED, "error", {"code": code, "message": message})

    def remove(self, job: str) -> None:
        query = "DELETE FROM jobs WHERE id = ?"
        try:
            self._base.execute(query, (job,))
        except sqlite3.Error:
            self.drop_files(job)  # On a full disk this is what makes room for it.
            self._base.execute(query, (job,))
        self.drop_files(job)

    def videos(self, after: StoredJob | None, limit: int, newest_first: bool) -> list[StoredJob]:
        """A page of the videos, in the order in which they came."""
        beyond, order = ("<", "DESC") if newest_first else (">", "ASC")
        start = after.number if after is not None else 2**62 if newest_first else 0
        query = f"SELECT * FROM jobs WHERE kind = ? AND number {beyond} ? ORDER BY number {order} LIMIT ?"
        return [_job(row) for row in self._base.execute(query, (VIDEO, start, limit))]

    def count(self, status: str) -> int:
        return int(self._base.execute("SELECT COUNT(*) FROM jobs WHERE status = ?", (status,)).fetchone()[0])

    def ahead(self, job: StoredJob) -> int:
        """How many queued jobs will be begun before this one."""
        query = "SELECT COUNT(*) FROM jobs WHERE status = ? AND number < ?"
        return int(self._base.execute(query, (QUEUED, job.number)).fetchone()[0])

    def usual_seconds(self) -> float:
        """What the last jobs took, on average; 10 as long as there were none."""
        query = "SELECT finished - started FROM jobs WHERE status = ? ORDER BY number DESC LIMIT 10"
        found = [row[0] for row in self._base.execute(query, (COMPLETED,))]
        return sum(found) / len(found) if found else 10.0

    def expire(self, seconds: float) -> int:
        """Remove what has ended longer ago than that; returns how many jobs."""
        query = "SELECT id FROM jobs WHERE finished IS NOT NULL AND finished < ?"
        old = [row[0] for row in self._base.execute(query, (time.time() - seconds,))]
        for job in old:
            self.remove(job)
        return len(old)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _end(self, job: str, status: str, column: str, value: Mapping[str, Any]) -> StoredJob | None:
        self.stream(job).unlink(missing_ok=True)  # Who reads it has it open.
        self._base.execute(
            f"UPDATE jobs SET status = ?, finished = ?, {column} = ? WHERE id = ?",
            (status, time.time(), json.dumps(value), job),
        )
        return self.get(job)

    def _first(self, query: str, values: Sequence[Any]) -> StoredJob | None:
        row = self._base.execute(query, values).fetchone()
        return None if row is None else _job(row)

    def _recover(self) -> None:
        """Put in order what a crash has left: jobs that nobody runs any more, files that no job has."""
        for row in self._base.execute("SELECT id FROM jobs WHERE kind != ?", (VIDEO,)).fetchall():
            self.remove(row[0])
        known = {row[0] for row in self._base.execute("SELECT id FROM jobs")}
        for folder in self._files.iterdir():
            if not folder.is_dir():  # Some file systems know no files without names.
                folder.unlink()
            elif folder.name not in known:
                self.drop_files(folder.name)
            for draft in folder.glob(".*"):  # Of an output that a rank was writing when it was killed.
                draft.unlink(missing_ok=True)
        # Last: what was removed may be the room for it.
        self._base.execute("UPDATE jobs SET status = ?, started = NULL WHERE status = ?", (QUEUED, RUNNING))


def _job(row: sqlite3.Row) -> StoredJob:
    values = dict(row)
    for name in ("request", "result", "error"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return StoredJob(**values)


def _locked(path: Path) -> IO[str]:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"--store {path.parent} is in use by another server: give another folder") from None
    return file


def _sync_folder(folder: Path) -> None:
    """Names in a folder are on the disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
