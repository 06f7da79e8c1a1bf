"""The page of a real run in headless Chromium: what its screenshot shows, wide and narrow, light and dark."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import CLIP
from command import PATIENCE, enter, on_ranks, saved
from numpy.typing import NDArray
from PIL import Image
from ranks import Ranks

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-device-scale-factor=1", "--hide-scrollbars", "--virtual-time-budget=10000",
)  # fmt: skip

PROBE = """
const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const all = (s) => [...document.querySelectorAll(s)];
const colour = (e, name) => getComputedStyle(e)[name];
addEventListener("load", () => {
  const seen = {
    width: document.documentElement.scrollWidth, height: document.body.scrollHeight, room: innerWidth,
    images: all("img").map((e) => ({box: box(e), pixels: e.naturalWidth, role: e.dataset.role || "heat"})),
    lines: all("polyline").map((e) => ({box: box(e), colour: colour(e, "stroke")})),
    borders: all(".border.over").map((e) => ({box: box(e)})),
    lanes: all("rect.encode, rect.decode").map((e) => ({box: box(e), colour: colour(e, "fill")})),
    texts: all("h1, h2, p, dt, dd, th, td, li, summary").map((e) => ({colour: colour(e, "color"),
      right: e.closest(".scroll") ? 0 : e.getBoundingClientRect().right})),
    paper: colour(document.body, "backgroundColor"),
  };
  const slider = document.querySelector("input"), before = document.querySelector("img").src;
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  seen.moved = document.querySelector("img").src !== before;
  seen.frame = document.querySelector('[data-role="frame"]').textContent;
  seen.cursor = document.querySelector(".cursor").style.left;
  slider.value = SHOWN;
  slider.dispatchEvent(new Event("input"));
  parent.document.getElementById("seen").textContent = JSON.stringify(seen);
});
"""
FRAME = """<!doctype html><body style="margin:0"><pre id="seen" hidden></pre>
<iframe srcdoc="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>"""
"""Chromium makes no window as narrow as a phone, but a frame. What the page's load event writes is there when the frame
has loaded, which the outer page waits for."""


@dataclass
class View:
    """What the browser says, and what it shows."""

    seen: dict[str, Any]
    pixels: NDArray[np.uint8]

    def part(self, box: list[float], margin: int = 0) -> NDArray[np.uint8]:
        left, top, right, bottom = (round(value) for value in box)
        return self.pixels[max(0, top - margin) : bottom + margin + 1, max(0, left - margin) : right + margin + 1]

    def shows(self, colour: str, box: list[float]) -> bool:
        """Whether some pixel in the box has nearly this colour."""
        wanted = np.array([int(value) for value in re.findall(r"\d+", colour)[:3]])
        return bool((np.abs(self.part(box, 1).astype(int) - wanted).max(axis=2) < 40).any())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Path:
    """A report as a user makes it, of two ranks."""
    folder = tmp_path_factory.mktemp("report")
    model = saved("wan21", folder / "model")
    before = Path.cwd()
    os.chdir(folder)
    try:
        arguments = ["--frames", "0:5", "--height", "96", "--width", "128", "--model", model]
        files = ["-o", "o.mp4", "--report", "r"]
        code, output, errors = on_ranks(two_ranks, "roundtrip", str(CLIP), *files, *arguments, "--compare")
    finally:
        os.chdir(before)
    assert code == 0, errors
    assert output.endswith("report: r/index.html\n")
    return folder / "r" / "index.html"


