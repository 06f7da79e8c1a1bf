"""Long clips: what a step takes besides what it is given and gives does not grow with the number of frames."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halovae import media
from halovae.cli.main import main
from halovae.media import reader

PROGRAM = Path(__file__).parent / "peaks.py"
COPIES = {"read": 1, "to_tensor": 4, "write": 0}
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


def test_compare_holds_a_few_frames_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made, alive = tmp_path / "clip.mp4", [], []
    media.write(path, [np.full((32, 48, 3), level, np.uint8) for level in range(30)], Fraction(25))
    cover = reader.cover

    def counted(*args: Any) -> Any:
        frame = cover(*args)
        made.append(weakref.ref(frame))
        alive.append(sum(each() is not None for each in made))
        return frame

    monkeypatch.setattr(reader, "cover", counted)
    assert main(["compare", str(path), str(path)]) == 0
    assert len(made) >= 2 * 30
    assert max(alive) <= 2 * 4
