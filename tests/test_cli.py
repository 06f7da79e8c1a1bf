"""The command line as a user sees it: exit codes, lines on standard error, files on disk."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from clips import bars
from command import enter, names, saved
from flags import FLAGS
from PIL import Image
from safetensors import safe_open

import halovae
from halovae import media
from halovae.app.launch import Place
from halovae.app.run_options import RunOptions
from halovae.app.session import session
from halovae.cli.main import app, main
from halovae.media import read

MEDIA = Path(__file__).parent.parent / "media"
CLIP = str(MEDIA / "bigbuckbunny.mp4")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("wan21", tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="session")
def tiny_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("kl", tmp_path_factory.mktemp("models") / "kl")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


class TestHelp:
    def test_commands_and_flags(self) -> None:
        commands: Any = typer.main.get_command(app)
        found = {
            name: {
                flag
                for parameter in command.params
                for flag in (*parameter.opts, *parameter.secondary_opts)
                if flag.startswith("-")
            }
            for name, command in commands.commands.items()
        }
        assert found == FLAGS

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], *([name, "--help"] for name in FLAGS)])
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert output.startswith("Usage: halovae")
        if not arguments or arguments[0] not in FLAGS:
            assert "..." not in output.replace("[ARGS]...", "")  # Summaries are whole.
            return
        assert all(flag in output for flag in FLAGS[arguments[0]])
        example = output.partition("Example:\n  ")[2]
        assert example.startswith(f"halovae {arguments[0]} ")
        assert set(re.findall(r" (--?[a-z][a-z-]*)", example)) <= FLAGS[arguments[0]]

    def test_one_thing_has_one_description(self) -> None:
        """However the flag is called."""
        commands: Any = typer.main.get_command(app).commands
        described = [
            (parameter.help.replace("--vae-mode", "--mode"), parameter.show_default, parameter.metavar)
            for name, flags in (
                ("roundtrip", ("--mode", "--vae-use-tiling", "--vae-patch-parallel-size")),
                ("image-to-video", ("--vae-mode", "--vae-use-tiling", "--vae-patch-parallel-size")),
            )
            for flag in flags
            for parameter in commands[name].params
            if flag in parameter.opts
        ]
        assert described[:3] == described[3:]
        assert "image" not in str([one.show_default for one in commands["text-to-video"].params])

    @pytest.mark.parametrize("words", ["roundtrip --help", "serve --model none", "compare none a.mp4"])
    def test_what_needs_nothing_heavy_imports_nothing_heavy(self, words: str) -> None:
        code = (
            f"import sys; from halovae.cli.main import main; main({words.split()});"
            "print(sorted({'torch', 'diffusers', 'av', 'numpy', 'PIL', 'rich.progress'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("[]\n")

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"halovae {halovae.__version__}\n"


BAD_USE = {
    "no command": (["bogus"], "No such command 'bogus'; see halovae --help"),
    "no flag": (["roundtrip", CLIP, "-o", "o.mp4", "--nope"], "; see halovae roundtrip --help"),
    "nearly a command": (["encde"], "Did you mean 'encode'? See halovae --help"),
    "no input": (["roundtrip", "-o", "o.mp4"], "Missing argument 'INPUT'"),
    "no output": (["roundtrip", CLIP], "Missing option '-o' / '--output'; see halovae roundtrip --help"),
    "missing file": (["roundtrip", "none.mp4", "-o", "o.mp4"], "none.mp4 does not exist"),
    "empty file": (["roundtrip", "empty.mp4", "-o", "o.mp4"], "empty.mp4 is empty"),
    "not a video": (["encode", "text.mp4", "-o", "o.safetensors"], "text.mp4 can't be read"),
    "folder as input": (["roundtrip", ".", "-o", "o.mp4"], ". is a folder"),
    "kind of output": (["roundtrip", CLIP, "-o", "o.avi"], "must end with .mp4 or .png"),
    "kind of latents": (["encode", CLIP, "-o", "o.pt"], "must end with .safetensors"),
    "kind of report": (["roundtrip", CLIP, "-o", "o.mp4", "--json", "o.txt"], "must end with .json"),
    "folder of output": (["roundtrip", CLIP, "-o", "none/o.mp4"], "output folder none does not exist"),
    "file as folder of output": (["roundtrip", CLIP, "-o", "o.png/o.mp4"], "output folder o.png is a file"),
    "read-only folder": (["roundtrip", CLIP, "-o", "/proc/o.mp4"], "can't write to folder /proc"),
    "input as output": (["roundtrip", CLIP, "-o", CLIP], "is the input"),
    "no ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "0"], "--ranks 0: give 1 or more"),
    "fewer ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "-2"], "--ranks -2: give 1 or more"),
    "too many ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "9999"], "--ranks 9999: "),
    "words for ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "two"], "--ranks two: give a whole number"),
    "axis": (["roundtrip", CLIP, "-o", "o.mp4", "--axis", "depth"], "--axis depth: give auto, height, width"),
    "empty axis": (["roundtrip", CLIP, "-o", "o.mp4", "--axis", "0x2"], "--axis 0x2"),
    "grid without ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--axis", "2x2"], "needs 4 ranks, but there are 1"),
    "order of frames": (["roundtrip", CLIP, "-o", "o.mp4", "--frames", "9:3"], "--frames 9:3: give A:B with A below B"),
    "words for frames": (["roundtrip", CLIP, "-o", "o.mp4", "--frames", "all"], "--frames all: give A:B"),
    "frames beyond": (["roundtrip", "small.mp4", "-o", "o.mp4", "--frames", "3:8"], "has 5 frames"),
    "height": (["roundtrip", CLIP, "-o", "o.mp4", "--height", "0"], "--height 0: give a whole number from 1"),
    "width": (["roundtrip", CLIP, "-o", "o.mp4", "--width", "1e3"], "--width 1e3: give a whole number from 1"),
    "dtype": (
        ["roundtrip", CLIP, "-o", "o.mp4", "--dtype", "int8"],
        "--dtype int8: give float32, float64, ",
    ),
    "device": (["roundtrip", CLIP, "-o", "o.mp4", "--device", "abacus"], "--device abacus: this machine has"),
    "no model": (["roundtrip", "o.png", "-o", "p.png", "--model", "none"], "--model none: no such folder"),
    "model without a VAE": (["roundtrip", CLIP, "-o", "p.png", "--model", "."], "has no VAE"),
    "folder named demo": (["roundtrip", "o.png", "-o", "p.png", "--model", "demo"], "./demo has no VAE"),
    "many frames, one image": (
        ["roundtrip", CLIP, "-o", "o.png", "--frames", "0:2", "--height", "36"],
        "one image, but there are 2 frames",
    ),
    "video as latents": (["decode", CLIP, "-o", "o.mp4"], "no safetensors file"),
    "text as latents": (["decode", "text.mp4", "-o", "o.mp4"], "no safetensors file"),
}


@pytest.mark.parametrize("name", BAD_USE)
def test_bad_use_is_one_line(name: str, in_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("empty.mp4").touch()
    Path("demo").mkdir()
    Path("text.mp4").write_text("hello\n" * 50)
    media.write(Path("o.png"), bars(1), Fraction(1))
    media.write(Path("small.mp4"), bars(5), Fraction(25))
    before = names(in_folder)
    arguments, message = BAD_USE[name]
    assert main(arguments) == 2
    output, errors = capfd.readouterr()
    complaints = [line for line in errors.splitlines() if not line.startswith("halovae: note: ")]
    assert output == ""
    assert len(complaints) == 1
    assert complaints[0].startswith("halovae: error: ")
    assert message in complaints[0]
    assert names(in_folder) == before


ALL_AT_ONCE = {
    "words": (
        "encode none.mp4 -o o.safetensors --dtype int8 --axis 3x --mode foo --device tpu",
        ["--dtype int8: ", "none.mp4 does not exist", "--mode foo: ", "--axis 3x: ", "--device tpu: this machine has"],
    ),
    "numbers": ("plan --height 64 --width 0 --ranks a --link foo", ["--width 0: ", "--ranks a: ", "--link foo: "]),
    "unknown": ("plan --hight 6 --width 3 --nope --link", ["--hight", "--nope", "'--link' req", "option '--height'"]),
    "together": (
        f"roundtrip {CLIP} -o o.mp4 --untiled --mode tile --axis 2x1 --vae-use-tiling",
        ["--untiled is for exact", "--axis 2x1: tiles are not cut"],
    ),
    "files": (
        "decode none -o o.avi --json o.txt --tile-size 3 --memory 1",
        ["No such option: --memory", "output o.avi", "--tile-size 3: ", "output o.txt"],
    ),
    "size": ("plan --height 1000000 --width 1000000", ["--height 1000000 --width 1000000: more than 67108864 pixels"]),
    "size of noise": ("warm-up --height 9000 --width 9000", ["--height 9000 --width 9000: more than 67108864 pixels"]),
    "serve": (
        "serve --model none --port x --keep long --flow-shift 0",
        ["--port x: give a whole number from 0 to 65535", "--model none: ", "--keep long", "--flow-shift 0.0: "],
    ),
    "dataset": (
        "encode-dataset clips -o latents --bucket 3 --format zip --fps fast",
        ["--fps fast: give a number", "--format zip: give safetensors, ", "--bucket 3: give HEIGHTxWIDTHxFRAMES"],
    ),
}


@pytest.mark.parametrize("name", ALL_AT_ONCE)
def test_all_faults_are_told_at_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, messages = ALL_AT_ONCE[name]
    assert main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages), lines
    assert all(line.startswith("halovae: error: ") for line in lines)
    assert all(message in line for message, line in zip(messages, lines, strict=True)), lines


def test_what_the_library_warns_of_is_a_note(capfd: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        with session(RunOptions(device="cpu"), Place(rank=rank)):
            logging.getLogger("halovae").warning("%s differs", "the result")
            logging.getLogger("halovae").info("not for users")
    assert capfd.readouterr().err == "halovae: note: the result differs\n"


class TestAlone:
    """In this process, a world of one."""

    def test_uneven_times_come_out_as_they_went_in(self, tiny: str) -> None:
        first, *others = [Image.fromarray(pixels) for pixels in bars(5)]
        first.save("o.webp", save_all=True, append_images=others, duration=[40, 500, 40, 40, 1000])
        times = (0, 3600, 48600, 52200, 55800, 145800)
        assert main(["roundtrip", "o.webp", "-o", "r.mp4", "--model", tiny]) == 0
        assert main(["encode", "o.webp", "-o", "z.safetensors", "--model", tiny]) == 0
        assert main(["decode", "z.safetensors", "-o", "d.mp4", "--model", tiny]) == 0
        assert read(Path("r.mp4")).times == read(Path("d.mp4")).times == times

    def test_video(self, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--frames", "2:8", "--height", "50", "--width", "66"]
        assert main([*arguments, "--model", tiny, "--json", "o.json"]) == 0
        clip = read(Path("o.mp4"))
        assert clip.frames.shape == (6, 50, 66, 3)
        assert clip.fps == 25
        output, errors = capsys.readouterr()
        assert errors.splitlines() == [
            f"halovae: note: {CLIP}: the sound is left out",
            "halovae: note: 6 frames padded to 9 for the VAE, cropped back after it",
            "halovae: note: 66x50 padded to 72x56 for the VAE, cropped back after it",
        ]
        assert output.startswith("o.mp4: 6 frames of 66x50, 25 per second\n")
        document = json.loads(Path("o.json").read_text())
        assert document["sizes"]["padded_frames"] == 9
        assert document["model"] == tiny
        assert {"read", "load", "encode", "decode"} <= set(document["seconds"])

    def test_odd_sizes(self, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:3", "--height", "51", "--width", "67"]
        assert main([*arguments, "--model", tiny]) == 0
        assert read(Path("o.mp4")).frames.shape == (3, 51, 67, 3)
        assert "67x51 is odd" in capsys.readouterr().err

    def test_image(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The shipped VAE, on a real picture, keeps what it shows."""
        assert main(["roundtrip", str(MEDIA / "astronaut.png"), "-o", "o.png", "--height", "96"]) == 0
        source, result = (read(path, height=96).frames for path in (MEDIA / "astronaut.png", Path("o.png")))
        assert result.shape == (1, 96, 96, 3)
        small, large = (frames.reshape(6, 16, 6, 16, 3).mean((1, 3)).ravel() for frames in (result, source))
        assert np.corrcoef(small, large)[0, 1] > 0.9
        assert "demo (AutoencoderKLWan), float32, 1 rank on cpu, " in capsys.readouterr().out

    def test_vae_of_images_takes_video(self, tiny_image: str) -> None:
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:3", "--height", "40"]
        assert main([*arguments, "--model", tiny_image, "--dtype", "bfloat16"]) == 0
        assert read(Path("o.mp4")).frames.shape == (3, 40, 72, 3)

    def test_encode_then_decode_is_roundtrip(self, tiny: str, in_folder: Path) -> None:
        clip = [CLIP, "--frames", "0:6", "--height", "50", "--model", tiny]
        assert main(["roundtrip", *clip, "-o", "whole.mp4"]) == 0
        assert main(["encode", *clip, "-o", "o.safetensors", "--json", "e.json"]) == 0
        with safe_open("o.safetensors", "pt") as file:
            assert file.metadata()["fps"] == "25"
            assert file.metadata()["model_class"] == "AutoencoderKLWan"
            assert set(json.loads(file.metadata()["scaling"])) == {"latents_mean", "latents_std"}
        assert main(["decode", "o.safetensors", "-o", "halves.mp4"]) == 0
        assert np.array_equal(read(Path("whole.mp4")).frames, read(Path("halves.mp4")).frames)
        assert names(in_folder) == {"whole.mp4", "o.safetensors", "e.json", "halves.mp4"}

    def test_latents_of_another_vae(
        self, tiny: str, tiny_image: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["encode", CLIP, "--frames", "0:2", "--height", "32", "--model", tiny]
        assert main([*arguments, "-o", "o.safetensors"]) == 0
        assert main(["decode", "o.safetensors", "-o", "o.mp4", "--model", tiny_image]) == 2
        assert "are not of AutoencoderKL" in capsys.readouterr().err
        assert names(in_folder) == {"o.safetensors"}

    def test_output_is_replaced_only_by_a_whole_one(self, tiny: str, in_folder: Path) -> None:
        Path("o.mp4").write_text("old")
        media.write(Path("small.mp4"), bars(5), Fraction(25))
        arguments = ["roundtrip", "small.mp4", "-o", "o.mp4", "--height", "32", "--model", tiny, "--frames"]
        assert main([*arguments, "3:8"]) == 2
        assert Path("o.mp4").read_text() == "old"
        assert main([*arguments, "0:2"]) == 0
        assert main([*arguments, "0:3"]) == 0
        assert len(read(Path("o.mp4")).frames) == 3
        assert names(in_folder) == {"small.mp4", "o.mp4"}

    def test_a_comparison_that_fails_has_code_1(
        self, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("halovae.app.comparison.TOLERANCE", {"any": -1.0})
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:1", "--height", "32", "--model", tiny]
        assert main([*arguments, "--compare", "--json", "o.json"]) == 1
        assert json.loads(Path("o.json").read_text())["passed"] is False
        shown = capsys.readouterr()
        assert "FAILED: not the same" in shown.out
        assert shown.err.count("halovae: error: 1 rank and one rank do not give the same result") == 1

    def test_a_bug_has_a_traceback_and_code_1(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def broken(path: Path) -> None:
            raise ZeroDivisionError("oh")

        monkeypatch.setattr(media, "inspect", broken)
        assert main(["roundtrip", CLIP, "-o", "o.mp4"]) == 1
        errors = capsys.readouterr().err
        assert errors.startswith("Traceback")
        assert errors.endswith("halovae: error: ZeroDivisionError: oh\n")

    def test_an_interruption_is_told(
        self, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--model", tiny]
        # Tests that were started in the background have Ctrl-C ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for place, signum in (("halovae.app.clip_files.open_clip", signal.SIGTERM), ("halovae.media.inspect", 2)):
                monkeypatch.setattr(place, lambda *_, by=signum: signal.raise_signal(by))
                assert main(arguments) == 128 + signum
                assert capsys.readouterr().err == "halovae: interrupted\n"
        finally:
            signal.signal(signal.SIGINT, before)

    def test_signal_handlers_are_given_back(self, tiny: str) -> None:
        before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        assert main(["roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:1", "--height", "32", "--model", tiny]) == 0
        assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
