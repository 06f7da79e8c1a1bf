"""A video that the server makes is the video that `halovae image-to-video` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import enter, on_ranks
from pipelines import picture
from ranks import Ranks
from servers import Server

from halovae.cli.main import main
from halovae.media import read

GATE = "0.999"
"""SSIM of the worst frame. The gate that is published for another server is 0.94."""
SETTINGS = {"size": "96x64", "num_frames": "9", "num_inference_steps": "3", "seed": "11", "guidance_scale": "2"}
LOSSLESS = {"lossless": "true"}
"""A codec that loses something makes an SSIM of 0.98 of frames of which one value in 800 differs by one level."""


@pytest.mark.parametrize(
    "other",
    [[], ["--axis", "height", "--ulysses-degree", "2"]],
    ids=["one rank", "cut elsewhere"],
)
def test_online_is_offline(
    other: list[str],
    server: Server,
    demo_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    two_ranks: Ranks,
) -> None:
    """The server's two ranks have frames cut between columns. Here one rank has all, or two have them cut otherwise."""
    enter(tmp_path, monkeypatch)
    image = tmp_path / "image.png"
    picture(height=64, width=96).save(image)
    answer = server.post("/v1/videos/sync", image, **SETTINGS, **LOSSLESS)
    assert answer.status_code == 200, answer.text
    online, offline = tmp_path / "online.mp4", tmp_path / "offline.mp4"
    online.write_bytes(answer.content)
    settings = "--height 64 --width 96 --num-frames 9 --num-inference-steps 3 --seed 11 --guidance-scale 2 --lossless"
    files = ["--model", str(demo_model), "--image", str(image), "-o", str(offline)]
    words = ["image-to-video", *files, "--prompt", "a cup", *settings.split(), *other]
    assert (on_ranks(two_ranks, *words)[0] if other else main(words)) == 0
    page = tmp_path / "report"
    assert main(["compare", str(offline), str(online), "--min-ssim", GATE, "--report", str(page)]) == 0
    assert (page / "index.html").exists()
    server.client.delete(f"/v1/videos/{answer.headers['x-video-id']}")


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled")
def test_the_published_client_gets_its_video(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line as it stands, but for the address."""
    enter(tmp_path, monkeypatch)
    Path("media").mkdir()
    picture(height=64, width=96).save("media/coffee.png")
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code.replace("http://127.0.0.1:8000", server.address), str(page), "exec"), names)
    names["client"].videos.delete(names["video"].id)
    names["client"].close()
    assert read(Path("coffee.mp4")).frames.shape == (17, 128, 192, 3)
