"""What a call pays to be in step with the other ranks: one small exchange over the link, and over torch.distributed.

python benchmarks/agreement.py --ranks 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch.distributed as dist
from harness import machine, run_ranks

from halovae import comm

SMALL = {"call": "decode number 1", "arguments": "(1, 4, 5, 7) torch.float32 on cpu"}


def measure(rank: int, repeats: int) -> dict[str, float]:
    """Median seconds of one exchange, each way."""
    link, values = comm.connect(), [None] * dist.get_world_size()

    def collective() -> Any:
        dist.all_gather_object(values, SMALL)

    ways = {"link": lambda: link.all_gather_object(SMALL), "torch.distributed": collective}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=500)
    options = parser.parse_args()
    found = run_ranks(options.ranks, measure, options.repeats)
    print(machine())
    for name in found[0]:
        print(f"{name}: {1e3 * max(each[name] for each in found):.2f} ms, median of {options.repeats}, slowest rank")


if __name__ == "__main__":
    main()
