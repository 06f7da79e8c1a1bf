"""Random faults in random calls: after each, the right result or the right error, on every rank, in time.

    python tests/chaos.py --minutes 3

Real processes in a gloo world; the seed is printed, and `--seed` repeats a run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import chaos_rank
from chaos_rank import EXACT, PATIENCE, TILE, Outcome, Spec
from ranks import NO_ANSWER, Ranks

SOON = 10.0
"""Seconds within which all ranks know of a failure."""
HANG = 120.0
"""Seconds in which the ranks do nothing, all together less than `WORK` seconds of processor time, and say nothing."""
WORK = 1.0
LOOP = 300.0
"""Seconds of processor time after which ranks that still compute never end."""
FAULTS = {
    "none": 2, "raise": 6, "memory": 3, "kill": 3, "exit": 1, "stop": 1, "slow": 1, "shape": 2, "dtype": 1, "value": 2
}  # fmt: skip
"""How often each is drawn."""
RUNS_PER_GROUP = 12
ENDS = ("kill", "exit")
DISAGREE = ("shape", "dtype", "value")


@dataclass
class Tally:
    """What has been seen so far."""

    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """By kind, those that really happened."""
    problems: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    """Seconds from a failure until the last rank knew; for a stopped rank, beyond its patience."""

    def text(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items()))
        wrong = ", ".join(
            f"{name} {self.problems[name]}" for name in ("hangs", "wrong results", "wrong errors", "leaks")
        )
        return f"{self.runs} runs, {self.faults.total()} faults ({kinds}); {wrong}; slowest news {self.slowest:.2f} s"


def draw(chance: random.Random, ranks: int) -> Spec:
    mode = chance.choice(("exact", "exact", "tile"))
    half = chance.choice(("encode", "decode"))
    axis = chance.choice(("auto", "height", "width"))
    return Spec(
        family=chance.choice(TILE if mode == "tile" else EXACT), mode=mode, half=half,
        rows=chance.randint(4, 7), cols=chance.randint(4, 7), axis=axis,
        size=chance.choice((None, None, chance.randint(1, ranks))),
        gather=chance.choice(("all", "all", "first") if mode == "tile" else ("all", "all", "first", "shard")),
        verify=chance.random() < 0.3, warm=chance.random() < 0.6,
        fault=chance.choices(list(FAULTS), list(FAULTS.values()))[0],
        victim=chance.randrange(ranks), place=chance.choice(("module", "exchange")),
        moment=chance.choice((1, 2, 5, 10, 20, 40)),
    )  # fmt: skip


def judge(spec: Spec, answers: list[tuple[bool, Outcome | str]], tally: Tally) -> list[str]:
    """Everything that is not as promised."""
    live = {rank: said for rank, (_, said) in enumerate(answers) if isinstance(said, Outcome)}
    lost = {rank: said for rank, (_, said) in enumerate(answers) if not isinstance(said, Outcome)}
    if NO_ANSWER in lost.values():
        return ["hangs"]
    victim = live.get(spec.victim)
    happened = victim is None or victim.fired_at is not None or spec.fault in DISAGREE
    if len(answers) == 1 and spec.fault in DISAGREE:
        return []  # Nobody to disagree with.
    if lost.keys() - ({spec.victim} if spec.fault in ENDS else set()):
        return ["wrong errors"]
    if happened and spec.fault != "none":
        tally.faults[spec.fault] += 1
    problems = ["leaks" for said in live.values() if said.leaks]
    firsts = {said.first for said in live.values()}
    problems += ["wrong results" for said in live.values() if "wrong" in said.first + said.second]
    # What a VAE can be asked is found out by trying: a failure there is an answer and no error.
    fails = happened and spec.fault not in ("none", "slow") and (spec.fault in ENDS or firsts != {"right"})
    if not fails:
        problems += ["wrong errors"] * (firsts != {"right"} or (spec.fault in DISAGREE and happened))
    elif spec.fault not in DISAGREE:
        problems += _reaction(spec, live, tally)
    elif firsts != {"DisagreementError"}:
        problems.append("wrong errors")
    after = {said.second for said in live.values()}
    if after != ({"RankFailedError"} if spec.fault in ENDS and fails and live else {"right"}) and live:
        problems.append("wrong errors")
    return problems


def _reaction(spec: Spec, live: dict[int, Outcome], tally: Tally) -> list[str]:
    """The others blame the victim, in time; a victim that can speak has its own error."""
    problems: list[str] = []
    for rank, said in live.items():
        if rank == spec.victim and spec.fault in ("raise", "memory"):
            problems += ["wrong errors"] * (not said.cause)
        elif (said.first, said.blamed) != ("RankFailedError", spec.victim):
            problems.append("wrong errors")
    victim = live.get(spec.victim)
    others = [said.ended_at for rank, said in live.items() if rank != spec.victim]
    if victim and victim.fired_at and others:
        seconds = max(others) - victim.fired_at - (PATIENCE if spec.fault == "stop" else 0)
        tally.slowest = max(tally.slowest, seconds)
        problems += ["wrong errors"] * (seconds > SOON)
    return problems


def collect(ranks: Ranks) -> list[tuple[bool, Outcome | str]]:
    """What every rank says. On a busy machine ranks are waited for as long as they compute: those that hang rest.

    Those that hang print where they are.
    """
    started = used = ranks.processor_seconds()
    deadline = time.monotonic() + HANG
    while not all(ranks.says(rank) for rank in range(ranks.size)):
        time.sleep(0.05)
        now = ranks.processor_seconds()
        if abs(now - used) > WORK:  # Less when a rank has ended.
            used, deadline = now, time.monotonic() + HANG
        if time.monotonic() > deadline or used > started + LOOP:
            for rank in range(ranks.size):
                if not ranks.says(rank):
                    os.kill(ranks.pid(rank), signal.SIGUSR1)
            break
    return [ranks.answer(rank, 0.0) for rank in range(ranks.size)]


def run_group(chance: random.Random, tally: Tally, deadline: float) -> None:
    """Some runs on the same processes, until one of them ends, as it must after a kill."""
    size = chance.choice((1, 2, 2, 3, 3, 4))
    ranks = Ranks(size, preload="chaos_rank")
    try:
        for _ in range(RUNS_PER_GROUP):
            if time.monotonic() > deadline:
                return
            spec = draw(chance, size)
            ranks.begin(chaos_rank.run, spec)
            answers = collect(ranks)
            tally.runs += 1
            problems = judge(spec, answers, tally)
            tally.problems.update(set(problems))
            if problems:
                print(f"{sorted(set(problems))} on {size} ranks\n  {spec}", *answers, sep="\n  ", flush=True)
            if not all(ok for ok, _ in answers):
                return
    finally:
        ranks.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    chance, tally = random.Random(seed), Tally()
    deadline = time.monotonic() + 60 * options.minutes
    while time.monotonic() < deadline:
        run_group(chance, tally, deadline)
        print(tally.text(), flush=True)
    return 1 if tally.problems.total() else 0


if __name__ == "__main__":
    sys.exit(main())
