"""Every snippet and every command of README and docs runs, on small models and clips; their links lead somewhere."""

from __future__ import annotations

import ast
import fnmatch
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

import halovae
from halovae import comm, media
from halovae.base.files import write_json
from halovae.cli.main import COMMANDS, main
from halovae.datasets.buckets import Bucket
from halovae.datasets.formats import Storage
from halovae.datasets.items import Item
from halovae.pipelines.demo import make_demo_model

ROOT = Path(__file__).parents[1]
NAVIGATION = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in NAVIGATION)]
"""In the order in which they are read: later commands use files of earlier ones."""
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SOURCES = [
    f"/{path.relative_to(ROOT)}"
    for folder in ("src", "tests", "benchmarks", "examples", "tools", "training", "findings")
    for path in (ROOT / folder).rglob("*.py")
]
SMALLER = {
    "--height": "64", "--width": "96", "--num-frames": "5", "--num-inference-steps": "2", "--ranks": "2",
    "--ulysses-degree": "2", "--frames": "0:5",
    "--min-ssim": "0", "--min-psnr": "0",
}  # fmt: skip
SERVED, DATASET = "serve", "encode-dataset"
"""One runs until it is stopped, one starts Ray: their tests are in `test_serve*` and `test_dataset`."""
GIVEN_RATES = ["--flops", "1", "--bandwidth", "100"]
"""To `plan`, which else measures for long what this machine can do; see `test_cli_plan`."""


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text()) if kind == language]


def commands() -> list[list[str]]:
    """Words of each command of this program, in the order of the pages and then of `--help`."""
    text = "".join(code for page in PAGES for code in blocks(page, "")) + "\n"
    text += "\n".join(example for members in COMMANDS.values() for example in members.values())
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("halovae ")]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def small(words: list[str]) -> list[str]:
    """The same command on a small model, for a small result, on ranks that are there already."""
    words = ["demo" if "/Wan" in word else word for word in words]
    for flag in set(SMALLER) & set(words):
        words[words.index(flag) + 1] = SMALLER[flag]
    if words[0] == "plan":
        return words + GIVEN_RATES
    if "--ranks" in words:
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
    layout = Storage(
        folder=str(folder / "latents"), format="safetensors", store="mode", dtype="float32", model="demo",
        model_class="AutoencoderKLWan", scaling={},
    )  # fmt: skip
    done = {"fps": "25", "times": [], "done": {}}
    layout.write(Item(key="clip.mp4", path="clip.mp4"), Bucket(64, 96, 5), done, torch.randn(1, 16, 2, 8, 12))
    write_json(folder / "latents" / "manifest.json", vars(layout))
    (folder / "media").mkdir()
    shutil.copy(folder / "clip.mp4", folder / "media" / "bigbuckbunny.mp4")
    Image.open(ROOT / "media" / "coffee.png").resize((96, 64)).save(folder / "media" / "coffee.png")
    for name in ("in.jpg", "cherry_blossom.jpg"):
        Image.open(folder / "media" / "coffee.png").convert("RGB").save(folder / name)
    return folder


