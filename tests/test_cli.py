"""The command line as a user sees it: exit codes, lines on standard error, files on disk."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import typer
from families import FAMILIES
from safetensors import safe_open
from test_media import bars, cut_after_header

from halovae import media
from halovae.cli.main import app, main
from halovae.media import FrameRange, read

MEDIA = Path(__file__).parent.parent / "media"
CLIP = str(MEDIA / "bigbuckbunny.mp4")
RUN_FLAGS = {"--model", "--ranks", "--axis", "--dtype", "--device"}
CLIP_FLAGS = {"--frames", "--height", "--width"}
FILE_FLAGS = {"-o", "--output", "--json"}
SNAPSHOT = {
    "roundtrip": FILE_FLAGS | RUN_FLAGS | CLIP_FLAGS | {"--compare"},
    "encode": FILE_FLAGS | RUN_FLAGS | CLIP_FLAGS,
    "decode": FILE_FLAGS | RUN_FLAGS,
    "doctor": {"--ranks", "--device"},
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a Wan VAE so small that start-up is all that a run takes."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    FAMILIES["wan21"].build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small VAE of images."""
    folder = tmp_path_factory.mktemp("models") / "kl"
    FAMILIES["kl"].build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in an empty folder of its own, as no rank of anything, with one thread as the other tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "halovae", *arguments], **options)


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of such a process."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestHelp:
    def test_commands_and_flags(self) -> None:
        """A flag is a promise: whoever changes this table breaks somebody's script."""
        commands: Any = typer.main.get_command(app)
        found = {
            name: {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")}
            for name, command in commands.commands.items()
        }
        assert found == SNAPSHOT

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], *([name, "--help"] for name in SNAPSHOT)])
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert output.startswith("Usage: halovae")
        flags = SNAPSHOT[arguments[0]] if arguments and arguments[0] in SNAPSHOT else set()
        assert all(flag in output for flag in flags)

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys; from halovae.cli.main import main; main(['roundtrip', '--help']);"
            "print(sorted({'torch', 'diffusers', 'av', 'numpy', 'PIL', 'rich.progress'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("[]\n")


