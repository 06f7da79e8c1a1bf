"""The command line on several ranks: real processes, as a user starts them."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import CLIP as CLIP_PATH
from clips import cut_after_header
from command import enter, interrupt, names, on_ranks, run, run_program, saved
from ranks import Ranks

from halovae import media
from halovae.base.options import HALVES
from halovae.cli.main import main
from halovae.media import read

CLIP = str(CLIP_PATH)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("wan21", tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def test_ranks_give_what_one_gives(tiny: str, three_ranks: Ranks) -> None:
    arguments = ["--frames", "0:6", "--height", "50", "--width", "70", "--dtype", "float64", "--model", tiny]
    files = ["-o", "o.mp4", "--json", "o.json", "--report", "r"]
    code, output, errors = on_ranks(three_ranks, "roundtrip", CLIP, *files, *arguments, "--axis", "3x1", "--compare")
    assert code == 0, errors
    document = json.loads(Path("o.json").read_text())
    assert document["ranks"] == 3
    assert document["differences"]["latents_relative"] < 1e-12
    assert document["differences"]["pixels"] < 1e-11
    assert document["differences"]["levels"] == 0
    assert document["differences"]["values_off"] == 0
    assert document["passed"] is True
    assert document["psnr"] == pytest.approx(document["one_rank"]["psnr"])
    assert document["peak_memory"] == max(half[name]["peak_memory"] for half in document["per_rank"] for name in HALVES)
    assert min(document["one_rank"]["peak_memory"].values()) > 0
    assert [half["encode"]["messages"] > 0 for half in document["per_rank"]] == [True] * 3
    assert "3 ranks  one rank" in output
    assert "in 8 bits all values are equal" in output
    assert "passed: the same up to rounding of float64" in output
    assert "the file is H.264 at crf 16, which changes pixels" in output
    page = Path("r/index.html").read_text()
    assert "✓ Passed" in page
    assert "un-parallel" not in page
    assert "before rounding to 8 bits and writing o.mp4; in 8 bits all values are equal" in page
    report = json.loads(Path("r/report.json").read_text())
    assert report["passed"] is True
    assert [row[0] for row in report["costs"]] == ["", *HALVES, "peak memory of a rank", "PSNR to the source"]
    # One time for encode and one for decode, wherever they are told.
    for name, row in zip(HALVES, report["costs"][1:3], strict=True):
        parts = report["timeline"]["ranks"][0]["parts"][name]
        seconds = document["per_rank"][0][name]["seconds"]
        assert row[1] == f"{seconds:.2f} s"
        assert sum(parts.values()) - parts["probe"] == pytest.approx(seconds, abs=0.01)
    assert read(Path("o.mp4")).frames.shape == (6, 50, 70, 3)


def test_torchrun(tiny: str, two_ranks: Ranks) -> None:
    """Encoded under torchrun, decoded by other ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    encode = ["encode", CLIP, "-o", "o.safetensors", "--frames", "0:5", "--height", "64", "--model", tiny]
    code, output, errors = run_program([*torchrun, "-m", "halovae", *encode])
    assert code == 0, errors
    assert "2 ranks on cpu" in output
    assert on_ranks(two_ranks, "decode", "o.safetensors", "-o", "o.mp4")[0] == 0
    assert len(read(Path("o.mp4")).frames) == 5


def test_a_bad_file_is_one_line(in_folder: Path, tiny: str) -> None:
    """Its header is good: only the ranks find out, all of them."""
    path = cut_after_header(in_folder)
    before = names(in_folder)
    code, output, errors = run("roundtrip", str(path), "-o", "o.mp4", "--model", tiny, "--ranks", "2")
    assert (code, output) == (2, "")
    assert errors.startswith(f"halovae: error: {path} is broken at frame")
    assert errors.count("\n") == 1
    assert names(in_folder) == before


def test_a_full_disk_stops_all_ranks_in_the_middle(in_folder: Path, tiny: str, two_ranks: Ranks) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (33, 64, 96, 3), dtype=np.uint8)
    media.write(Path("noise.mp4"), noise, Fraction(25), lossless=True)
    Path("o.mp4").write_text("old")
    writer = two_ranks.run(_process)[0]
    Path(f".o.{writer}.part.mp4").symlink_to("/dev/full")
    code, output, errors = on_ranks(two_ranks, "roundtrip", "noise.mp4", "-o", "o.mp4", "--lossless", "--model", tiny)
    assert (code, output) == (2, "")
    assert errors == "halovae: error: can't write o.mp4: no space left on device\n"
    assert Path("o.mp4").read_text() == "old"
    assert names(in_folder) == {"noise.mp4", "o.mp4"}


def _process(rank: int) -> int:
    return os.getpid()


def test_interrupted_runs_leave_nothing(in_folder: Path) -> None:
    """And a terminal shows, until then, what is going on."""
    shown = interrupt("roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:33", "--height", "480", until=b"encode")
    assert b"read" in shown
    assert b"load" in shown
    assert names(in_folder) == set()


def test_doctor() -> None:
    code, output, errors = run("doctor", "--device", "cpu")
    assert code == 0, errors
    said = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert {"python", "torch", "diffusers", "devices", "link", "exact"} <= set(said)
    assert said["ranks"] == "2 on cpu, backend gloo"
    assert "GB/s" in said["link"]


def test_rank_count_of_torchrun_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "2"]) == 2
    assert "--ranks 2: torchrun has started 4" in capsys.readouterr().err
