"""The report's JSON and HTML, without a browser: complete, self-contained, and safe with any name."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import bars
from PIL import Image

from halovae.base.errors import InputError
from halovae.base.timeline import Span
from halovae.evaluation import CutLines, clip_gates, compare_clips, compare_latents, report
from halovae.evaluation.report import (
    ClipSection,
    LatentSection,
    PictureSection,
    Report,
    check_report,
    lanes,
    write_report,
)
from halovae.evaluation.report.drawings import MOST_FRAMES, chosen, curve, gain, heat_map
from halovae.evaluation.report.figures import clip_figures, drawn_words
from halovae.evaluation.report.lanes import KINDS


def made(**changes: Any) -> Report:
    clip, result = bars(), bars()
    result[2, 20:40, 30:60] += 30
    found = compare_clips(clip, result, CutLines(rows=(32,)))
    latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seconds, found_lanes = lanes([[Span("encode", 0, 1)], [Span("encode", 0, 2)]])
    section = ClipSection(
        title="B against A", text="", reference_name="A", result_name="B", reference=clip, result=result, found=found,
        borders=found.grid, borders_name="shard borders",
    )  # fmt: skip
    encoded = LatentSection(
        title="Latents", text="", reference_name="A", result_name="B", found=compare_latents(latents, latents * 1.1)
    )
    parts: dict[str, Any] = {
        "title": "A title", "verdict": "A verdict.", "facts": {"Ranks": "2"}, "clips": [section], "latents": [encoded],
        "gates": clip_gates(found, min_psnr=60), "seconds": seconds, "lanes": found_lanes, "command": "halovae x",
    }  # fmt: skip
    return Report(**parts | changes)


class _Tags(HTMLParser):
    """Every tag with its attributes; fails on tags that don't match."""

    VOID = ("meta", "img", "input", "link", "line", "polyline", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def parsed(text: str) -> _Tags:
    tags = _Tags()
    tags.feed(text)
    assert tags.open == []
    return tags


class TestPage:
    def test_json_and_page_are_written(self, tmp_path: Path) -> None:
        page = write_report(tmp_path / "r", made())
        assert {path.name for path in (tmp_path / "r").iterdir()} == {"index.html", "report.json"}
        document = json.loads((tmp_path / "r" / "report.json").read_text())
        assert document["gates"][0]["passed"] is False
        assert document["clips"][0]["borders"] == {
            "name": "shard borders",
            "rows": [32],
            "columns": [],
            "overlap": [0, 0],
        }
        assert len(document["clips"][0]["frames"]) == 5
        assert document["timeline"]["balance"] == pytest.approx(4 / 3)
        assert len(document["timeline"]["ranks"]) == 2
        assert {"Processor", "Python", "torch"} <= set(document["machine"])
        assert page.read_text().startswith("<!doctype html>")

    def test_it_asks_no_network_for_anything(self, tmp_path: Path) -> None:
        text = write_report(tmp_path / "r", made()).read_text()
        assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[\w+/=]+", "", text))
        tags = parsed(text)
        assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in tags.all("img"))
        assert [link["href"] for link in tags.all("a")] == ["report.json"]

    def test_it_says_everything_without_pictures(self, tmp_path: Path) -> None:
        tags = parsed(write_report(tmp_path / "r", made()).read_text())
        assert tags.all("html") == [{"lang": "en"}]
        assert all(image["alt"] for image in tags.all("img"))
        for drawing in tags.all("svg"):
            assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true"
        assert all(header.get("scope") for header in tags.all("th"))
        ids = {attributes["id"] for _, attributes in tags.found if "id" in attributes}
        assert {section["aria-labelledby"] for section in tags.all("section")} <= ids
        (slider,) = tags.all("input")
        assert slider["aria-label"]
        assert "hidden" in slider

    def test_the_worst_frame_is_shown_first(self, tmp_path: Path) -> None:
        text = write_report(tmp_path / "r", made()).read_text()
        assert "Frame 2, the worst" in text
        image = parsed(text).all("img")[0]
        data = base64.b64decode((image["src"] or "").split(",")[1])
        with Image.open(io.BytesIO(data)) as shown:
            assert shown.size == (96, 64)
            assert np.abs(np.asarray(shown.convert("RGB")).astype(int) - bars()[2]).mean() < 8

    def test_names_are_no_markup(self, tmp_path: Path) -> None:
        evil = '<script>alert("x")</script>&'
        text = write_report(
            tmp_path / "r", made(title=evil, verdict=evil, facts={evil: evil}, command=evil)
        ).read_text()
        assert "<script>alert" not in text
        parsed(text)

    def test_pictures_without_a_reference(self, tmp_path: Path) -> None:
        pictures = [PictureSection(title="Made", text="", name="o.mp4", frames=bars(3))]
        text = write_report(tmp_path / "r", made(pictures=pictures, clips=[])).read_text()
        tags = parsed(text)
        assert [image["alt"] for image in tags.all("img")] == ["o.mp4, frame 0"]
        data = re.search(r'<script type="application/json">(.+?)</script>', text)
        assert data is not None
        assert [frame["frame"] for frame in json.loads(data[1])["frames"]] == [0, 1, 2]

    def test_parts_may_be_missing(self, tmp_path: Path) -> None:
        text = write_report(tmp_path / "r", made(clips=[], latents=[], gates=[], lanes=[], facts={})).read_text()
        assert "What each rank did" not in text
        parsed(text)

    def test_equal_clips_and_one_frame(self, tmp_path: Path) -> None:
        found = compare_clips(bars(1), bars(1))
        section = ClipSection(
            title="t", text="", reference_name="A", result_name="B", reference=bars(1), result=bars(1), found=found
        )
        text = write_report(tmp_path / "r", made(clips=[section], latents=[])).read_text()
        tags = parsed(text)
        assert tags.all("input") == []
        assert tags.all("polyline") == []
        assert "identical" in text

    @pytest.mark.parametrize(("passed", "mark"), [(True, "✓ Passed"), (False, "✗ Failed"), (None, None)])
    def test_a_mark_is_on_top(self, tmp_path: Path, passed: bool | None, mark: str | None) -> None:
        text = write_report(tmp_path / "r", made(passed=passed)).read_text()
        head = text[text.index("<header>") : text.index("</header>")]
        assert [word for word in ("✓ Passed", "✗ Failed") if word in head] == ([mark] if mark else [])

    def test_time_and_memory_as_on_the_terminal(self, tmp_path: Path) -> None:
        rows = [("", "2 ranks", "one rank", ""), ("encode", "1.00 s", "3.00 s", "3.00x as fast")]
        text = write_report(tmp_path / "r", made(costs=rows, costs_text="Read <so>.")).read_text()
        parsed(text)
        assert [re.sub("<.+?>", "", cell) for cell in re.findall(r"<t[hd].+?</t[hd]>", text)[:8]] == [
            *rows[0],
            *rows[1],
        ]
        assert "Read &lt;so&gt;." in text


