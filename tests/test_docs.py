"""Every snippet and every command of README and docs runs, on small models and small clips."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from clips import bars
from command import enter, on_ranks
from families import FAMILIES
from flags import FLAGS
from PIL import Image
from ranks import Ranks

from halovae import comm, media
from halovae.cli.main import COMMANDS, main
from halovae.pipelines.demo import make_demo_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALLER = {
    "--height": "64", "--width": "96", "--num-frames": "5", "--num-inference-steps": "2", "--ranks": "2",
    "--ulysses-degree": "2", "--frames": "0:5",
    "--min-ssim": "0", "--min-psnr": "0",
}  # fmt: skip
SERVED = "serve"
"""Runs until it is stopped: its tests are in `test_serve*`."""


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def commands() -> list[list[str]]:
    """Words of each command of this program, in the order of the pages and then of `--help`."""
    text = "".join(code for page in PAGES for code in blocks(page, "")) + "\n"
    text += "\n".join(example for *_, example in COMMANDS)
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("halovae ")]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def small(words: list[str]) -> list[str]:
    """The same command on a small model, for a small result, on ranks that are there already."""
    words = ["demo" if "/Wan" in word else word for word in words]
    for flag in set(SMALLER) & set(words):
        words[words.index(flag) + 1] = SMALLER[flag]
    if words[0] != "plan" and "--ranks" in words:
        place = words.index("--ranks")
        del words[place : place + 2]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """Where the commands run: with the files that they name."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(demo_model, folder / "demo")
    make_demo_model(folder / "demo-t2v", "text-to-video")
    make_demo_model(folder / "demo-i2i", "image-to-image")
    media.write(folder / "clip.mp4", bars(5), Fraction(25))
    (folder / "media").mkdir()
    Image.open(ROOT / "media" / "coffee.png").resize((96, 64)).save(folder / "media" / "coffee.png")
    for name in ("cup.png", "in.jpg", "cherry_blossom.jpg"):
        Image.open(folder / "media" / "coffee.png").convert("RGB").save(folder / name)
    return folder


def test_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, two_ranks: Ranks) -> None:
    enter(folder, monkeypatch)
    for name in ("reference.mp4", "result.mp4"):
        shutil.copy("clip.mp4", name)
    ran: list[list[str]] = []
    for words in commands():
        if words[0] == SERVED or words[0].startswith("-"):
            assert words[0] in (SERVED, "--version")
            assert {word for word in words if word.startswith("--")} <= FLAGS[SERVED] | {"--version"}
            continue
        if words[0] == "make-demo-model":
            assert Path(words[1]).is_dir()  # Made above, in the same way.
            continue
        words = small(words)
        if words in ran:
            continue
        if "reference.safetensors" in words:
            for name in words[1:3]:
                shutil.copy("latents.safetensors", name)
        if words[0] in ("compare", "plan"):
            code, said = main(words), ""
        else:
            code, _, said = on_ranks(two_ranks, *words)
        assert code == 0, (words, said)
        ran.append(words)
    assert {words[0] for words in ran} == set(FLAGS) - {SERVED, "make-demo-model"}
    for name, frames in (("i2v_output.mp4", 5), ("t2v_output.mp4", 5), ("i2i_output.png", 1)):
        made = media.read(Path(name)).frames
        assert made.shape == (frames, 64, 96, 3)
        assert made.std() > 5


def test_make_demo() -> None:
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = next(shlex.split(line) for line in shown.replace("\\\n", " ").splitlines() if "bin/halovae " in line)
    assert words[1] == "roundtrip"
    assert (ROOT / words[2]).exists()
    assert {word for word in words if word.startswith("-")} <= FLAGS["roundtrip"]


def snippets(words: list[str]) -> int:
    """Runs in a world of two. The snippets of a page share their names, and those that a page takes as given."""
    page = Path(words[0])
    torch.manual_seed(0)
    vae: Any = FAMILIES["wan21"].build().float()
    image = Image.open("in.jpg")
    given: dict[str, Any] = {
        "torch": torch, "vae": vae, "latents": torch.randn(1, vae.config.z_dim, 2, 6, 6), "image": image, "prompt": "",
        "network": torch.nn.Conv2d(3, 3, 3, padding=1),
    }  # fmt: skip
    if page.name == "README.md":
        given["image"] = torch.randn(1, 3, 16, 16)
    else:
        comm.init_from_env("cpu")
        import halovae

        given |= {"halovae": halovae, "vae_group": torch.distributed.group.WORLD}
    if page.name == "embedding.md":
        given["pipe"] = small_calls(diffusers.WanImageToVideoPipeline.from_pretrained("demo"))
    gradients = torch.is_grad_enabled()
    for code in blocks(page, "python"):
        for large, little in REPLACED.items():
            code = code.replace(large, little)
        exec(compile(code, str(page), "exec"), given)
    torch.set_grad_enabled(gradients)
    return 0


def small_calls(pipe: Any) -> Any:
    """Calls that say nothing of sizes make small videos."""

    class Small(type(pipe)):
        def __call__(self, **options: Any) -> Any:
            sizes = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2}
            return super().__call__(**sizes | options)

    pipe.__class__ = Small
    return pipe


REPLACED = {
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "demo",
    'prompt="...", gen': 'prompt="", height=64, width=96, num_frames=5, num_inference_steps=2, gen',
    "height=512, width=768, num_frames=49": "height=64, width=96, num_frames=5, num_inference_steps=2",
    "ulysses_degree=8, layerwise_offload=True": "ulysses_degree=2, layerwise_offload=True",
    "axis=(2, 4)": "axis=(1, 2)",
}


@pytest.mark.parametrize("name", [page.name for page in PAGES if blocks(page, "python") and page.stem != "serving"])
def test_snippets(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, two_ranks: Ranks) -> None:
    """Those of the server's page are run in `test_serve_online`, which has a server."""
    enter(folder, monkeypatch)
    page = next(page for page in PAGES if page.name == name)
    code, _, errors = on_ranks(two_ranks, str(page), program=snippets)
    assert code == 0
    assert "Deprecat" not in errors
    if name == "README.md":
        assert media.read(Path("out.mp4")).frames.shape == (5, 64, 96, 3)
