"""A server with a key: the page asks for it, and clients come to it through the proxy of the documentation."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest
from browser import CHROMIUM, browser
from command import PATIENCE, end_with_parent
from pipelines import picture
from ranks import free_port
from servers import SMALL, Server

from halovae.serve.store import VIDEO, Store

KEY = "a-key-that-nobody-guesses"
NGINX, OPENSSL = shutil.which("nginx"), shutil.which("openssl")
PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def locked(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its ranks are not waited for. Sixty jobs are over already."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "key").write_text(KEY)
    with closing(Store(folder / "store")) as store:
        for number in range(60):
            job = store.new_folder(VIDEO)
            store.add(job, VIDEO, {"settings": {"prompt": f"cup {number}", "fps": 16}})
            store.fail(job, "server_error", "it was a bad day")
    server = Server(demo_model, folder / "store", "--api-key-file", str(folder / "key"))
    yield server
    server.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_wants_the_key_and_shows_all_jobs(locked: Server, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as tab:
        tab.go(locked.address)
        for key, words in (("some-other-key-of-somebody", ""), (KEY, "not the right one")):
            tab.wait(f"document.getElementById('key-problem').textContent.includes('{words}')")
            tab.wait("document.getElementById('key-dialog').open && !key.value")
            tab.type(key)
            tab.press("Enter")
        tab.wait("!document.getElementById('key-dialog').open && sessionStorage.key(0)")
        tab.wait("document.querySelectorAll('#history li').length === 50 && !older.hidden")
        tab.look("older.click()")
        tab.wait("document.querySelectorAll('#history li').length >= 60 && older.hidden")
        assert tab.look("document.querySelector('#history li:last-child .words').textContent") == "cup 0"


@pytest.fixture(scope="module")
def proxy(locked: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The published configuration as it stands, but for ports and paths."""
    if NGINX is None or OPENSSL is None:
        pytest.skip("no nginx on this machine")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    certificate, secret = folder / "videos.pem", folder / "videos.key"
    request = f"req -x509 -newkey rsa:2048 -nodes -keyout {secret} -out {certificate} -days 1 -subj /CN=localhost"
    subprocess.run([OPENSSL, *request.split()], check=True, capture_output=True)
    published = PAGE.read_text().split("```nginx\n")[1].split("```")[0]
    for old, new in (
        ("443", f"127.0.0.1:{port}"),
        ("/etc/ssl/videos.pem", str(certificate)),
        ("/etc/ssl/videos.key", str(secret)),
        ("http://127.0.0.1:8000", locked.address),
    ):
        assert published.count(old) == 1, old
        published = published.replace(old, new)
    own = ("pid", "error_log"), ("client_body_temp_path", "proxy_temp_path", "access_log")
    outer, inner = ("".join(f"{name} {folder}/{name};\n" for name in names) for names in own)
    (folder / "nginx.conf").write_text(f"daemon off;\n{outer}events {{}}\nhttp {{\n{inner}{published}}}\n")
    words = [NGINX, "-c", str(folder / "nginx.conf"), "-e", str(folder / "error_log")]
    process = subprocess.Popen(words, preexec_fn=end_with_parent)
    yield f"https://127.0.0.1:{port}"
    process.terminate()
    assert process.wait(10) == 0


def test_clients_come_through_the_published_proxy(proxy: str, locked: Server, tmp_path: Path) -> None:
    picture().save(tmp_path / "image.png")
    files = {"input_reference": (tmp_path / "image.png").read_bytes()}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=proxy, verify=False, timeout=PATIENCE) as client:
        deadline = time.monotonic() + 10
        while True:
            try:
                assert client.get("/").status_code == 200
                break
            except httpx2.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert client.get("/v1/videos").json()["error"]["code"] == "invalid_api_key"
        job = client.post("/v1/videos", data=SMALL, files=files, headers=headers).json()["id"]
        with client.stream("GET", f"/v1/videos/{job}/events", headers=headers) as answer:
            line = next(answer.iter_lines())  # At once, and not when the stream has ended.
        assert re.match(f'data: {{"id": "{job}"', line)
        large = client.post("/v1/vae/decode", files={"latents": bytes(33 * 2**20)}, headers=headers)
        assert large.status_code == 413
        assert client.delete(f"/v1/videos/{job}", headers=headers).json()["deleted"]
