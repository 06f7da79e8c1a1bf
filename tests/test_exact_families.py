"""Every family, encode and decode: the sharded result is the un-parallel one in float64.

With gloo between processes on one cut, and on all kinds of cuts where networks differ in what they ask of it; else a
grid on threads. The probe goes the same way.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from typing import Any

import pytest
import torch
from families import FAMILIES, plain, run_half_in_float64
from pictures import error
from ranks import Ranks
from threads import ThreadComm, run_threads

import halovae
from halovae.base.errors import NotExactError, VerificationError
from halovae.calls.target import Target
from halovae.calls.verify import make_probe, run_alone, verify
from halovae.exact.mesh import Mesh, plan_shards
from halovae.exact.run import GroupRun

CUTS: list[tuple[Any, int]] = [("height", 2), ("width", 3), ((2, 2), 4)]
"""Axis and ranks at work; the others of the four wait and share the result."""

KINDS = ["kl", "dc_sana", "consistency", "wan21", "hunyuan_video", "ltx091"]
"""Norms over the picture and attention; sums over it instead; a generator; caches in time; masks; the global generator,
which threads share."""

HALVES = {name: [half for half in ("encode", "decode") if getattr(family, half)] for name, family in FAMILIES.items()}
EXACT = [(name, half) for name in HALVES for half in HALVES[name] if getattr(FAMILIES[name], f"exact_{half}")]


Outcome = tuple[str, tuple[Any, int], float, str, tuple[int, int]]
"""Half and cut, largest error relative to the largest value (on the first rank), a hash of the result, the grid."""


def run_cuts(rank: int, name: str, cuts: list[tuple[Any, int]]) -> list[Outcome]:
    """Both halves on each cut."""
    family, outcomes = FAMILIES[name], list[Outcome]()
    vae = family.build().to(torch.float64)
    vae.use_tiling = True  # exact mode has to bypass it
    for axis, size in cuts:
        # The probe is for one cut: it triples the work, and other tests show that it finds mistakes.
        probed = name in KINDS and axis == "height"
        with halovae.parallelize(vae, untiled=True, axis=axis, size=size, verify=probed) as handle:
            for half in HALVES[name]:
                if not getattr(family, f"exact_{half}"):
                    with pytest.raises(NotExactError):
                        run_half_in_float64(name, vae, half)
                    continue
                result = run_half_in_float64(name, vae, half)
                assert handle.last is not None
                far = 0.0 if rank else error(result, plain(name, half))
                outcomes.append((half, (axis, size), far, _hash(result), handle.last.shape))
    return outcomes


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_un_parallel_result(two_ranks: Ranks, four_ranks: Ranks, name: str) -> None:
    per_rank = (four_ranks.run if name in KINDS else two_ranks.run)(run_cuts, name, CUTS if name in KINDS else CUTS[:1])
    assert len(per_rank[0]) == sum(each == name for each, _ in EXACT) * (len(CUTS) if name in KINDS else 1)
    for outcomes in zip(*per_rank, strict=True):
        half, cut, far, first_hash, shape = outcomes[0]
        assert shape[0] * shape[1] >= 2, f"{half} was not cut on {cut}"
        assert far <= getattr(FAMILIES[name], f"{half}_tolerance"), (half, cut)
        assert all(outcome[3] == first_hash for outcome in outcomes), f"ranks hold different results on {half}, {cut}"


@pytest.mark.parametrize(("name", "half"), [pair for pair in EXACT if pair[0] not in KINDS])
def test_on_a_grid_and_by_the_probe(name: str, half: str) -> None:
    family = FAMILIES[name]
    vae = family.build().to(torch.float64)
    vae.use_tiling = False
    *_, height, width = family.sample_shape if half == "encode" else family.latent_shape
    ratio = family.ratio[0] if half == "encode" else 1
    plan = plan_shards(height, width, ratio, 4, (2, 2))

    def on_thread(comm: ThreadComm) -> torch.Tensor:
        own = copy.deepcopy(vae)
        call = functools.partial(Target(own).run_untiled, half)

        def on_shards(*args: Any, **kwargs: Any) -> Any:
            run = GroupRun(comm, plan, args, kwargs, "all")
            run.run(call)
            return run.gather()

        setattr(own, half, on_shards)
        return run_half_in_float64(name, own, half)

    first, *others = run_threads(4, on_thread)
    assert error(first, plain(name, half)) <= getattr(family, f"{half}_tolerance")
    assert all(torch.equal(first, other) for other in others), "ranks hold different results"

    picture = family.sample(torch.float64) if half == "encode" else family.latent(torch.float64)
    kwargs = family.decode_kwargs(picture) if half == "decode" else {}
    probe = make_probe((2, 1), ratio, (picture,), kwargs)
    alone = run_alone(Target(vae), half, probe, (picture,), kwargs)

    def probed(comm: ThreadComm) -> VerificationError | None:
        return verify(Mesh(comm, (2, 1)), Target(copy.deepcopy(vae)), half, probe, alone)

    assert run_threads(2, probed) == [None, None]
