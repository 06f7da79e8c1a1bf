"""The examples run as a user starts them, and say what they should."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from command import PATIENCE, on_ranks
from ranks import Ranks

from halovae import media

EXAMPLE = Path(__file__).parents[1] / "examples" / "image_edit.py"


README = Path(__file__).parents[1] / "README.md"


def test_the_first_lines_of_the_readme_run_on_any_device(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model, and a small picture."""
    code = README.read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("Wan-AI/Wan2.2-I2V-A14B-Diffusers", str(demo_model)).replace(
        'prompt="...",', 'prompt="", height=64, width=96, num_frames=5, num_inference_steps=1,'
    )
    shutil.copy(README.parent / "media" / "coffee.png", tmp_path / "in.jpg")
    monkeypatch.chdir(tmp_path)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    try:
        exec(compile(code, str(README), "exec"), {})
    finally:
        dist.destroy_process_group()
    assert media.read(Path("out.mp4")).frames.shape == (5, 64, 96, 3)


def check(output: str, mode: str) -> None:
    differences = re.findall(r"largest difference from one rank: (\S+)", output)
    assert len(differences) == 2
    assert all(float(value) <= (1e-5 if mode == "exact" else 0) for value in differences)
    assert output.count(f"encode {mode} on") == 2


def test_image_edit() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(EXAMPLE)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    check(done.stdout, "exact")


def program(arguments: list[str]) -> int:
    with patch.object(sys, "argv", [str(EXAMPLE), *arguments]):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return 0


def test_image_edit_by_tiles(two_ranks: Ranks) -> None:
    code, output, errors = on_ranks(two_ranks, "--mode", "tile", program=program)
    assert code == 0, errors
    check(output, "tile")
