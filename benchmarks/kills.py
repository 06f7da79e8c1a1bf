"""A dataset that is encoded while its processes are killed: every item has to come out once, and right.

    python benchmarks/kills.py --json benchmarks/results/kills-2core.json

`halovae encode-dataset` runs on `--devices` processes of this CPU, undisturbed at first, and then into another folder
while this program kills processes of it at random moments: the command itself, which is started again, those that
read, those that encode, and ranks of groups. The files have to be the same bytes, none of them written twice, and the
counts have to add up. It takes minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness import report

from halovae import media
from halovae.datasets.buckets import Bucket
from halovae.datasets.forecast import needs
from halovae.datasets.formats import Storage
from halovae.datasets.units import Job
from halovae.media import models

SOURCE = Path(__file__).parents[1] / "media" / "bigbuckbunny.mp4"
SMALL, LARGE = Bucket(64, 96, 17), Bucket(128, 192, 17)
"""Encoded on one device each, and on two as shards."""
KINDS = {"command": 3, "Encoder": 7, "read_unit": 6, "_Rank": 4}
"""Of processes, and how many of 20 are killed."""
STUCK = 300.0
"""Seconds without a finished item after which the run is given up."""


def make_items(folder: Path, small: int, large: int) -> None:
    frames = media.read(SOURCE, height=LARGE.height, width=LARGE.width).frames
    folder.mkdir()
    for number in range(small + large):
        chosen = frames[np.arange(3 * number, 3 * number + 17) % len(frames)]
        step = 2 if number < small else 1
        media.write(folder / f"{number:04}.mp4", np.ascontiguousarray(chosen[:, ::step, ::step]), Fraction(25))
    for number in range(2):
        (folder / f"broken-{number}.mp4").write_bytes(b"no clip")


def room() -> float:
    """GiB that the small clips fit into, and the large ones don't."""
    source = models.find(None)
    layout = Storage(
        folder="", format="safetensors", store="mode", dtype="float32", model=source.model,
        model_class=source.class_name, scaling={},
    )  # fmt: skip
    job = Job(layout=layout, device="cpu", dtype="float32", fps=None, threads=1)
    small, large = (need.bytes for need in needs(job, [SMALL, LARGE], 1, None, timed=False))
    return (small + large) / 2 / 2**30


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each is, and when it was written."""
    found: dict[str, tuple[int, int]] = {}
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith("."):
            state = path.stat()
            found[path.relative_to(folder).as_posix()] = state.st_ino, state.st_mtime_ns
    return found


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "halovae", *words])


def at_work(command: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """Processes of the command that do this work now."""
    if kind == "command":
        return [psutil.Process(command.pid)]
    found: list[psutil.Process] = []
    for process in psutil.Process(command.pid).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if name.startswith("ray::") and kind in name and "IDLE" not in name:
            found.append(process)
    return found


def disturbed(words: list[str], output: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Run the command until it ends well, and kill processes of it meanwhile."""
    left = Counter({kind: round(count * kills / 20) for kind, count in KINDS.items()})
    killed, first, again = Counter[str](), dict[str, tuple[int, int]](), set[str]()
    command, before, moved = start(words), 0, time.monotonic()
    while command.poll() is None:
        time.sleep(chance.uniform(0.05, 1.0))
        now = files(output)
        again |= {name for name in first if now.get(name) != first[name]}
        first = now | first
        if len(now) <= before and time.monotonic() - moved < STUCK:
            continue  # One more item at least between two of them.
        if len(now) <= before:
            command.kill()
            raise SystemExit(f"nothing was finished for {STUCK:.0f} s")
        kinds = [kind for kind in left if left[kind] and command.poll() is None and at_work(command, kind)]
        if not kinds:
            before, moved = len(now) - 1, time.monotonic()
            continue
        kind = chance.choices(kinds, [left[kind] for kind in kinds])[0]
        for process in at_work(command, kind)[:1]:
            process.kill()
            left[kind] -= 1
            killed[kind] += 1
            print(f"{len(now)} items finished, killed: {kind}", flush=True)
        before, moved = len(now), time.monotonic()
        if kind == "command":
            command.wait()
            command = start(words)
    again |= {name for name, state in files(output).items() if first.get(name, state) != state}
    return {"killed": killed, "again": sorted(again), "code": command.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--small", type=int, default=320)
    parser.add_argument("--large", type=int, default=16)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_items(folder / "clips", given.small, given.large)
        words = ["encode-dataset", str(folder / "clips"), "--devices", str(given.devices), "--memory", str(room())]
        words += ["--bucket", str(SMALL), "--bucket", str(LARGE), "--json", str(folder / "told.json")]
        quiet, killed = folder / "quiet", folder / "killed"
        assert start([*words, "-o", str(quiet)]).wait() == 0
        groups = json.loads((folder / "told.json").read_text())["counts"]["groups"]
        assert groups == {str(SMALL): 1, str(LARGE): 2}, groups
        began = time.monotonic()
        found = disturbed([*words, "-o", str(killed)], killed, given.kills, random.Random(given.seed))
        seconds = time.monotonic() - began
        expected = {name: (quiet / name).read_bytes() for name in files(quiet)}
        got = {name: (killed / name).read_bytes() for name in files(killed)}
        counts = json.loads((killed / "manifest.json").read_text())["counts"]
        aside = [json.loads(line)["key"] for line in (killed / "failed.jsonl").read_text().splitlines()]
        row = {
            "items": given.small + given.large + 2, "finished": len(got), "set aside": len(aside),
            "kills": found["killed"].total(), **{f"of {kind}": found["killed"][kind] for kind in KINDS},
            "missing": len(expected.keys() - got.keys()), "other bytes": sum(got[n] != expected.get(n) for n in got),
            "written twice": len(found["again"]), "half written": len(list(killed.rglob(".*.part*"))),
            "seconds": seconds,
        }  # fmt: skip
    report(f"encode-dataset on {given.devices} devices while its processes are killed", [row], given.json)
    adds_up = counts["encoded"] + counts["there"] + counts["failed"] == counts["items"] == row["items"]
    wrong = [row[name] for name in ("missing", "other bytes", "written twice", "half written")]
    right = adds_up and not any(wrong) and len(aside) == 2 and row["kills"] >= given.kills and not found["code"]
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
