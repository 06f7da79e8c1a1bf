"""`halovae compare`: its numbers against ffmpeg's, its gates, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import bars
from command import enter, names
from numpy.typing import NDArray
from PIL import Image

from halovae.cli.main import main
from halovae.media import latents_file, write
from halovae.media.latents_file import LatentsInfo


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def write_lossless(path: str, frames: NDArray[np.uint8], rate: int = 25) -> str:
    """As RGB: what is read is what was written, in any program."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def blurred(frames: NDArray[np.uint8], radius: int) -> NDArray[np.uint8]:
    moved = [np.roll(frames.astype(np.uint16), shift, 2) for shift in range(-radius, radius + 1)]
    return (sum(moved) // len(moved)).astype(np.uint8)


def photograph(frames: int) -> NDArray[np.uint8]:
    """A part of a real picture, moving."""
    with Image.open(Path(__file__).parent.parent / "media" / "coffee.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    return np.stack([pixels[60 + 3 * n : 252 + 3 * n, 80 + 5 * n : 336 + 5 * n] for n in range(frames)])


def save_latents(path: str, values: torch.Tensor) -> str:
    info = LatentsInfo(
        model="demo", model_class="AutoencoderKLWan", scaling={}, fps=Fraction(25), frames=9, height=32, width=32,
        padded_frames=9, padded_height=32, padded_width=32,
    )  # fmt: skip
    with latents_file.LatentsWriter(Path(path)) as writer:
        writer.put(values)
        writer.finish(info)
    return path


class TestAgainstFfmpeg:
    pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")

    @pytest.fixture
    def clips(self) -> tuple[str, str]:
        frames = photograph(4)
        result = np.stack([blurred(frame[None], radius)[0] for radius, frame in enumerate(frames, start=1)])
        return write_lossless("a.mkv", frames), write_lossless("b.mkv", result)

    def ffmpeg(self, filtering: str, clips: tuple[str, str]) -> list[str]:
        graph = f"[0]format=gbrp[a];[1]format=gbrp[b];[b][a]{filtering}=stats_file=stats.txt"
        inputs = ["-i", clips[0], "-i", clips[1]]
        subprocess.run(["ffmpeg", "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"], check=True)
        return Path("stats.txt").read_text().splitlines()

    def ours(self, clips: tuple[str, str], what: str) -> list[float]:
        assert main(["compare", *clips, "--json", "o.json"]) == 0
        return [frame[what] for frame in json.loads(Path("o.json").read_text())["frames"]]

    def test_psnr(self, clips: tuple[str, str]) -> None:
        """ffmpeg prints two digits."""
        theirs = [float(re.findall(r"psnr_avg:([\d.]+)", line)[0]) for line in self.ffmpeg("psnr", clips)]
        assert self.ours(clips, "psnr") == pytest.approx(theirs, abs=0.006)

    def test_ssim(self, clips: tuple[str, str]) -> None:
        """ffmpeg's windows are squares of 8 pixels, every 4 pixels, not Gaussian: that moves SSIM by a hundredth."""
        theirs = [float(re.findall(r"All:([\d.]+)", line)[0]) for line in self.ffmpeg("ssim", clips)]
        assert max(theirs) - min(theirs) > 0.05
        assert self.ours(clips, "ssim") == pytest.approx(theirs, abs=0.015)


class TestGates:
    def test_exit_code_names_the_worst_frame(self, capsys: pytest.CaptureFixture[str]) -> None:
        frames = bars()
        broken = frames.copy()
        broken[3] = blurred(frames[3:4], 3)[0]
        clips = write_lossless("a.mkv", frames), write_lossless("b.mkv", broken)
        gates = ["--min-ssim", "0.94", "--min-psnr", "28"]
        assert main(["compare", *clips, *gates, "--json", "o.json", "--report", "r"]) == 1
        shown = capsys.readouterr()
        assert re.findall(r"halovae: gate failed: (\w+) .* in frame (\d)", shown.err) == [("SSIM", "3"), ("PSNR", "3")]
        assert "5 frames of 96x64" in shown.out
        document = json.loads(Path("o.json").read_text())
        assert [gate["passed"] for gate in document["gates"]] == [False, False]
        page = Path("r/index.html").read_text()
        assert main(["compare", clips[0], clips[0], *gates, "--report", "same"]) == 0
        assert "identical: no level of any pixel differs" in capsys.readouterr().out
        same = Path("same/index.html").read_text()
        assert "Identical: no level of any pixel differs" in same
        assert 'data-role="difference"' not in same
        assert 'class="heat"' not in same
        assert page.count("✗ failed") == 2
        assert "halovae compare a.mkv b.mkv --min-ssim 0.94" in page
        assert json.loads(Path("r/report.json").read_text())["gates"] == document["gates"]

    def test_latents(self, capsys: pytest.CaptureFixture[str]) -> None:
        values = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        files = save_latents("a.safetensors", values), save_latents("b.safetensors", values * 1.01)
        assert main(["compare", *files, "--max-l2", "0.02", "--report", "r"]) == 0
        assert "✓ passed" in Path("r/index.html").read_text()
        assert "1.000e-02" in capsys.readouterr().out
        assert main(["compare", *files, "--max-l2", "0.005"]) == 1
        assert "relative L2 0.01 in frame" in capsys.readouterr().err


def test_what_a_codec_loses_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs that differ by rounding: far apart as files, unless these lose nothing."""
    frames = photograph(3)
    rounded = frames.copy()
    rounded[:, ::7, ::5] ^= 1
    for name, lossless in (("lossy", False), ("kept", True)):
        for path, pixels in ((f"{name}_a.mp4", frames), (f"{name}_b.mp4", rounded)):
            write(Path(path), pixels, Fraction(25), crf=30, lossless=lossless)
        assert main(["compare", f"{name}_a.mp4", f"{name}_b.mp4", "--json", f"{name}.json", "--report", name]) == 0
    shown = capsys.readouterr().out
    told = "What the codec of lossy_a.mp4 (h264) and lossy_b.mp4 (h264) loses is in these numbers too"
    assert shown.count("What the codec of") == shown.count(told) == 1
    lossy, kept = (json.loads(Path(f"{name}.json").read_text()) for name in ("lossy", "kept"))
    assert lossy["lost"].startswith(told)
    assert kept["lost"] == ""
    assert kept["largest"] == 1 < lossy["largest"]
    assert told in Path("lossy/index.html").read_text()
    assert "What the codec of" not in Path("kept/index.html").read_text()
    assert main(["compare", "lossy_a.mp4", "lossy_a.mp4"]) == 0
    assert "codec" not in capsys.readouterr().out


class TestTrim:
    @pytest.mark.parametrize(
        ("frames", "rate", "said"),
        [
            (bars(4), 25, "frames 5 and 4"),
            (bars(5, 60, 80), 25, "size 96x64 and 80x60"),
            (bars(), 24, "rate 25 and 24"),
        ],
        ids=["length", "size", "rate"],
    )
    def test_differences(
        self, frames: NDArray[np.uint8], rate: int, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clips = write_lossless("a.mkv", bars()), write_lossless("b.mkv", frames, rate)
        assert main(["compare", *clips]) == 2
        remedy = "scale one of them, or use halovae roundtrip --compare" if "size" in said else "use --trim"
        assert f"differ: {said}: {remedy}" in capsys.readouterr().err
        assert main(["compare", *clips, "--trim"]) == 0
        done = "cropped around the centre, not scaled" if "size" in said else "trimmed"
        assert f"note: {done}: {said}" in capsys.readouterr().err

    def test_sizes_around_the_centre(self) -> None:
        frames = bars()
        clips = write_lossless("a.mkv", frames), write_lossless("b.mkv", frames[:, 2:-2, 4:-4])
        assert main(["compare", *clips, "--trim", "--min-psnr", "99"]) == 0

    def test_latents(self, capsys: pytest.CaptureFixture[str]) -> None:
        values = torch.randn(1, 4, 3, 4, 4)
        files = save_latents("a.safetensors", values), save_latents("b.safetensors", values[:, :, :2])
        assert main(["compare", *files]) == 2
        assert "use --trim" in capsys.readouterr().err
        assert main(["compare", *files, "--trim", "--max-l2", "0"]) == 0
        assert main(["compare", files[0], save_latents("c.safetensors", values[..., :2]), "--trim"]) == 2
        assert "differ in height or width" in capsys.readouterr().err


PICTURE, LATENTS = "a.png", "z.safetensors"
REFUSED = {
    "missing": (["no.mp4", PICTURE], "no.mp4 does not exist"),
    "two kinds": (
        [PICTURE, LATENTS],
        "a.png is an image and z.safetensors is a file of latents: compare two of one kind",
    ),
    "gate of pictures": ([LATENTS, LATENTS, "--min-ssim", "0.9"], "--min-ssim is for pictures"),
    "grid of pictures": ([LATENTS, LATENTS, "--grid", "8x8"], "--grid is for pictures"),
    "gate of latents": ([PICTURE, PICTURE, "--max-l2", "1"], "--max-l2 is for latents"),
    "no grid": ([PICTURE, PICTURE, "--grid", "0x0"], "--grid 0x0: give rows and columns"),
    "words": ([PICTURE, PICTURE, "--grid", "fine"], "--grid fine: give rows and columns"),
    "too much": ([PICTURE, PICTURE, "--min-ssim", "2"], "--min-ssim"),
    "json": ([PICTURE, PICTURE, "--json", "o.txt"], "must end with .json"),
    "report": ([PICTURE, PICTURE, "--report", PICTURE], "--report a.png is a file: give a folder"),
    "report's parent": ([PICTURE, PICTURE, "--report", "no/r"], "output folder no does not exist"),
    "other latents": ([LATENTS, "y.safetensors"], "not of one VAE"),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments: list[str], said: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(bars(1)[0]).save(PICTURE)
    save_latents(LATENTS, torch.ones(1, 4, 3, 4, 4))
    save_latents("y.safetensors", torch.ones(1, 8, 3, 4, 4))
    before = names(in_folder)
    assert main(["compare", *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert names(in_folder) == before
