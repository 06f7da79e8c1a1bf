"""The core of the tests on other versions of what `pyproject.toml` asks for, in an environment of its own.

    python tests/compat.py lowest                    # what pyproject.toml promises at least
    python tests/compat.py newest                    # what pip installs without being told
    python tests/compat.py lowest torch==2.13.0      # but for these

The environment is kept in `build/compat-lowest`. From PyPI, torch for Linux comes with gigabytes of CUDA.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "rules", "windows", "layout", "refusals", "kernels", "geometry", "plan", "exact_families", "optimize",
    "tile_families", "merge", "predict", "parallel", "graphs", "fit", "media", "pipelines", "cli_ranks",
)  # fmt: skip
"""Operators, every family in both modes, real ranks, pipelines and the command line."""
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "psutil>=6", "httpx2")
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "numpy", "av", "pillow", "safetensors", "typer")


def requirements(which: str, given: list[str]) -> list[str]:
    """Those of the package and of its server, at the lowest version or at any; `given` ones instead of theirs."""
    # By their form, because Python 3.10 reads no TOML.
    text = re.split(r"^dev = ", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[0]
    found = dict(re.findall(r'"([a-z0-9-]+)>=([\d.]+)"', text.split("dependencies = [", 1)[1]))
    asked = {name: f"{name}=={least}" if which == "lowest" else name for name, least in found.items()}
    return list((asked | {re.split("[=<>]", each)[0]: each for each in given}).values())


def main(which: str, *given: str) -> int:
    place = ROOT / "build" / f"compat-{which}"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements(which, list(given)), *TOOLS], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
    versions = f"from importlib.metadata import version as v; print(*[f'{{n}} {{v(n)}}' for n in {SHOWN}], sep=', ')"
    subprocess.run([python, "-c", versions], check=True)
    files = [f"tests/test_{name}.py" for name in CORE]
    # Old versions warn of what has changed since.
    words = [python, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-q", "-W", "default", *files]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] not in (["lowest"], ["newest"]):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
