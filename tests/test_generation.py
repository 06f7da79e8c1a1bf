"""The commands that run whole pipelines, as a user starts them."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import CLIP
from command import enter, interrupt, names, on_ranks, run
from ranks import Ranks
from safetensors.torch import load_file

from halovae.cli.main import main
from halovae.media import read
from halovae.pipelines.demo import WEIGHTS

ROOT = Path(__file__).parents[1]
COFFEE = str(CLIP.parent / "coffee.png")
SMALL = ["--image", COFFEE, "--prompt", "a cup", "--height", "64", "--width", "96", "--num-frames", "5"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "demo"
    assert main(["make-demo-model", str(folder)]) == 0
    return str(folder)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


def test_the_published_command_on_two_ranks(demo: str) -> None:
    """Flag by flag as it stands, but for model, size and steps."""
    code, output, errors = run(
        "image-to-video", "--model", demo, "--image", COFFEE, "--prompt", "a cup of coffee", "--negative-prompt",
        "blurred", "--height", "128", "--width", "192", "--num-frames", "9", "--guidance-scale", "4.0",
        "--num-inference-steps", "3", "--flow-shift", "12.0", "--fps", "16", "--output", "i2v_output.mp4",
        "--enable-layerwise-offload", "--ulysses-degree", "2", "--vae-patch-parallel-size", "2", "--vae-use-tiling",
        "--ranks", "2", "--json", "run.json",
    )  # fmt: skip
    assert code == 0, errors
    assert "--vae-use-tiling" in errors
    clip = read(Path("i2v_output.mp4"))
    assert clip.frames.shape == (9, 128, 192, 3)
    assert clip.fps == 16
    wanted = read(Path(COFFEE), height=128, width=192).frames[0]
    assert psnr(clip.frames[0], wanted) > 15
    assert psnr(clip.frames[8], wanted) > 15
    assert psnr(clip.frames[0], wanted[::-1]) < 12
    document = json.loads(Path("run.json").read_text())
    assert document["ranks"] == 2
    assert document["setup"]["vae_mode"] == "tile"
    assert [call["mode"] for call in document["per_rank"][1]["vae_calls"]] == ["tile", "tile"]
    for stage in ("load", "text encode", "vae encode", "denoise", "vae decode", "write"):
        assert document["seconds"][stage] > 0
        assert f"\n{stage}" in output
    assert str(document["settings"]["seed"]) in output


def test_the_shipped_weights_are_what_the_script_makes() -> None:
    made, kept = runpy.run_path(str(ROOT / "training" / "demo_weights.py"))["solved_weights"](), load_file(WEIGHTS)
    torch.testing.assert_close(made, kept, rtol=1e-3, atol=1e-3)


def test_one_seed_gives_one_picture(demo: str, three_ranks: Ranks) -> None:
    """On one rank and on three, which share the VAE alone. One frame, because a video's codec loses something."""
    arguments = ["--model", demo, *SMALL, "--num-frames", "1", "--num-inference-steps", "2", "--seed", "5"]
    assert main(["image-to-video", *arguments, "-o", "one.png"]) == 0
    code, _, errors = on_ranks(three_ranks, "image-to-video", *arguments, "-o", "three.png")
    assert code == 0, errors
    one, three = (read(Path(name)).frames.astype(int) for name in ("one.png", "three.png"))
    assert one.std() > 20
    assert np.abs(one - three).max() <= 1


