"""A video made by the server against one made offline, with the same settings and with other parallel ones.

    python benchmarks/online_offline.py --image media/picture.png --out out/online_offline

Without --model the demonstration model is built. Each pair is compared frame by frame by `halovae compare`; a frame
whose SSIM is below the gate ends the run with exit code 1. The mp4s lose nothing (--crf 0): a codec that does makes
more of the levels in which frames differ. The videos, numbers and report pages stay in the folder --out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from serving import halovae, served

GATE = 0.999
OFFLINE = {
    "the same: 2 ranks, exact": ["--ranks", "2"],
    "1 rank, exact": ["--ranks", "1"],
    "2 ranks, the VAE's own tiles": ["--ranks", "2", "--vae-mode", "tile"],
    "2 ranks, the sequence spread too": ["--ranks", "2", "--ulysses-degree", "2"],
}


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = Path(folder) / "model"
            halovae("make-demo-model", str(model))
        online = options.out / "online.mp4"
        with served(model, Path(folder) / "store", "--ranks", "2", "--crf", "0") as (client, _):
            answer = client.post(
                "/v1/videos/sync", data=_fields(options), files={"input_reference": options.image.open("rb")}
            )
            answer.raise_for_status()
            online.write_bytes(answer.content)
        results = [_pair(options, model, number, name) for number, name in enumerate(OFFLINE)]
    (options.out / "numbers.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'offline':<34}{'worst SSIM':>12}{'largest':>9}")
    for result in results:
        print(f"{result['name']:<34}{result['ssim']:>12.6f}{result['largest']:>9.0f}")
    return 0 if all(result["passed"] for result in results) else 1


def _pair(options: argparse.Namespace, model: Path, number: int, name: str) -> dict[str, object]:
    online, offline, numbers = (
        options.out / n for n in ("online.mp4", f"offline{number}.mp4", f"compare{number}.json")
    )
    sizes = [word for key, value in _fields(options).items() for word in (f"--{key.replace('_', '-')}", value)]
    halovae(
        "image-to-video",
        "--model",
        str(model),
        "--image",
        str(options.image),
        "-o",
        str(offline),
        "--crf",
        "0",
        *sizes,
        *OFFLINE[name],
    )
    page = ["--report", str(options.out / f"report{number}")] if _has_reports() else []
    words = ["compare", str(offline), str(online), "--min-ssim", str(GATE), "--json", str(numbers), *page]
    code = subprocess.run([sys.executable, "-m", "halovae", *words]).returncode
    found = json.loads(numbers.read_text())
    worst = min(frame["ssim"] for frame in found["frames"])
    return {"name": name, "ssim": worst, "largest": found["largest"], "passed": code == 0}


def _has_reports() -> bool:
    said = subprocess.run([sys.executable, "-m", "halovae", "compare", "--help"], capture_output=True, text=True).stdout
    return "--report" in said


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
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/online_offline"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
