"""What the front says to each request, before any rank has to do with it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipelines import picture
from servers import SMALL
from starlette.testclient import TestClient

from halovae.media import write
from halovae.pipelines.grid import TokenGrid
from halovae.serve.ranks import Ranks
from halovae.serve.server_settings import ServeOptions, ServerLimits
from halovae.serve.service import Metrics, Service
from halovae.serve.store import Store
from halovae.serve.web import make_app

KEY = "a-key-that-nobody-guesses"
Open = Callable[..., TestClient]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """A front whose ranks are never started: jobs wait."""
    closing: list[Any] = []

    def build(**options: Any) -> TestClient:
        store = Store(tmp_path / "store")
        chosen = ServeOptions(model="demo", task="image-to-video", ranks=2, store=tmp_path / "store", **options)
        ranks = Ranks([], 2)
        ranks.facts = {
            "grid": TokenGrid(ratio=8, period=4, step=4, patch_frames=1, patch_side=2).numbers(),
            "parts": 2,
            "frames": 81,
            "refused": {"flow_shift": "flow_shift can't be honoured: Some has no shift; leave it out"},
            "refused_steps": {"7": "7 steps are too many for it"},
        }
        client = TestClient(make_app(Service(chosen, store, ranks, Metrics())), base_url="http://127.0.0.1:8000")
        closing.extend([store, client.__enter__()])
        return client

    yield build
    store, client = closing
    client.__exit__(None, None, None)
    store.close()


@pytest.fixture
def image(tmp_path: Path) -> bytes:
    picture().save(tmp_path / "image.png")
    return (tmp_path / "image.png").read_bytes()


def create(client: TestClient, image: bytes | None, **fields: Any) -> Any:
    files = {} if image is None else {"input_reference": image}
    data = {name: value for name, value in {**SMALL, **fields}.items() if value is not None}
    return client.post("/v1/videos", data=data, files=files)


WRONG = [
    ({"prompt": None}, "prompt", "Field required"),
    ({"size": "64"}, "size", "should match pattern"),
    ({"size": "65x64"}, "width", "width 65 is not a multiple of 16: use 64 or 80"),
    ({"size": "64x64", "width": "80"}, "width", "contradict each other"),
    ({"size": None, "width": "64"}, "width", "width and height go together"),
    ({"size": "99999x99999"}, "size", "more than 2088960 pixels"),
    ({"num_frames": "6"}, "num_frames", "num_frames 6: the VAE would change it, use 5 or 9"),
    ({"size": "80x80", "num_frames": "1"}, "size", "make 25 tokens, which 2 ranks can't share evenly: use height"),
    ({"num_frames": "1001"}, "num_frames", "more than 257"),
    ({"num_frames": None, "seconds": "1000"}, "num_frames", "16000 frames are more than 257"),
    ({"seconds": "1"}, "seconds", "exclude each other"),
    ({"num_inference_steps": "1000"}, "num_inference_steps", "more than 100"),
    ({"num_inference_steps": "0"}, "num_inference_steps", "greater than or equal to 1"),
    ({"seed": "-1"}, "seed", "greater than or equal to 0"),
    ({"seed": "three"}, "seed", "valid integer"),
    ({"guidance_scale": "nan"}, "guidance_scale", "finite"),
    ({"boundary_ratio": "2"}, "boundary_ratio", "less than or equal to 1"),
    ({"flow_shift": "0"}, "flow_shift", "greater than 0"),
    ({"bogus": "1"}, "bogus", "'bogus' is no field here"),
    ({"seed": ["1", "2"]}, "seed", "'seed' is given 2 times: give it once"),
    ({"flow_shift": "2"}, "flow_shift", "Some has no shift"),
    ({"num_inference_steps": "7"}, "num_inference_steps", "7 steps are too many for it"),
    ({"lossless": "maybe"}, "lossless", "lossless ('maybe'): Input should be a valid boolean"),
]


def test_wrong_fields_are_named(opened: Open, image: bytes) -> None:
    client = opened()
    for fields, param, words in WRONG:
        answer = create(client, image, **fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), fields
        assert words in error["message"], error
    assert client.get("/v1/videos").json()["data"] == []


def test_all_faults_come_in_one_answer(opened: Open, image: bytes) -> None:
    answer = create(opened(), image[:-400], prompt=None, size="65x64", num_frames="x", seed="-1", bogus="1")
    error = answer.json()["error"]
    for words in (
        "prompt: Field required",
        "width 65 is not a multiple of 16",
        "num_frames ('x'): Input should be a valid integer",
        "seed ('-1'): Input should be greater than or equal to 0",
        "'bogus' is no field here",
        "can't read image input_reference",
    ):
        assert words in error["message"]
    assert error["message"].count("; ") == 5, error["message"]


def test_json_works_too(opened: Open, image: bytes) -> None:
    client = opened()
    linked = {"image_url": "data:image/png;base64," + base64.b64encode(image).decode()}
    fields = {"prompt": "a cup", "size": "64x64", "num_frames": 5, "seed": 3, "input_reference": linked}
    job = client.post("/v1/videos", json=fields).json()
    assert (job["settings"]["seed"], job["num_frames"], job["size"]) == (3, 5, "64x64")
    for body, words in (
        ({**fields, "input_reference": "image.png"}, "input_reference is no image: send a file, or"),
        ({**fields, "input_reference": {"image_url": "http://127.0.0.1/a.png"}}, "input_reference is no image"),
        ({**fields, "input_reference": {"image_url": "data:image/png;base64,%%%%"}}, "input_reference is no image"),
        ({**fields, "\ud800": 1}, "is no field here"),
        ([fields], "the body is no JSON object"),
    ):
        answer = client.post("/v1/videos", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, body
        assert words in answer.json()["error"]["message"]
    for kind, words in (("application/json", "the body is no JSON: "), ("text/plain", "the body is of type 'text/pl")):
        answer = client.post("/v1/videos", content=b"{", headers={"Content-Type": kind})
        assert (answer.status_code, words in answer.text) == (400, True), answer.text


def test_head_is_get_without_a_body(opened: Open, image: bytes) -> None:
    client = opened()
    job = create(client, image).json()["id"]
    for path in ("/", "/health", "/v1/models", "/v1/videos", f"/v1/videos/{job}", f"/v1/videos/{job}/content"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content, head.headers) == (get.status_code, b"", get.headers), path
    assert client.head(f"/v1/videos/{job}/events").status_code == 200


def test_what_is_no_image_is_refused(opened: Open, image: bytes, tmp_path: Path) -> None:
    client = opened()
    for content, words in (
        (None, "input_reference is missing"),
        (b"", "is empty"),
        (b"GIF89a, or so it says", "no still image"),
        (b"no image at all", "no still image"),
        (b"\x80\x04\x95" + b"pickle" * 9, "no still image"),
        (image[:-400], "can't read image input_reference: image file is truncated"),
    ):
        answer = create(client, content)
        assert answer.status_code == 400, content
        assert words in answer.json()["error"]["message"], answer.text
    assert not list((tmp_path / "store" / "files").iterdir())


def test_names_of_files_mean_nothing(opened: Open, image: bytes, tmp_path: Path) -> None:
    client = opened()
    answer = client.post("/v1/videos", data=SMALL, files={"input_reference": ("../../../evil.png", image)})
    job = answer.json()["id"]
    assert [path.name for path in (tmp_path / "store" / "files" / job).iterdir()] == ["input"]
    for path in (f"/v1/videos/..%2F{job}", "/v1/videos/%2e%2e/content", "/v1/videos/x'--/content"):
        assert client.get(path).status_code == 404


def test_another_model_is_not_here(opened: Open, image: bytes) -> None:
    answer = create(opened(), image, model="sora-2")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_full_queue_says_when_to_come_back(opened: Open, image: bytes) -> None:
    client = opened(limits=ServerLimits(queue=2))
    assert [create(client, image).status_code for _ in range(4)] == [200, 200, 429, 429]
    full = create(client, image)
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["type"] == "rate_limit_error"
    first = client.get("/v1/videos?order=asc&limit=1").json()
    assert first["has_more"]
    client.delete(f"/v1/videos/{first['data'][0]['id']}")
    assert create(client, image).status_code == 200


def test_a_job_that_ends_the_ranks_twice_is_given_up(opened: Open, image: bytes) -> None:
    client = opened()
    service = client.app.state.service  # type: ignore[attr-defined]
    job = create(client, image).json()["id"]
    service.ranks.ready = True
    for status, attempts in (("queued", 1), ("failed", 2)):
        client.portal.call(service.on_message, {"event": "alive"})  # type: ignore[union-attr]
        assert client.get(f"/v1/videos/{job}").json()["status"] == "in_progress"
        client.portal.call(service.on_end, "rank 1 was killed")  # type: ignore[union-attr]
        found = client.get(f"/v1/videos/{job}").json()
        assert (found["status"], found["attempts"]) == (status, attempts)
    assert found["error"]["message"] == "the ranks ended 2 times while they worked on it: rank 1 was killed"


def test_a_job_that_is_done_at_once_is_streamed_too(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Before anybody could see that a part of it was there; and nothing is left of it."""
    client = opened()
    service = client.app.state.service  # type: ignore[attr-defined]
    write(tmp_path / "v.mp4", [np.zeros((16, 16, 3), np.uint8)] * 3, Fraction(16))
    results = {"encode": b"latents", "decode": (tmp_path / "v.mp4").read_bytes()}

    def do(task: dict[str, Any]) -> None:
        Path(task["output"]).write_bytes(results[task["kind"]])
        done = {"event": "done", "id": task["id"], "result": {}}
        asyncio.get_running_loop().call_soon(service.on_message, done)

    monkeypatch.setattr(service.ranks, "send", do)
    service.ranks.ready = True
    parts = client.post("/v1/vae/encode", files={"clip": b"clip"}, data={"stream": "true"}).content
    assert parts.endswith(b"Content-Length: 7\r\n\r\nlatents\r\n--latents--\r\n")
    accept = {"Accept": "image/png"}
    pictures = client.post("/v1/vae/decode", files={"latents": b"latents"}, headers=accept).content
    assert (pictures.count(b"Content-Type: image/png"), pictures[-11:]) == (3, b"--frame--\r\n")
    assert not list((tmp_path / "store" / "files").iterdir())


