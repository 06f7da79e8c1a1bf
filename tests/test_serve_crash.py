"""Nothing that was accepted is lost, whichever process is killed."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import pytest
from pipelines import picture
from servers import Server

LONG = {"num_frames": "41", "num_inference_steps": "100"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture().save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_killed_ranks_and_a_killed_server(demo_model: Path, image: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    server = Server(demo_model, store, "--ranks", "2").until_ready()
    try:
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
        assert health["starts"] == 2
        assert health["last_trouble"] == "rank 1 was killed by SIGKILL (often the system, when memory runs out)"
        assert server.video(running)["attempts"] == 2

        # The server: its ranks end too. It was the second attempt, so the job may be what kills; it is given up.
        ranks = server.ranks()
        server.kill()
        _, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive
        assert not [path for path in server.temporary.rglob("*") if path.is_file()], "nothing is left of uploads"
    finally:
        server.kill()

    server = Server(demo_model, store, "--ranks", "2")
    try:
        assert server.video(done["id"])["status"] == "completed"
        assert server.client.get(f"/v1/videos/{done['id']}/content").content[4:8] == b"ftyp"
        assert server.video(waiting)["status"] == "queued"
        assert server.finished(waiting)["seed"] == 8
        found = server.video(running)
        assert (found["status"], found["error"]["code"]) == ("failed", "server_error")
        assert found["error"]["message"] == "the server ended 2 times while it worked on this job"
        code, said = server.stop()
        assert code == 0, said
        for words in ("recovered 2 jobs$", "ready: demo on 2 ranks$"):
            assert re.search(rf"^\d{{4}}-.* halovae: {words}", said, re.M), said
    finally:
        server.kill()
