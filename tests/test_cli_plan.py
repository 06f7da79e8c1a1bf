"""`halovae plan`: its table, its refusals, and that it starts and loads nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import enter, run
from families import FAMILIES

from halovae.app.plan import _doubts
from halovae.app.survey import Row
from halovae.cli.main import main

CLIP = ["plan", "--height", "64", "--width", "96", "--num-frames", "5", "--flops", "1", "--bandwidth", "100"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def config(family: str) -> str:
    """A folder with nothing but a config: whoever wants weights fails."""
    FAMILIES[family].build().save_config(family)
    return family


def test_every_mode_and_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CLIP, "--model", config("wan21"), "--ranks", "1,4,64", "--json", "p.json"]) == 0
    output = capsys.readouterr().out
    assert "5 frames of 96x64" in output
    assert "1 TFLOP/s, 100 GB/s" in output
    document = json.loads(Path("p.json").read_text())
    for half in ("encode", "decode"):
        rows = [row for row in document["rows"] if row["half"] == half]
        assert {(row["mode"], row["ranks"]) for row in rows} == {(m, n) for m in ("exact", "tile") for n in (1, 4, 64)}
        assert all(row["seconds"] > 0 and row["memory"] > document["weights"] > 0 and row["fits"] for row in rows)
        alone = next(row for row in rows if (row["mode"], row["ranks"]) == ("exact", 1))
        assert alone["efficiency"] == 1
        assert alone["messages"] == 0
        cuts = {row["cut"] for row in rows if (row["mode"], row["ranks"]) == ("exact", 4)}
        assert cuts == {"2x2", "4x1", "1x4"}


def test_a_config_file_and_a_vae_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    """Five frames go through it one by one."""
    assert main([*CLIP, "--model", f"{config('kl')}/config.json", "--ranks", "1", "--json", "five.json"]) == 0
    assert main([*CLIP, "--num-frames", "1", "--model", "kl", "--ranks", "1", "--json", "one.json"]) == 0
    five, one = (json.loads(Path(name).read_text())["rows"] for name in ("five.json", "one.json"))
    assert [row["seconds"] for row in five] == pytest.approx([5 * row["seconds"] for row in one])
    assert "AutoencoderKL" in capsys.readouterr().out


def test_what_cant_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """The number of ranks that it names does fit."""
    arguments = [*CLIP, "--model", config("wan21"), "--ranks"]
    assert main([*arguments, "1", "--json", "p.json"]) == 0
    document = json.loads(Path("p.json").read_text())
    other, least = (
        min(row["memory"] for row in document["rows"] if row["half"] == half) for half in ("encode", "decode")
    )
    room = str((other + least) / 2 / 2**30)
    assert main([*arguments, "1", "--memory", room]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"halovae: error: decode needs {least / 2**30:.3g} GiB on a rank at the least")
    enough = line.split(": ")[-1].split()[0]
    assert main([*arguments, enough, "--memory", room]) == 0
    assert main([*arguments, "1", "--memory", str(document["weights"] / 2 / 2**30)]) == 2
    assert "no number of ranks would do" in capsys.readouterr().err


def test_refusals_of_modes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CLIP, "--model", config("vq"), "--ranks", "2"]) == 0
    assert "tile on 2: VQModel.encode has no tiles" in capsys.readouterr().out


def test_times_that_one_may_doubt_are_not_printed_without_a_word() -> None:
    rows = [Row(half="decode", mode="exact", ranks=8, prediction=None, efficiency=e) for e in (1.0, None, 1.25)]
    assert _doubts({"decode": rows[:2]}, 0.0) == []
    noise, good = _doubts({"encode": rows[:1], "decode": rows}, 0.3)
    assert noise.startswith("30 % of the trials took another time at each try")
    assert good.startswith("an efficiency of 1.25 (decode, exact on 8) means")


REFUSED = {
    "ranks": (["--ranks", "1,x"], "--ranks 1,x: give numbers from 1 to 1024"),
    "no ranks": (["--ranks", "0"], "--ranks 0: give numbers"),
    "link": (["--link", "string"], "--link string: give nvlink, pcie, ethernet or measured"),
    "memory": (["--memory", "0"], "--memory 0: give a number above 0"),
    "report": (["--json", "p.txt"], "must end with .json"),
    "model": (["--model", "none"], "--model none: no such folder"),
    "config": (["--model", "bad.json"], "is no autoencoder of diffusers"),
    "values": (["--model", "odd.json"], "can't build the AutoencoderKLWan of odd.json from its config"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_use(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_text('{"_class_name": "UNet2DModel"}')
    Path("odd.json").write_text('{"_class_name": "AutoencoderKLWan", "base_dim": "wide"}')
    arguments, message = REFUSED[name]
    assert main([*CLIP, *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("halovae: error: ")
    assert message in line


def test_rates_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CLIP[:7], "--flops", "1"]) == 2
    assert "--flops and --bandwidth belong together" in capsys.readouterr().err


def test_a_measured_link_and_device() -> None:
    code, output, errors = run(*CLIP[:7], "--model", config("kl"), "--ranks", "1,2", "--link", "measured")
    assert code == 0, errors
    assert "link measured, " in output
    assert output.count("device cpu") == 1