def test_no_change_is_missed(opened: Open, image: bytes) -> None:
    """One that comes while the client takes what was before it is told at once, and not with the next one."""
    client = opened()
    service, job = client.app.state.service, create(client, image).json()["id"]  # type: ignore[attr-defined]

    async def changes() -> list[Any]:
        seen: list[Any] = []
        async for found in service.changes(job, 1000):
            seen.append(found and found.status)
            service.remove(job)
            await asyncio.sleep(0.05)  # It takes its answer.
        return seen

    async def in_time() -> list[Any]:
        return await asyncio.wait_for(changes(), 20)

    assert client.portal.call(in_time) == ["queued", None]  # type: ignore[union-attr]


def test_who_waits_hears_that_the_server_ends(opened: Open, image: bytes) -> None:
    """At once: a stream of events ends, and a job that waits for its turn is answered."""
    client = opened()
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    job = create(client, image).json()["id"]
    changes = service.changes

    def ends(*arguments: Any) -> Any:
        asyncio.get_running_loop().call_later(0.1, service.leave)
        return changes(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "changes", ends)
        assert client.get(f"/v1/videos/{job}/events").text.count("data: ") == 1
        answer = client.post("/v1/vae/encode", files={"clip": b"clip"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"].startswith("the server is ending")
    assert [each["id"] for each in client.get("/v1/videos").json()["data"]] == [job]


def test_too_much_is_refused(opened: Open, image: bytes) -> None:
    client = opened(limits=ServerLimits(upload_bytes=100_000))
    large, kind = image + bytes(200_000), "multipart/form-data; boundary=x"
    head = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    of_unknown_length = client.post("/v1/videos", content=iter([head, large]), headers={"Content-Type": kind})
    for answer in (create(client, large), of_unknown_length):
        assert answer.status_code == 413, answer.text
        assert "larger than 100000 bytes" in answer.json()["error"]["message"]


def test_a_key_opens(opened: Open, image: bytes) -> None:
    client = opened(key=KEY)
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        answer = client.get("/v1/videos", headers=header)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert client.get("/v1/videos", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert client.get("/metrics").status_code == 401
    assert client.get("/").status_code == 200
    assert client.get("/health").status_code == 503


def test_pages_of_others_may_not_use_it(opened: Open, image: bytes) -> None:
    client = opened()
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
    ):
        answer = client.post("/v1/videos", data=SMALL, files={"input_reference": image}, headers=headers)
        assert answer.status_code == 403, headers
    own = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert create(client, image).status_code == 200
    assert client.get("/v1/videos", headers=own).status_code == 200
    assert client.get("/v1/videos", headers={"Host": "localhost:8000"}).status_code == 200


def test_the_page_needs_nothing_from_elsewhere(opened: Open) -> None:
    client = opened()
    for path in ("/", "/page.css", "/page.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("// ", "").replace("http://www.w3.org", "")


def test_errors_of_every_kind_have_one_shape(opened: Open, image: bytes) -> None:
    client = opened()
    sent = f"/v1/videos/{create(client, image).json()['id']}/content?variant=input_reference"
    for method, path, status, param, words in (
        ("GET", "/nothing", 404, None, "there is no GET /nothing: /openapi.json tells what there is"),
        ("GET", "/v1/vae/encode", 405, None, "there is no GET /v1/vae/encode: use POST"),
        ("GET", "/v1/videos?limit=0", 400, "limit", "limit ('0'): Input should be greater than or equal to 1"),
        ("GET", "/v1/videos?after=x", 404, "after", "there is no video 'x'"),
        ("POST", "/v1/vae/encode", 400, None, "the body is of type '': send multipart/form-data"),
        ("GET", sent, 416, None, "Range: 'bytes=9999999-' can't be used: ask for bytes=FIRST-LAST of the "),
    ):
        answer = client.request(method, path, headers={"Range": "bytes=9999999-"})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["message"][: len(words)]) == (param, words)
    assert client.get(sent, headers={"Range": "bytes=1-3"}).content == image[1:4]
    many = create(client, image, **{f"field{number}": "1" for number in range(900)})
    assert many.json()["error"]["message"].endswith("; 'field19' is no field here; and 880 more faults")
    document = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            assert {"200", "4XX", "5XX"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
