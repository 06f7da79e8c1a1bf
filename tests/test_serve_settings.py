"""What whoever starts a server may choose."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run

from halovae.base.errors import InputError
from halovae.cli.main import main
from halovae.serve.server_settings import parse_keep, read_key


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800)])
def test_times(text: str, seconds: int) -> None:
    assert parse_keep(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0s", "-1s", "1.5h", "7 d", "1w"])
def test_words_that_are_no_times(text: str) -> None:
    with pytest.raises(InputError, match=f"--keep {text}: give a time such as 90s"):
        parse_keep(text)


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("a-key-that-is-long-enough\n")
    assert read_key(path) == "a-key-that-is-long-enough"
    for bad in ("short", "with spaces in it, and long", "ümlaute-und-noch-mehr-davon", ""):
        path.write_text(bad)
        with pytest.raises(InputError, match="the key needs 16 or more"):
            read_key(path)
    with pytest.raises(InputError, match="can't be read"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "image-to-image"], "--task image-to-image: give image-to-video or text-to-video"),
        (["--keep", "long"], "--keep long: give a time"),
        (["--ranks", "0"], "--ranks 0: give 1 or more"),
        (["--ulysses-degree", "2"], "--ulysses-degree 2 needs 2 ranks, but there are 1"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1"),
        (["--crf", "20", "--lossless"], "--lossless loses nothing, so --crf 20 has no meaning: leave one of them out"),
        (["--model", "none"], "--model none: no such folder, and no hub id of the form owner/name"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["serve", "--model", str(tmp_path), "--store", str(tmp_path / "store"), *arguments])
    output, errors = capsys.readouterr()
    assert (code, output) == (2, "")
    assert words in errors
    assert errors.count("\n") == 1


def test_torchrun_is_told_what_to_run_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "halovae: error: halovae serve starts its ranks by itself: run `halovae serve --ranks 8 ...` without torchrun, "
        "once on each machine\n"
    )


def test_a_model_without_parts_ends_the_server(tmp_path: Path) -> None:
    """The ranks find out."""
    code, output, errors = run("serve", "--model", str(tmp_path), "--port", "0", "--store", str(tmp_path / "store"))
    assert (code, output) == (2, "")
    said = errors.splitlines()
    assert len(said) == 2, errors
    assert said[1].startswith(f"halovae: error: --model {tmp_path} has no model_index.json")
