"""Jobs on disk outlive whoever wrote them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from halovae.base.errors import InputError
from halovae.serve.store import COMPLETED, DECODE, FAILED, QUEUED, VIDEO, Store

Open = Callable[[Path], Store]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens stores that are closed at the end."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(closing(Store(folder)))


def add(store: Store, kind: str = VIDEO, **settings: object) -> str:
    job = store.new_folder(kind)
    store.input(job).write_bytes(b"image")
    store.add(job, kind, {"settings": settings})
    return job


def test_what_was_accepted_is_there_after_the_end(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path / "store")
    waiting, running, done = (add(store, seed=seed) for seed in range(3))
    store.begin(running)
    store.begin(done)
    store.output(done).write_bytes(b"video")
    store.complete(done, {"seed": 2})
    store.close()
    again = opened(tmp_path / "store")
    found = {job.id: job for job in again.videos(None, 10, newest_first=False)}
    assert list(found) == [waiting, running, done]
    assert [job.status for job in found.values()] == [QUEUED, QUEUED, COMPLETED]
    assert found[running].attempts == 1
    assert found[done].request == {"settings": {"seed": 2}}
    assert again.output(done).read_bytes() == b"video"
    assert again.input(waiting).read_bytes() == b"image"


def test_the_oldest_is_next_also_when_it_was_begun_before(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path)
    first, second = add(store), add(store)
    store.begin(first)
    assert getattr(store.next(), "id", None) == second
    store.requeue(first)
    found = store.next()
    assert found is not None
    assert (found.id, found.status, found.attempts) == (first, QUEUED, 1)
    store.begin(first)
    store.requeue(first, counts=False)
    assert getattr(store.get(first), "attempts", None) == 1
    assert [store.ahead(job) for job in store.videos(None, 10, newest_first=False)] == [0, 1]


def test_what_a_crash_leaves_behind_is_removed(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path)
    kept, asked = add(store), add(store, DECODE)
    orphan = store.new_folder(VIDEO)
    store.close()
    again = opened(tmp_path)
    assert {path.name for path in (tmp_path / "files").iterdir()} == {kept}
    assert again.get(asked) is None, "nobody waits for its answer any more"
    assert again.get(orphan) is None


def test_a_failure_keeps_its_reason(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path)
    job = add(store)
    store.begin(job)
    failed = store.fail(job, "server_error", "out of memory")
    assert (failed.status, failed.error) == (FAILED, {"code": "server_error", "message": "out of memory"})


def test_pages(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path)
    jobs = [add(store) for _ in range(5)]
    newest = store.videos(None, 2, newest_first=True)
    assert [job.id for job in newest] == jobs[:2:-1]
    assert [job.id for job in store.videos(newest[-1], 10, newest_first=True)] == jobs[2::-1]
    assert [job.id for job in store.videos(newest[-1], 10, newest_first=False)] == jobs[4:]


def test_old_jobs_expire_with_their_files(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path)
    done, waiting = add(store), add(store)
    store.begin(done)
    store.complete(done, {})
    assert store.expire(60) == 0
    time.sleep(0.02)
    assert store.expire(0.01) == 1
    assert store.get(done) is None
    assert not store.input(done).exists()
    assert store.input(waiting).exists()


def test_one_server_at_a_time(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path)
    with pytest.raises(InputError, match="in use by another server"):
        Store(tmp_path)
    store.close()
    opened(tmp_path)


def test_a_damaged_data_base_is_said(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"no data base, but long enough to be taken for one" * 100)
    with pytest.raises(InputError, match=r"jobs\.sqlite can't be used"):
        Store(tmp_path)


def test_others_on_the_machine_can_not_read_it(tmp_path: Path, opened: Open) -> None:
    store = opened(tmp_path / "store")
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
    assert store.input(add(store)).parent.stat().st_mode & 0o077 == 0


def test_a_write_is_on_the_disk(tmp_path: Path, opened: Open) -> None:
    """As SQLite understands it: WAL, and a sync at each commit."""
    store = opened(tmp_path)
    job = add(store)
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as base:
        assert base.execute("SELECT id FROM jobs").fetchall() == [(job,)]
    found = [store._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert found == ["wal", 2]  # FULL
