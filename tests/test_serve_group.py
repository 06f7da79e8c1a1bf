"""The front of ranks that somebody else has started, as torchrun does."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from pathlib import Path

import pytest
from clips import CLIP

from halovae.base.errors import HalovaeError
from halovae.media import read
from halovae.serve.metrics import Metrics
from halovae.serve.ranks import Ranks
from halovae.serve.server_settings import ServeOptions
from halovae.serve.service import Service
from halovae.serve.store import FAILED, QUEUED, VIDEO, Store
from halovae.serve.worker import Order, received

GRID = {"ratio": 8, "period": 4, "patch_frames": 1, "patch_side": 2}


def serve_until_the_ranks_end(store: Store) -> None:
    """A front whose first rank gets ready, takes the job that waits, and dies."""

    async def live() -> None:
        ours, theirs = socket.socketpair()
        options = ServeOptions(model="demo", task="text-to-video", ranks=2)
        ranks = Ranks([], 2, ours)
        service = Service(options, store, ranks, Metrics())
        await service.start()
        theirs.sendall(json.dumps({"event": "ready", "ranks": 2, "grid": GRID}).encode() + b"\n")
        running = asyncio.create_task(ranks.run(service))
        assert await asyncio.to_thread(theirs.recv, 65536)
        theirs.close()
        with pytest.raises(HalovaeError, match="the first rank has ended"):
            await running
        await service.stop()

    asyncio.run(live())


def test_a_job_that_ends_the_ranks_is_given_up(tmp_path: Path) -> None:
    """Each front ends with its ranks, so only the store can tell how often they ended with the job."""
    store = Store(tmp_path)
    job = store.new_folder(VIDEO)
    store.add(job, VIDEO, {"settings": {"prompt": "a cup", "fps": 16}})
    for status, attempts in ((QUEUED, 1), (FAILED, 2)):
        serve_until_the_ranks_end(store)
        found = store.get(job)
        assert found is not None
        assert (found.status, found.attempts) == (status, attempts)
    assert found.error is not None
    assert found.error["message"].startswith("the ranks ended 2 times while they worked on it")
    store.close()


def test_ranks_of_other_machines_get_a_copy_that_no_crash_leaves_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("coffee.png", "bigbuckbunny.mp4"):
        content = (CLIP.parent / name).read_bytes()
        with received(Order({"input": "/of/the/front"}, content)) as path:
            assert path is not None
            assert path.read_bytes() == content
            assert read(path, height=32, width=32).frames.shape[1:] == (32, 32, 3)
            assert not list(tmp_path.iterdir())
    with received(Order({"input": "/of/this/machine"})) as path:
        assert path == Path("/of/this/machine")
