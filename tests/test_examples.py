"""The examples run on ranks as torchrun makes them, and say what they should."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from command import on_ranks
from ranks import Ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "image_edit.py"


def program(arguments: list[str]) -> int:
    with patch.object(sys, "argv", [str(EXAMPLE), *arguments]):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return 0


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_image_edit(two_ranks: Ranks, mode: str) -> None:
    code, output, errors = on_ranks(two_ranks, *(["--mode", mode] if mode != "exact" else []), program=program)
    assert code == 0, errors
    differences = re.findall(r"largest difference from one rank: (\S+)", output)
    assert len(differences) == 2
    assert all(float(value) <= (1e-5 if mode == "exact" else 0) for value in differences)
    assert output.count(f"encode {mode} on") == 2