@pytest.fixture(scope="module")
def views(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], View]:
    """The page in a width, light or dark: each is looked at once, for all tests."""
    return functools.cache(lambda width, dark: look(page, tmp_path_factory.mktemp("view"), width, dark))


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def chromium(folder: Path, url: str, *flags: str) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--screenshot=shot.png", *flags]
    done = subprocess.run([*command, url], cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def look(page: Path, folder: Path, width: int, dark: bool) -> View:
    text = page.read_text()
    shown = re.search(r'value="(\d+)" aria-label', text)
    assert shown is not None
    probed = text.replace("</body>", f"<script>{PROBE.replace('SHOWN', shown[1])}</script></body>")
    framed = FRAME.format(page=html.escape(probed), width=width, height=10000)
    (folder / "frame.html").write_text(framed)
    flags = [f"--window-size={max(width, 500)},10000", *(["--force-dark-mode"] if dark else [])]
    dom = chromium(folder, (folder / "frame.html").as_uri(), "--dump-dom", *flags)
    seen = re.search(r'<pre id="seen" hidden="">(.+?)</pre>', dom)
    assert seen is not None, dom[-2000:]
    with Image.open(folder / "shot.png") as image:
        return View(json.loads(html.unescape(seen[1])), np.asarray(image.convert("RGB")))


def brightness(colour: str) -> float:
    return float(np.mean([int(value) for value in re.findall(r"\d+", colour)[:3]]))


DESKTOP, PHONE_IN_THE_DARK = (1100, False), (390, True)


@pytest.mark.parametrize(("width", "dark"), [DESKTOP, PHONE_IN_THE_DARK], ids=["desktop", "phone in the dark"])
def test_everything_is_drawn(views: Callable[[int, bool], View], width: int, dark: bool) -> None:
    view = views(width, dark)
    seen = view.seen
    assert seen["room"] == width
    assert seen["height"] < 10000
    assert seen["width"] <= width, "the page scrolls sideways"
    assert all(text["right"] <= width for text in seen["texts"]), "a text is cut off"
    assert [image["role"] for image in seen["images"]] == ["reference", "result", "difference", "heat"] * 2
    for image in seen["images"]:
        assert image["pixels"] == 128
        assert image["box"][2] - image["box"][0] > (300 if width < 500 else 250)
        assert view.part(image["box"]).std() > 8, f"nothing to see in the {image['role']}"
    assert len(seen["lines"]) == 2 * (4 + 3)
    for line in seen["lines"]:
        assert line["box"][2] - line["box"][0] > 100
        assert view.shows(line["colour"], line["box"]), line
    for border in seen["borders"]:
        assert view.part(border["box"], 1).max() > 180, "no white dash of a shard border"
    assert len(seen["borders"]) == 2
    assert len(seen["lanes"]) > 60
    assert all(view.shows(lane["colour"], lane["box"]) for lane in seen["lanes"][::25])


def test_colours_follow_the_system(views: Callable[[int, bool], View]) -> None:
    for width, dark in (DESKTOP, PHONE_IN_THE_DARK):
        view = views(width, dark)
        paper = brightness(view.seen["paper"])
        assert paper < 40 if dark else paper > 240
        assert abs(float(view.pixels[3, 3].mean()) - paper) < 2
        for text in view.seen["texts"]:
            assert abs(brightness(text["colour"]) - paper) > 90, "a text that is hard to read"


def test_the_slider_moves_pictures_words_and_cursors(views: Callable[[int, bool], View]) -> None:
    seen = views(*DESKTOP).seen
    assert seen["moved"]
    assert seen["frame"].startswith("Frame 0")
    assert seen["cursor"] == "0%"


def test_without_javascript(page: Path, in_folder: Path, views: Callable[[int, bool], View]) -> None:
    """The pictures of the worst frame and the curves are there; only the slider is not."""
    assert '<input type="range" hidden' in page.read_text()
    framed = FRAME.format(page=html.escape(page.read_text()), width=1100, height=10000)
    (in_folder / "frame.html").write_text(framed.replace("<iframe ", "<iframe sandbox=allow-same-origin "))
    chromium(in_folder, (in_folder / "frame.html").as_uri(), "--window-size=1100,10000")
    with Image.open(in_folder / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    for image in views(*DESKTOP).seen["images"][:3]:
        box = image["box"]
        drawn = pixels[round(box[1]) : round(box[3]), round(box[0]) : round(box[2])]
        assert drawn.std() > 8