def test_dry_run_loads_no_weights(demo: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = in_folder / "configs"
    shutil.copytree(demo, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = ["--model", str(copy), "--image", COFFEE, "--prompt", "", "--ranks", "4", "--ulysses-degree", "4"]
    sizes = ["--height", "256", "--width", "384", "--num-frames", "9"]
    before = names(in_folder)
    assert main(["image-to-video", *arguments, *sizes, "--dry-run", "--json", "plan.json"]) == 0
    assert names(in_folder) == before | {"plan.json"}
    plan = json.loads(Path("plan.json").read_text())
    assert plan["tokens"] == 3 * 16 * 24
    assert plan["tokens_per_rank"] == 3 * 16 * 24 // 4
    assert plan["vae"]["decode"]["shards"] == [1, 4]
    assert {part["part"] for part in plan["parts"]} == {"vae", "transformer", "text_encoder"}
    taken = {(row["half"], row["mode"], row["ranks"]): row["bytes"] for row in plan["vae_halves"]}
    assert len(taken) == 6
    assert all(row["seconds"] > 0 for row in plan["vae_halves"])
    assert (plan["device"], plan["dtype"]) == ("cpu", "float32")  # as the run itself
    assert all(part["bytes"] == 4 * part["parameters"] for part in plan["parts"])
    for half in ("encode", "decode"):
        assert taken[half, "exact", 1] / 4 < taken[half, "exact", 4] < taken[half, "exact", 1] / 2
        assert taken[half, "tile", 4] > 0
    assert "1152 tokens, 288 on each of 4 ranks" in capsys.readouterr().out


REFUSED = [
    (["--lossless", "--crf", "20"], "--lossless loses nothing, so --crf 20 has no meaning"),
    (["--height", "100"], "--height 100 is not a multiple of 16: use 96 or 112"),
    (["--height", "9600", "--width", "9600"], "--height 9600 --width 9600: more than 67108864 pixels"),
    (["--num-frames", "6"], "--num-frames 6: the VAE would change it, use 5 or 9"),
    (["--ulysses-degree", "2"], "--ulysses-degree 2 needs 2 ranks, but there are 1: use --ranks 2"),
    (["--ulysses-degree", "3", "--ranks", "3"], "does not divide the 8 attention heads of WanTransformer3DModel"),
    (["--ulysses-degree", "8", "--ranks", "8", "--height", "80"], "60 tokens, which 8 ranks can't share evenly"),
    (["--ranks", "0"], "--ranks 0: give 1 or more"),
    (["--ring-degree", "2", "--ranks", "3"], "does not divide 3 ranks"),
    (["--vae-patch-parallel-size", "3", "--ranks", "2"], "--vae-patch-parallel-size 3: give 1 to 2"),
    (["--guidance-scale-high", "3"], "--guidance-scale-high can't be honoured"),
    (["--attention-backend", "none"], "--attention-backend none: there is none of that name; use one of "),
    (["--boundary-ratio", "0.5"], "--boundary-ratio can't be honoured"),
    (["--num-inference-steps", "400"], "--num-inference-steps 400: UniPCMultistepScheduler can't take it"),
    (["--flow-shift", "0"], "--flow-shift 0.0: give a number above 0"),
    (["--enable-cpu-offload", "--enable-layerwise-offload"], "exclude each other"),
    (
        ["--vae-use-tiling", "--vae-mode", "auto"],
        "--vae-use-tiling means --vae-mode tile, but --vae-mode auto",
    ),
    (["--vae-mode", "fast"], "--vae-mode fast: give exact, tile or auto"),
    (["--vae-mode", "tile", "--axis", "height"], "--axis can't be honoured with --vae-mode tile"),
    (["--image", "nowhere.png"], "nowhere.png does not exist"),
    (["--last-image", "nowhere.png"], "nowhere.png does not exist"),
    (["--image", str(CLIP)], "is a video: give a still image"),
    (["--model", "nowhere"], "--model nowhere: no such folder"),
    (["--model", "."], "has no model_index.json"),
    (["-o", "nowhere/video.mp4"], "output folder nowhere does not exist"),
    (["-o", "video.gif"], "must end with .mp4 or .png"),
    (["-o", "video.png"], "is one image, but there are 5 frames"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_bad_input_is_one_line(
    flags: list[str], message: str, demo: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image-to-video", "--model", demo, *SMALL, *flags, "--dry-run"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert names(in_folder) == set()


ALL_AT_ONCE = [
    (
        ["--image", "nowhere.png", "-o", "nowhere/o.mp4", "--flow-shift", "0", "--axis", "0x2", "--json", "o.txt"],
        [
            "nowhere.png does not exist",
            "output folder nowhere does not exist: create it first",
            "--flow-shift 0.0: give a number above 0",
            "--axis 0x2: give auto, height, width, or rows and columns such as 2x4",
            "output o.txt: the name must end with .json",
        ],
    ),
    (
        ["--image", COFFEE, "--height", "100", "--num-frames", "6", "--boundary-ratio", "0.5"],
        [
            "--boundary-ratio can't be honoured: this WanImageToVideoPipeline has one expert only; leave it out",
            "--height 100 is not a multiple of 16: use 96 or 112",
            "--num-frames 6: the VAE would change it, use 5 or 9",
            "--prompt is missing: WanImageToVideoPipeline needs one",
        ],
    ),
]


@pytest.mark.parametrize(("flags", "lines"), ALL_AT_ONCE, ids=["of flags and files", "of the model"])
def test_all_faults_are_told_at_once(
    flags: list[str], lines: list[str], demo: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["image-to-video", "--model", demo, *flags, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"halovae: error: {line}" for line in lines]
    assert names(in_folder) == set()


def test_what_configs_tell_is_refused_before_weights_are_loaded(
    demo: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo, "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    before = names(in_folder)
    for flag, value in (("--num-inference-steps", "400"), ("--height", "100"), ("--boundary-ratio", "0.5")):
        assert main(["image-to-video", "--model", "configs", *SMALL, flag, value, "--device", "cpu"]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(f"halovae: error: {flag} ")
        assert errors.count("\n") == 1
    assert names(in_folder) == before


def test_an_interrupted_run_leaves_nothing(demo: str, in_folder: Path) -> None:
    """Ctrl-C while both ranks denoise; the bar is drawn a few times in a second, so it leaves steps out."""
    arguments = ["--model", demo, *SMALL, "--num-inference-steps", "300", "--ulysses-degree", "2", "-o", "o.mp4"]
    interrupt("image-to-video", *arguments, "--json", "o.json", "--report", "report", until=rb"[2-9]\d/300")
    assert names(in_folder) == set()


def test_a_model_of_another_kind_is_refused(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text-to-video", "--model", demo, "--prompt", "a cup", "--dry-run"]) == 2
    assert "is a WanImageToVideoPipeline, which can't do text-to-video" in capsys.readouterr().err
    assert main(["image-to-image", "--model", demo, "--image", COFFEE, "--prompt", "a cup", "--dry-run"]) == 2
    assert "which can't do image-to-image" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--enable-cpu-offload", "--attention-backend=flash_varlen"])
def test_what_a_run_can_not_honour_is_refused(flag: str, demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image-to-video", "--model", demo, *SMALL, flag, "--device", "cpu"]) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


def test_a_broken_image_stops_all_ranks(demo: str, in_folder: Path, two_ranks: Ranks) -> None:
    Path("broken.png").write_bytes(Path(COFFEE).read_bytes()[:5000])
    arguments = ["--model", demo, *SMALL, "--image", "broken.png", "-o", "o.mp4"]
    code, output, errors = on_ranks(two_ranks, "image-to-video", *arguments)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert names(in_folder) == {"broken.png"}


def test_an_existing_folder_is_no_place_for_a_model(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-demo-model", demo]) == 2
    assert "is there already" in capsys.readouterr().err
