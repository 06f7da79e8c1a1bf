"""Long clips: what a step takes besides what it is given and gives does not grow with the number of frames."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "peaks.py"
COPIES = {"read": 1, "to_tensor": 4, "write": 0, "compare": 0}
"""Of the clip in 8 bits, in what each step gives: floats are four times as large."""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to tell the peak")
def test_a_step_takes_no_more_than_its_result(tmp_path: Path) -> None:
    words = [sys.executable, str(PROGRAM), str(tmp_path)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    found = {name: int(growth) / int(clip) for name, clip, growth in map(str.split, ended.stdout.splitlines())}
    assert found.keys() == COPIES.keys()
    for name, copies in COPIES.items():
        assert found[name] < copies + 0.6, f"{name} took {found[name]:.2f} times the clip in 8 bits"
