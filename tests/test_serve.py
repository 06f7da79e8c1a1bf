"""The API on two real ranks: as people use it, and as they should not."""

from __future__ import annotations

import io
import json
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import openai
import pytest
import torch
from clips import CLIP
from numpy.typing import NDArray
from PIL import Image
from pipelines import picture
from safetensors.torch import load
from servers import SMALL, Server

from halovae.media import read, write

LONG = {"num_frames": "41", "num_inference_steps": "100"}
"""A video that takes long enough to be cancelled."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    picture(height=80, width=120).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_a_video_from_the_first_request_to_the_file(server: Server, image: Path, tmp_path: Path) -> None:
    job = server.create(image)
    assert (job["object"], job["model"], job["prompt"], job["size"]) == ("video", "demo", "a cup", "64x64")
    assert job["status"] in ("queued", "in_progress")
    done = server.finished(job["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert (done["seed"], done["num_frames"], done["fps"], done["seconds"]) == (3, 5, 16, "0.3125")
    assert {"denoise", "vae encode", "vae decode", "write"} <= set(done["timings"])
    content = server.client.get(f"/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    part = server.client.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=10-29"})
    assert (part.status_code, part.content) == (206, content.content[10:30])
    (tmp_path / "v.mp4").write_bytes(content.content)
    assert read(tmp_path / "v.mp4").frames.shape == (5, 64, 64, 3)
    again = server.post("/v1/videos/sync", image)
    assert again.content == content.content, "the same seed gives the same file"
    for each in (job["id"], again.headers["x-video-id"]):
        assert server.client.delete(f"/v1/videos/{each}").json()["deleted"]
        assert server.client.get(f"/v1/videos/{each}").status_code == 404
    assert not list((server.store / "files").iterdir())


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_the_official_client(server: Server, image: Path) -> None:
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    more = {"num_inference_steps": 2, "fps": 8, "seed": 1}
    video = client.videos.create_and_poll(
        prompt="a cup", input_reference=image, seconds="1", size="64x64", extra_body=more, poll_interval_ms=100
    )  # type: ignore[call-overload]  # It lists the sizes of OpenAI's own models.
    assert (video.status, video.progress, video.size, video.error) == ("completed", 100, "64x64", None)
    assert float(video.seconds) == 9 / 8, "one second at 8 frames, to the nearest count that the VAE takes"
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert [each.id for each in client.videos.list(limit=1)][:1] == [video.id]
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError, match="width 65 is not a multiple of 16: use 64 or 80"):
        client.videos.create(prompt="a cup", input_reference=image, size="65x64")  # type: ignore[arg-type]


def test_cancelled_while_it_runs_and_while_it_waits(server: Server, image: Path) -> None:
    running, waiting = server.create(image, **LONG), server.create(image)
    server.until(lambda: server.video(running["id"])["status"] == "in_progress")
    assert server.video(waiting["id"])["jobs_ahead"] == 0
    for job in (waiting, running):
        assert server.client.delete(f"/v1/videos/{job['id']}").status_code == 200
    next_one = server.finished(server.create(image)["id"])
    assert next_one["status"] == "completed"
    server.client.delete(f"/v1/videos/{next_one['id']}")
    assert not list((server.store / "files").iterdir())


def test_a_client_that_hangs_up_cancels(server: Server, image: Path) -> None:
    with pytest.raises(openai.APITimeoutError):
        openai.OpenAI(base_url=server.address, api_key="none", max_retries=0, timeout=1.0).post(
            "/v1/videos/sync", body={**SMALL, **LONG}, files={"input_reference": image.read_bytes()}, cast_to=bytes,
            options={"headers": {"Content-Type": "multipart/form-data"}},
        )  # fmt: skip
    server.until(lambda: not server.health()["busy"])
    assert server.client.get("/v1/videos").json()["data"] == []


def test_a_request_that_fails_fails_alone(server: Server, image: Path) -> None:
    """Its image is damaged after it was accepted; only the ranks find out."""
    starts = server.health()["starts"]
    first, failed, good = server.create(image, **LONG), server.create(image), server.create(image)
    (server.store / "files" / failed["id"] / "input").write_bytes(image.read_bytes()[:-400])
    server.client.delete(f"/v1/videos/{first['id']}")
    found = server.finished(failed["id"])
    assert (found["status"], found["error"]["code"]) == ("failed", "invalid_request")
    assert found["error"]["message"].startswith("can't read image the file")
    assert server.client.get(f"/v1/videos/{failed['id']}/content").status_code == 409
    assert server.finished(good["id"])["status"] == "completed"
    assert server.health()["starts"] == starts
    for job in server.client.get("/v1/videos").json()["data"]:
        server.client.delete(f"/v1/videos/{job['id']}")


def test_what_the_model_can_not_do_is_refused_at_once(server: Server, image: Path) -> None:
    answer = server.post("/v1/videos", image, guidance_scale_2="2", boundary_ratio="0.5", num_inference_steps="1")
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "--" not in message
    for name in ("guidance_scale_2", "boundary_ratio"):
        assert f"{name} can't be honoured: " in message


def test_progress_comes_by_itself(server: Server, image: Path) -> None:
    job = server.create(image, num_inference_steps="6")
    seen: list[int] = []
    with server.client.stream("GET", f"/v1/videos/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = [json.loads(line[6:])["progress"] for line in answer.iter_lines() if line.startswith("data: ")]
    assert seen == sorted(seen)
    assert len(set(seen)) > 3, seen
    assert seen[-1] == 100
    server.client.delete(f"/v1/videos/{job['id']}")


def test_a_video_is_watched_while_it_is_decoded(server: Server, image: Path, tmp_path: Path) -> None:
    """By several clients, of which one goes away; each frame is the one of the finished file."""
    client, many = server.client, {"num_frames": "41", "lossless": "true"}
    job, waiting = (server.create(image, **many)["id"] for _ in range(2))
    path = f"/v1/videos/{job}/stream"
    refused = {
        409: client.get(f"/v1/videos/{waiting}/stream"),
        404: client.get("/v1/videos/none/stream"),
        406: client.get(path, headers={"Accept": "text/html, application/json;q=0.5"}),
    }
    for status, answer in refused.items():
        assert answer.status_code == status
    assert "queued: it waits for its turn" in refused[409].text
    assert "ask for video/mp4 or multipart/x-mixed-replace" in refused[406].text
    client.delete(f"/v1/videos/{waiting}")
    with client.stream("GET", path) as leaves:
        next(leaves.iter_raw())
    with client.stream("GET", path, headers={"Accept": "text/html, video/*"}) as answer:
        chunks = answer.iter_raw()
        first = next(chunks)
        assert 0 < server.video(job)["frames_ready"] < 41
        (tmp_path / "watched.mp4").write_bytes(first + b"".join(chunks))
    assert answer.headers["content-type"].startswith('video/mp4; codecs="avc1.')
    assert server.finished(job)["status"] == "completed"
    (tmp_path / "whole.mp4").write_bytes(client.get(path).content)
    whole = read(tmp_path / "whole.mp4").frames
    assert len(whole) == 41
    assert np.array_equal(read(tmp_path / "watched.mp4").frames, whole)
    answer = client.get(path, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
    parts = [part.partition(b"\r\n\r\n")[2] for part in answer.content.split(b"--frame")[1:-1]]
    assert np.array_equal([np.asarray(Image.open(io.BytesIO(part))) for part in parts], whole)
    client.delete(f"/v1/videos/{job}")


def test_the_vae_as_a_service(server: Server, tmp_path: Path) -> None:
    clip = read(CLIP, height=48, width=64).frames[:5]
    path = tmp_path / "clip.png"
    Image.fromarray(clip[0]).save(path)
    encoded = server.client.post("/v1/vae/encode", files={"clip": path.read_bytes()})
    assert encoded.status_code == 200, encoded.text
    latents = load(encoded.content)["latents"]
    assert latents.shape[-2:] == (6, 8)
    assert torch.isfinite(latents).all()
    decoded = server.client.post("/v1/vae/decode", files={"latents": encoded.content})
    (tmp_path / "d.mp4").write_bytes(decoded.content)
    assert read(tmp_path / "d.mp4").frames.shape == (1, 48, 64, 3)
    kept = server.client.post("/v1/vae/decode", data={"lossless": "1"}, files={"latents": encoded.content})
    (tmp_path / "d.mp4").write_bytes(kept.content)
    with av.open(str(tmp_path / "d.mp4")) as kept_file:
        assert kept_file.streams.video[0].codec_context.pix_fmt in ("rgb24", "gbrp")
    for route, field in (("encode", "clip"), ("decode", "latents")):
        odd = server.client.post(f"/v1/vae/{route}", files={field: b"", "other": b"x"})
        assert odd.json()["error"]["message"] == (f"{field} is empty: send a file, in a form; 'other' is no field here")
        bad = server.client.post(f"/v1/vae/{route}", files={field: b"neither this nor that"})
        assert bad.status_code == 400, bad.text
        assert str(server.store) not in bad.text
    assert not list((server.store / "files").iterdir())


def test_the_vae_streams(server: Server, tmp_path: Path) -> None:
    """Latents go out while further frames are encoded; a client leaves, and two get each its own at once."""
    first_frame = read(CLIP, height=32, width=32).frames[0]
    frames = [np.roll(first_frame, number, 1) for number in range(41)]
    write(tmp_path / "clip.mp4", frames, Fraction(16), lossless=True)
    clip, more = {"clip": (tmp_path / "clip.mp4").read_bytes()}, {"data": {"stream": "true"}}
    answer = server.client.post("/v1/vae/encode", files=clip, **more)
    content = answer.content
    assert answer.headers["content-type"] == "multipart/mixed; boundary=latents"
    assert content.endswith(b"\r\n--latents--\r\n")
    parts = [part.partition(b"\r\n\r\n")[2][:-2] for part in content.split(b"--latents\r\n")[1:]]
    parts[-1] = parts[-1].removesuffix(b"\r\n--latents--")
    latents = [load(part)["latents"] for part in parts]
    assert len(latents) > 5
    whole = server.client.post("/v1/vae/encode", files=clip).content
    assert torch.equal(torch.cat(latents, 2), load(whole)["latents"])
    few = server.client.post("/v1/vae/encode", files={"clip": _png(frames[1])}, **more)
    short = few.content.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n--latents--\r\n")
    assert load(short)["latents"].shape[2] == 1

    with server.client.stream("POST", "/v1/vae/decode", files={"latents": whole}, **more) as answer:
        next(answer.iter_raw())
    server.until(lambda: not server.health()["busy"])
    counts: dict[str, int] = {}

    def ask(name: str, sent: bytes) -> None:
        answer = server.client.post("/v1/vae/decode", files={"latents": sent}, **more)
        (tmp_path / f"{name}.mp4").write_bytes(answer.content)
        counts[name] = len(read(tmp_path / f"{name}.mp4").frames)

    threads = [threading.Thread(target=ask, args=each) for each in (("long", whole), ("short", short))]
    for thread in threads:
        thread.start()
    cut = server.client.post("/v1/vae/decode", files={"latents": whole[:-100]}, **more)
    assert cut.status_code == 400
    assert "no safetensors file, or a damaged one" in cut.json()["error"]["message"]
    for thread in threads:
        thread.join()
    assert counts == {"long": 41, "short": 1}
    assert server.health()["starts"] == 1
    server.until(lambda: not list((server.store / "files").iterdir()))


def _png(frame: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "PNG")
    return content.getvalue()


def test_many_at_once(server: Server, image: Path) -> None:
    """All are answered, each with its own video."""
    found: dict[int, str] = {}

    def ask(seed: int) -> None:
        job = server.create(image, seed=str(seed))
        found[seed] = job["id"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = {seed: server.finished(job) for seed, job in found.items()}
    assert {job["status"] for job in done.values()} == {"completed"}
    assert {seed: job["seed"] for seed, job in done.items()} == {seed: seed for seed in range(6)}
    text = server.client.get("/metrics").text
    assert 'halovae_jobs_total{kind="video",status="completed"}' in text
    assert "halovae_ready 1.0" in text
    for job in found.values():
        server.client.delete(f"/v1/videos/{job}")


def test_a_picture_of_a_million_pixels_more_than_allowed(server: Server) -> None:
    flat = io.BytesIO()
    Image.new("1", (8192, 8192)).save(flat, "PNG")
    answer = server.client.post("/v1/videos", data=SMALL, files={"input_reference": flat.getvalue()})
    assert answer.status_code == 400
    assert "more than 33554432" in answer.json()["error"]["message"]
