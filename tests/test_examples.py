"""The examples run as a user starts them, and say what they should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import PATIENCE

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_image_edit(mode: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "image_edit.py"), "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"largest difference from one rank: (\S+)", done.stdout)
    assert len(differences) == 2
    assert all(float(value) <= (1e-5 if mode == "exact" else 0) for value in differences)
    assert done.stdout.count(f"encode {mode} on") == 2
