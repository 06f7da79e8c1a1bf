"""Nothing that was accepted is lost: whichever process is killed, and when the disk is full."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pipelines import picture
from servers import SMALL, Server

LONG = {"num_frames": "41", "num_inference_steps": "100"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture().save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_killed_ranks_and_a_killed_server(server: Server, image: Path) -> None:
    starts = server.health()["starts"]
    done = server.finished(server.create(image)["id"])
    assert done["status"] == "completed"
    running, waiting = server.create(image, **LONG)["id"], server.create(image, seed="8")["id"]
    server.until(lambda: server.video(running)["progress"] > 0)

    # A rank: the group ends, another one is started, and the job is run again.
    server.ranks()[1].send_signal(signal.SIGKILL)
    server.until(lambda: server.video(running)["status"] == "queued")
    assert not server.health()["ready"]
    server.until(lambda: server.video(running)["status"] == "in_progress")
    health = server.health()
    assert health["starts"] == starts + 1
    assert health["last_trouble"] == "rank 1 was killed by SIGKILL (often the system, when memory runs out)"
    assert server.video(running)["attempts"] == 2

    # The server: its ranks end too. It was the second attempt, so the job may be what kills; it is given up.
    ranks = server.ranks()
    server.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    assert not [path for path in server.temporary.rglob("*") if path.is_file()], "nothing is left of uploads"

    server.start()
    assert server.video(done["id"])["status"] == "completed"
    assert server.client.get(f"/v1/videos/{done['id']}/content").content[4:8] == b"ftyp"
    assert server.video(waiting)["status"] == "queued"
    assert server.finished(waiting)["seed"] == 8
    found = server.video(running)
    assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
    assert found["error"]["message"] == "the server ended 2 times while it worked on this job"
    for words in ("recovered 2 jobs$", "ready: demo on 2 ranks$"):
        assert re.search(rf"^\d{{4}}-.* halovae: {words}", server.said(), re.M), server.said()
    for job in (done["id"], running, waiting):
        server.client.delete(f"/v1/videos/{job}")


def fill(path: Path) -> None:
    """Take all the room that there is."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(os.urandom(size))


def test_a_full_disk_is_waited_for(server: Server, image: Path) -> None:
    """It ends neither the server nor a job: what was accepted is done when there is room again."""
    if not server.store.is_mount():
        pytest.skip("no disks can be mounted here")
    starts, filler = server.health()["starts"], server.store / "filler"
    old = server.finished(server.create(image)["id"])
    running = server.create(image, num_frames="17", num_inference_steps="20")["id"]
    waiting = server.create(image, seed="8")["id"]
    server.until(lambda: server.video(running)["progress"] > 0)
    fill(filler)

    # The ranks can't write the video, nor the front that they could not.
    server.until(lambda: not server.health()["ready"])
    fill(filler)  # What was left of the draft.
    assert server.health()["status"].startswith("the store can't be written: ")
    answer = server.post("/v1/videos", image)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (507, "server_error", "no_room")
    assert "Retry-After" in answer.headers
    assert server.client.get(f"/v1/videos/{old['id']}/content").status_code == 200
    assert server.client.delete(f"/v1/videos/{old['id']}").status_code == 200, "which makes room"

    filler.unlink()
    server.until(lambda: server.health()["ready"])
    found = {job: server.finished(job) for job in (running, waiting)}
    assert [job["status"] for job in found.values()] == ["completed"] * 2
    assert [job["attempts"] for job in found.values()] == [1, 1]
    last = server.post("/v1/videos/sync", image, **SMALL)
    assert last.status_code == 200
    assert server.health()["starts"] == starts
    assert "the store can be written again" in server.said()
    assert "sqlite3" not in server.said(), "which would be a traceback"
    for job in (running, waiting, last.headers["x-video-id"]):
        server.client.delete(f"/v1/videos/{job}")
