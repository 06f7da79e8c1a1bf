"""A video made by the server against one made offline, with the same settings and with other parallel ones.

    python benchmarks/online_offline.py --image media/coffee.png --json benchmarks/results/online-offline-2core.json

Without --model the demonstration model is built. Each pair is compared frame by frame by `halovae compare`; a frame
whose SSIM is below the gate ends the run with exit code 1. The mp4s lose nothing (--crf 0): a codec that does makes
more of the levels in which frames differ. A row is printed as soon as it is known. The videos and report pages stay in
the folder --out. The default width is more than one of the demonstration VAE's own tiles, so that tiles are blended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import report
from serving import halovae, served

GATE = 0.999
EXACT, TILES = ("--ranks", "2"), ("--ranks", "2", "--vae-mode", "tile")
"""What servers are started with."""


@dataclass(frozen=True)
class Offline:
    """One video made without a server.

    Attributes:
        name: of the row.
        flags: of `halovae image-to-video`.
        online: the flags of the server whose video it is compared with.
    """

    name: str
    flags: tuple[str, ...]
    online: tuple[str, ...]


OFFLINE = (
    Offline("the same: 2 ranks, exact", EXACT, EXACT),
    Offline("1 rank", ("--ranks", "1"), EXACT),
    Offline("2 ranks, frames cut between rows", (*EXACT, "--axis", "height"), EXACT),
    Offline("2 ranks, the sequence spread too", (*EXACT, "--ulysses-degree", "2"), EXACT),
    Offline("1 rank, the VAE's own tiles", ("--ranks", "1", "--vae-mode", "tile"), TILES),
)


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = Path(folder) / "model"
            halovae("make-demo-model", str(model))
        for number, flags in enumerate((EXACT, TILES)):
            online = options.out / f"online{number}.mp4"
            pairs = [OFFLINE[index] for index in options.pairs if OFFLINE[index].online == flags]
            if pairs:
                _make_online(options, model, Path(folder) / f"store{number}", flags, online)
            rows += [_pair(options, model, online, pair) for pair in pairs]
    size = f"{options.width}x{options.height}, {options.frames} frames, {options.steps} steps"
    report(f"online against offline, {size}", rows, options.json)
    return 0 if all(row["passed"] for row in rows) else 1


def _make_online(options: argparse.Namespace, model: Path, store: Path, flags: tuple[str, ...], output: Path) -> None:
    with served(model, store, *flags, "--crf", "0") as (client, _), options.image.open("rb") as image:
        answer = client.post("/v1/videos/sync", data=_fields(options), files={"input_reference": image})
        answer.raise_for_status()
        output.write_bytes(answer.content)


def _pair(options: argparse.Namespace, model: Path, online: Path, pair: Offline) -> dict[str, Any]:
    name = f"{online.stem}-{OFFLINE.index(pair)}"
    offline, numbers = options.out / f"{name}.mp4", options.out / f"{name}.json"
    sizes = [word for key, value in _fields(options).items() for word in (f"--{key.replace('_', '-')}", value)]
    started = time.monotonic()
    files = ["--model", str(model), "--image", str(options.image), "-o", str(offline)]
    halovae("image-to-video", *files, "--crf", "0", *sizes, *pair.flags)
    seconds = time.monotonic() - started
    numbers.unlink(missing_ok=True)
    words = [str(offline), str(online), "--json", str(numbers), "--report", str(options.out / name)]
    # Below the gate it exits with 1: a result, and no reason to leave out the other rows.
    compare = [sys.executable, "-m", "halovae", "compare", *words, "--min-ssim", str(GATE)]
    code = subprocess.run(compare, stdout=subprocess.DEVNULL).returncode
    found = json.loads(numbers.read_text())
    row: dict[str, Any] = {
        "server": " ".join(pair.online),
        "offline": pair.name,
        "worst SSIM": f"{min(frame['ssim'] for frame in found['frames']):.6f}",
        "largest difference": f"{found['largest']:g} of 255",
        "passed": code == 0,
        "offline s": seconds,
    }
    print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return row


def _fields(options: argparse.Namespace) -> dict[str, str]:
    return {
        "prompt": options.prompt,
        "width": str(options.width),
        "height": str(options.height),
        "num_frames": str(options.frames),
        "num_inference_steps": str(options.steps),
        "seed": str(options.seed),
        "fps": "16",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="folder of an image-to-video pipeline; default: the demonstration model"
    )
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", default="a cup of coffee")
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, nargs="+", default=range(len(OFFLINE)), help="which of them to make")
    parser.add_argument("--out", type=Path, default=Path("out/online_offline"))
    parser.add_argument("--json", type=Path, help="write the machine and the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