BAD_USE = {
    "no command": (["bogus"], "No such command 'bogus'"),
    "no flag": (["roundtrip", CLIP, "-o", "o.mp4", "--nope"], "No such option: --nope"),
    "no input": (["roundtrip", "-o", "o.mp4"], "Missing argument 'INPUT'"),
    "no output": (["roundtrip", CLIP], "Missing option '-o'"),
    "missing file": (["roundtrip", "none.mp4", "-o", "o.mp4"], "none.mp4 does not exist"),
    "empty file": (["roundtrip", "empty.mp4", "-o", "o.mp4"], "empty.mp4 is empty"),
    "not a video": (["encode", "text.mp4", "-o", "o.safetensors"], "text.mp4 can't be read"),
    "folder as input": (["roundtrip", ".", "-o", "o.mp4"], ". is a folder"),
    "kind of output": (["roundtrip", CLIP, "-o", "o.avi"], "must end with .mp4 or .png"),
    "kind of latents": (["encode", CLIP, "-o", "o.pt"], "must end with .safetensors"),
    "kind of report": (["roundtrip", CLIP, "-o", "o.mp4", "--json", "o.txt"], "must end with .json"),
    "folder of output": (["roundtrip", CLIP, "-o", "none/o.mp4"], "output folder none does not exist"),
    "read-only folder": (["roundtrip", CLIP, "-o", "/proc/o.mp4"], "can't write to folder /proc"),
    "input as output": (["roundtrip", CLIP, "-o", CLIP], "is the input"),
    "no ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "0"], "--ranks 0: give 1 or more"),
    "fewer ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "-2"], "--ranks -2: give 1 or more"),
    "too many ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "9999"], "ranks at most"),
    "words for ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "two"], "Invalid value for '--ranks'"),
    "axis": (["roundtrip", CLIP, "-o", "o.mp4", "--axis", "depth"], "--axis depth: give auto, height, width"),
    "empty axis": (["roundtrip", CLIP, "-o", "o.mp4", "--axis", "0x2"], "--axis 0x2"),
    "grid without ranks": (["roundtrip", CLIP, "-o", "o.mp4", "--axis", "2x2"], "needs 4 ranks, but there are 1"),
    "order of frames": (["roundtrip", CLIP, "-o", "o.mp4", "--frames", "9:3"], "--frames 9:3"),
    "words for frames": (["roundtrip", CLIP, "-o", "o.mp4", "--frames", "all"], "--frames all: give A:B"),
    "frames beyond": (["roundtrip", CLIP, "-o", "o.mp4", "--frames", "130:140", "--height", "36"], "has 132 frames"),
    "height": (["roundtrip", CLIP, "-o", "o.mp4", "--height", "0"], "Invalid value for '--height'"),
    "width": (["roundtrip", CLIP, "-o", "o.mp4", "--width", "1e3"], "Invalid value for '--width'"),
    "dtype": (["roundtrip", CLIP, "-o", "o.mp4", "--dtype", "int8"], "Invalid value for '--dtype'"),
    "device": (["roundtrip", CLIP, "-o", "o.mp4", "--device", "abacus"], "--device abacus: this machine has"),
    "no model": (["roundtrip", "o.png", "-o", "p.png", "--model", "none"], "--model none: no such folder"),
    "model without a VAE": (["roundtrip", "o.png", "-o", "p.png", "--model", "."], "has no VAE"),
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
    Path("text.mp4").write_text("hello\n" * 50)
    media.write(Path("o.png"), bars(1), media.read(Path(CLIP), frames=FrameRange(0, 1), height=36).fps)
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


class TestAlone:
    """In this process, a world of one."""

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
        assert "demo (AutoencoderKLWan), float32, 1 rank on cpu\n" in capsys.readouterr().out

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
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--height", "32", "--model", tiny, "--frames"]
        assert main([*arguments, "130:140"]) == 2
        assert Path("o.mp4").read_text() == "old"
        assert main([*arguments, "0:2"]) == 0
        assert main([*arguments, "0:3"]) == 0
        assert len(read(Path("o.mp4")).frames) == 3
        assert names(in_folder) == {"o.mp4"}

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

    def test_signal_handlers_are_given_back(self, tiny: str) -> None:
        before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
        assert main(["roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:1", "--height", "32", "--model", tiny]) == 0
        assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


class TestRanks:
    """Real processes."""

    @pytest.mark.parametrize(("ranks", "axis"), [(2, "auto"), (3, "3x1")])
    def test_ranks_give_what_one_gives(self, ranks: int, axis: str, tiny: str) -> None:
        arguments = ["--frames", "0:6", "--height", "50", "--width", "70", "--dtype", "float64", "--model", tiny]
        files = ["-o", "o.mp4", "--json", "o.json"]
        code, output, errors = run(
            "roundtrip", CLIP, *files, *arguments, "--ranks", str(ranks), "--axis", axis, "--compare"
        )
        assert code == 0, errors
        document = json.loads(Path("o.json").read_text())
        assert document["ranks"] == ranks
        assert document["differences"]["latents_relative"] < 1e-12
        assert document["differences"]["pixels"] < 1e-11
        assert document["differences"]["levels"] == 0
        assert document["psnr"] == pytest.approx(document["unparallel"]["psnr"])
        assert [half["encode"]["messages"] > 0 for half in document["per_rank"]] == [True] * ranks
        assert f"{ranks} ranks  un-parallel" in output
        assert read(Path("o.mp4")).frames.shape == (6, 50, 70, 3)

    def test_torchrun(self, tiny: str) -> None:
        """Encoded under torchrun, decoded under the launcher."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        encode = ["encode", CLIP, "-o", "o.safetensors", "--frames", "0:5", "--height", "64", "--model", tiny]
        done = subprocess.run([*torchrun, "-m", "halovae", *encode], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "2 ranks on cpu" in done.stdout
        assert run("decode", "o.safetensors", "-o", "o.mp4", "--ranks", "2")[0] == 0
        assert len(read(Path("o.mp4")).frames) == 5

    def test_a_bad_file_is_one_line(self, in_folder: Path, tiny: str) -> None:
        """Its header is good: only the ranks find out, all of them."""
        path = cut_after_header(in_folder)
        before = names(in_folder)
        code, output, errors = run("roundtrip", str(path), "-o", "o.mp4", "--model", tiny, "--ranks", "2")
        assert (code, output) == (2, "")
        assert errors.startswith(f"halovae: error: {path} is broken at frame")
        assert errors.count("\n") == 1
        assert names(in_folder) == before

    def test_interrupted_runs_leave_nothing(self, in_folder: Path) -> None:
        """And a terminal shows, until then, what is going on."""
        ours, theirs = pty.openpty()
        arguments = ["roundtrip", CLIP, "-o", "o.mp4", "--frames", "0:33", "--height", "480", "--ranks", "2"]
        process = start(*arguments, stderr=theirs, env={**os.environ, "TERM": "xterm"})
        os.close(theirs)
        shown = read_terminal(ours, until=b"encode")
        assert b"read" in shown
        assert b"load" in shown
        pids = [rank.pid for rank in psutil.Process(process.pid).children()]
        assert len(pids) == 2
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        shown = read_terminal(ours)
        process.communicate(timeout=20)
        assert time.monotonic() - started < 5
        assert process.returncode == 130
        assert shown.endswith(b"halovae: interrupted\r\n")
        assert b"Traceback" not in shown
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert names(in_folder) == set()

    def test_doctor(self) -> None:
        code, output, errors = run("doctor", "--device", "cpu")
        assert code == 0, errors
        said = dict(line.split(maxsplit=1) for line in output.splitlines())
        assert {"python", "torch", "diffusers", "devices", "link", "exact"} <= set(said)
        assert said["ranks"] == "2 on cpu, backend gloo"
        assert "GB/s" in said["link"]

    def test_rank_count_of_torchrun_holds(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert main(["roundtrip", CLIP, "-o", "o.mp4", "--ranks", "2"]) == 2
        assert "--ranks 2: torchrun has started 4" in capsys.readouterr().err


def read_terminal(descriptor: int, until: bytes | None = None) -> bytes:
    """What is written to a terminal until `until`, or until nobody can write to it any more."""
    shown = b""
    while until is None or until not in shown:
        try:
            shown += os.read(descriptor, 4096)
        except OSError:  # The other end is closed.
            assert until is None, shown
            os.close(descriptor)
            break
    return shown
