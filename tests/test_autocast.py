"""Calls within torch.autocast: the dtype of the un-parallel call, and no farther from the truth than that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, run_half
from ranks import Ranks
from shards import draw
from tiles import CUTS, run_alone

import halovae
from halovae.base.errors import DisagreementError
from halovae.calls.verify import distance
from halovae.kernels import autocast
from halovae.kernels.fast_mode import FastMode
from halovae.kernels.shapes_only import standing_in

LOW = torch.bfloat16


def check(name: str, half: str, dtype: torch.dtype, **options: Any) -> None:
    family = FAMILIES[name]
    vae, tensor = family.build(), family.sample() if half == "encode" else family.latent()
    truth = run_half(name, vae, half, tensor)
    with torch.autocast("cpu", dtype=dtype):
        expected = run_half(name, vae, half, tensor)
    with halovae.parallelize(vae, **options) if options else halovae.optimize(vae) as handle:
        with torch.autocast("cpu", dtype=dtype):
            found = run_half(name, vae, half, tensor)
        assert handle.last is not None
        assert distance(run_half(name, vae, half, tensor), truth) < 1e-5, "and then without it"
    assert found.dtype == expected.dtype
    assert distance(found, truth) <= 1.2 * distance(expected, truth), (name, half)


@pytest.mark.parametrize(
    ("name", "half", "dtype"),
    [
        ("kl", "encode", torch.float16),
        ("wan21", "decode", LOW),
        ("mochi", "encode", LOW),
        ("dc", "encode", LOW),
        ("consistency", "decode", LOW),
    ],
)
def test_one_rank(name: str, half: str, dtype: torch.dtype) -> None:
    check(name, half, dtype)


def on_shards_and_in_tiles(rank: int) -> None:
    for name, half in (("kl", "decode"), ("kl", "encode"), ("wan21", "encode"), ("hunyuan_video", "decode")):
        check(name, half, LOW, axis="height" if half == "decode" else "width")
    with halovae.parallelize(vae := FAMILIES["kl"].build(), mode="auto"), torch.autocast("cpu", dtype=LOW):
        assert run_half("kl", vae, "decode", FAMILIES["kl"].latent()).dtype == LOW
    for name in ("kl", "ltx"):
        cut = CUTS[name]
        for half in ("encode", "decode"):
            vae, picture = cut.build(), cut.picture(half)
            with torch.autocast("cpu", dtype=LOW):
                expected = run_alone(cut, vae, half, picture)
                with halovae.parallelize(vae, mode="tile") as handle:
                    assert torch.equal(run_alone(cut, vae, half, picture), expected)
            assert handle.last is not None
            assert handle.last.tiles > 1
    vae = FAMILIES["kl"].build()
    with (
        halovae.parallelize(vae),
        torch.autocast("cpu", dtype=LOW, enabled=rank == 0),
        pytest.raises(DisagreementError, match=r"ranks disagree on autocast: rank 0 has \{'cpu': torch.bfloat16\}"),
    ):
        run_half("kl", vae, "decode", FAMILIES["kl"].latent())


def test_two_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(on_shards_and_in_tiles)


FUNCTIONS: dict[str, Any] = {
    "convolution": lambda x, w: F.conv2d(x, w, padding=1),
    "convolution in low precision": lambda x, w: F.conv2d(x.to(LOW), w, w[:, 0, 0, 0]),
    "convolution in double precision": lambda x, w: F.conv2d(x.double(), w.to(x.device, torch.float64)),
    "upsampled": lambda x, w: F.conv2d(F.interpolate(x, scale_factor=2.0), w, padding=1),
    "normalized": lambda x, w: F.normalize(x.to(LOW), dim=1) * 2,
    "product": lambda x, w: torch.matmul(x, x.to(torch.float16).transpose(-1, -2)),
    "sum": lambda x, w: x + x.to(LOW),
    "to a wide dtype": lambda x, w: x.to(LOW).prod(1),
    "in place": lambda x, w: x.clone().mul_(x.to(LOW)),
    "joined": lambda x, w: torch.cat([x, x.to(LOW)]),
    "off inside": lambda x, w: _off(x, w),
    "on inside": lambda x, w: _on(x, w),
}


def _off(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x, w)


def _on(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        return F.conv2d(x, w)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("cast", [True, False])
def test_each_function_gives_the_dtype_that_torch_gives(function: str, cast: bool) -> None:
    x, weight = draw(2, 5, 8, 8, dtype=torch.float32), torch.nn.Parameter(draw(5, 5, 3, 3, dtype=torch.float32))
    with torch.no_grad(), torch.autocast("cpu", dtype=LOW, enabled=cast):
        try:
            expected = FUNCTIONS[function](x, weight)
        except RuntimeError:  # Of dtypes that don't go together without autocast.
            assert not cast
            return
        with FastMode():
            found = FUNCTIONS[function](x, weight)
        assert torch.is_autocast_enabled("cpu") == cast
        assert found.dtype == expected.dtype
        assert distance(found, expected) < 1e-2
        with autocast.Autocast(), standing_in(x.device):
            assert FUNCTIONS[function](x.to("meta"), weight).dtype == expected.dtype
