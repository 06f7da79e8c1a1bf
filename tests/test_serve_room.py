"""A full disk ends neither the server nor a job: what was accepted is done when there is room again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from pipelines import picture
from servers import SMALL, Server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no disks can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: Path) -> None:
    """Take all the room that there is."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(os.urandom(size))


def test_a_full_disk_is_waited_for(demo_model: Path, small_disk: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    image, filler = tmp_path / "image.png", small_disk / "filler"
    server = Server(demo_model, small_disk / "store").until_ready()
    try:
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
        assert server.post("/v1/videos/sync", image, **SMALL).status_code == 200
        assert server.health()["starts"] == 1
    finally:
        code, said = server.stop()
    assert code == 0
    assert "sqlite3" not in said, "which would be a traceback"
    assert "the store can be written again" in said
