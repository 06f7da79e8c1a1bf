"""The examples run as a user starts them, and say what they should."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from command import PATIENCE, on_ranks
from ranks import Ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "image_edit.py"


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