def test_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, two_ranks: Ranks) -> None:
    enter(folder, monkeypatch)
    for name in ("reference.mp4", "result.mp4"):
        shutil.copy("clip.mp4", name)
    ran: list[list[str]] = []
    for words in commands():
        if small(words) == ["doctor"]:
            continue  # `test_cli_ranks` has it.
        if words[0] in (SERVED, DATASET) or words[0].startswith("-"):
            assert words[0] in (SERVED, DATASET, "--version")
            assert {word for word in words if word.startswith("--")} <= FLAGS.get(words[0], {"--version"})
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
        again = any(words[0] == other[0] for other in ran) and "--ulysses-degree" not in words
        if again or words[0] in ("compare", "plan"):  # One of each kind on ranks is enough.
            code, said = main(words), ""
        else:
            code, _, said = on_ranks(two_ranks, *words)
        assert code == 0, (words, said)
        ran.append(words)
    assert {words[0] for words in ran} == set(FLAGS) - {SERVED, DATASET, "make-demo-model"}
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
    codes = blocks(page, "python")
    torch.manual_seed(0)
    vae: Any = FAMILIES["wan21"].build().float()
    given: dict[str, Any] = {
        "torch": torch, "halovae": halovae, "vae": vae, "latents": torch.randn(1, vae.config.z_dim, 2, 6, 6),
        "image": Image.open("in.jpg"), "picture": torch.randn(1, 3, 16, 16), "prompt": "",
        "network": torch.nn.Conv2d(3, 3, 3, padding=1),
    }  # fmt: skip
    if not any("init_process_group" in code for code in codes):
        comm.init_from_env("cpu")
        given |= {"vae_group": torch.distributed.group.WORLD}
    if page.name in ("index.md", "embedding.md"):
        given["pipe"] = small_calls(diffusers.WanImageToVideoPipeline.from_pretrained("demo"))
    if not any("halovae" in code or "distributed" in code for code in codes) and torch.distributed.get_rank():
        return 0  # Of diffusers alone: one rank is enough.
    gradients = torch.is_grad_enabled()
    for code in codes:
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
    "Qwen/Qwen-Image": "demo-i2i",
    ', torch_dtype=torch.bfloat16).to("cuda")': ")",
    "torch.accelerator.set_device_index(dist.get_rank())\n": "\n",
    'pipe("a cup of coffee", gen': 'pipe("a cup of coffee", height=64, width=96, num_inference_steps=2, gen',
}
"""The README's few lines are for accelerators."""


@pytest.mark.parametrize("name", [page.name for page in PAGES if blocks(page, "python") and page.stem != "serving"])
def test_snippets(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, two_ranks: Ranks) -> None:
    """Those of the server's page are run in `test_serve_online`, which has a server."""
    enter(folder, monkeypatch)
    page = next(page for page in PAGES if page.name == name)
    code, _, errors = on_ranks(two_ranks, str(page), program=snippets)
    assert code == 0
    assert "Deprecat" not in errors
    made = {"README.md": ("coffee.png", 1), "quickstart.md": ("out.mp4", 5)}
    if name in made:
        file, frames = made[name]
        assert media.read(Path(file)).frames.shape == (frames, 64, 96, 3)


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as its readers make them: GitHub and mkdocs alike."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert page.parent == ROOT or (ROOT / "docs") in target.parents, f"{link} leads out of the site"
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_files_and_programs_that_are_named_are_there(page: Path) -> None:
    """Programs of this repository take the flags that are shown, too."""
    text = page.read_text()
    for name in re.findall(r"`((?:benchmarks|tests|tools|findings|examples|training|src|media)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([\w/.*-]+\.py)`", text):
        assert fnmatch.filter(SOURCES, f"*/{name}"), name
    for name, flags in re.findall(r"python ((?:benchmarks|tests|tools|examples)/\w+\.py)([^`\n]*)", text):
        known = (ROOT / name).read_text() + (ROOT / "benchmarks" / "harness.py").read_text()
        for flag in re.findall(r"--[\w-]+", flags):
            assert any(f'"{form}"' in known for form in (flag, flag[2:], flag.replace("--no-", "--"))), (name, flag)
    targets = re.findall(r"^make (\w+)", "".join(blocks(page, "")), re.MULTILINE)
    for target in [*targets, *re.findall(r"`make (\w+)", text)]:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_messages_of_troubleshooting_are_those_of_the_program() -> None:
    trees = (ast.parse(path.read_text()) for path in (ROOT / "src" / "halovae").rglob("*.py"))
    said = "\n".join(
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in said, f"nothing says {part!r} of {message!r}"


def test_examples_for_contributors_are_the_code() -> None:
    files = (path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py"))
    source = "".join("".join(path.read_text().split()) for path in files)
    for code in blocks(ROOT / "CONTRIBUTING.md", "python"):
        assert "".join(code.split()) in source


def test_the_api_page_has_every_public_name() -> None:
    shown = re.findall(r"^::: halovae\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(halovae.__all__))


def test_every_page_is_in_the_navigation() -> None:
    assert {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} == set(NAVIGATION)