def test_colours_of_the_timeline_can_be_told_apart() -> None:
    """Each from every other and from what is behind it, in CIELAB, in the light and in the dark."""
    css = (Path(report.__file__).parent / "templates" / "page.css").read_text()
    for scheme in css.split("prefers-color-scheme: dark"):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", scheme))
        shown = [lab(colours[kind]) for kind in (*KINDS, "panel")]
        for number, one in enumerate(shown):
            assert min((math.dist(one, other) for other in shown[number + 1 :]), default=99) > 24


def lab(colour: str) -> tuple[float, float, float]:
    """CIELAB of a colour of sRGB."""
    linear = [
        (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
        for v in np.array([*bytes.fromhex(colour[1:])]) / 255
    ]
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(matrix @ linear / [0.9505, 1, 1.089], 0.008856))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


class TestFolder:
    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "r").write_text("")
        with pytest.raises(InputError, match="is a file"):
            check_report(tmp_path / "r")

    def test_a_missing_parent_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            check_report(tmp_path / "no" / "r")
        check_report(tmp_path / "r")
        assert list(tmp_path.iterdir()) == []


class TestPictures:
    @pytest.mark.parametrize(("count", "worst"), [(1, 0), (MOST_FRAMES, 5), (MOST_FRAMES + 1, 7), (500, 123)])
    def test_chosen_frames(self, count: int, worst: int) -> None:
        frames = chosen(count, worst)
        assert {0, worst, count - 1} <= set(frames)
        assert frames == sorted(set(frames))
        assert len(frames) == min(count, len(frames)) <= MOST_FRAMES

    def test_gain_fits_the_range(self) -> None:
        grey = np.full((1, 8, 8, 3), 100.0)
        assert gain(grey, grey) == 1
        assert gain(grey, grey + 2) == 100
        assert gain(grey, grey + 1e-4) == 2_000_000
        assert gain(grey, grey + 150) == 1

    def test_what_the_difference_shows_is_told_in_words(self) -> None:
        tiny = drawn_words(500_000, 0.000397)
        assert "white is 5.1e-4 of one level, and the largest is 4.0e-4 of one level, of 255" in tiny
        assert "8-bit pixels can't show that" in tiny
        assert "white is 51 levels, and the largest is 163 levels, of 255" in drawn_words(5, 163)
        assert "8-bit" not in drawn_words(5, 163)
        assert "as it is" in drawn_words(1, 255)

    def test_heat_is_brightest_where_the_difference_is(self) -> None:
        energy = np.zeros((40, 60))
        energy[10:20, 30:50] = 16
        found = heat_map(energy)
        assert found["largest"] == 4
        with Image.open(io.BytesIO(base64.b64decode(found["picture"].split(",")[1]))) as image:
            light = np.asarray(image.convert("L")).astype(int)
        assert light[15, 40] > 200 > 50 > light[30, 10]


class TestCurves:
    def test_points(self) -> None:
        plot = curve("PSNR", "dB", {"": [30.0, 40.0, 35.0]})
        assert plot is not None
        assert plot["lines"][0]["pieces"] == ["0.0,100.0 50.0,0.0 100.0,50.0"]
        assert [text for _, text in plot["ticks"]] == ["30", "35", "40"]
        assert plot["words"] == "PSNR over 3 frames, from 30 to 40 dB"

    def test_gaps(self) -> None:
        plot = curve("PSNR", "dB", {"": [1.0, None, 2.0, 1.0, None]})
        assert plot is not None
        assert len(plot["lines"][0]["pieces"]) == 1
        assert plot["lines"][0]["dots"] == [(0.0, 100.0)]

    @pytest.mark.parametrize("values", [[], [1.0], [None, None]])
    def test_nothing_to_draw(self, values: list[float | None]) -> None:
        assert curve("x", "", {"": values}) is None

    @pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [0.99999, 0.999991], [-3.0, 5e4], [1e-9, 2e-9]])
    @pytest.mark.parametrize("with_zero", [False, True])
    def test_all_is_inside(self, values: list[float], with_zero: bool) -> None:
        plot = curve("x", "", {"": values}, with_zero)
        assert plot is not None
        places = [float(pair.split(",")[1]) for pair in plot["lines"][0]["pieces"][0].split()]
        assert all(0 <= place <= 100 for place in places)
        assert len({text for _, text in plot["ticks"]}) == len(plot["ticks"]) >= 2


def test_figures_of_equal_clips() -> None:
    values = {name: value for name, value, _ in clip_figures(compare_clips(bars(), bars()))}
    assert values["PSNR"] == "identical"
    assert values["Largest difference"] == values["Colour shift"] == "0"
    assert "MS-SSIM" not in values
    assert not any(math.isinf(float(v)) for v in values.values() if re.fullmatch(r"[\d.]+|inf", v))
