"""Several steps in time in one call of the network: the same numbers, on one rank and on shards, or not done at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, run_half
from pictures import error
from ranks import Ranks
from torch import Tensor, nn

import halovae
from halovae.base.errors import InputError
from halovae.base.options import Options
from halovae.calls.merge_steps import sizes
from halovae.calls.record import Recorder

WALKERS = ["wan21", "wan22", "qwenimage", "magvit"]
"""VAEs that take several steps at once."""
OTHERS = ["cogvideox", "vidtok", "hunyuan_video_framewise"]
"""VAEs whose steps differ, or whose norms look at all frames of a call."""


def long_video(name: str, half: str) -> tuple[Any, Tensor]:
    family = FAMILIES[name]
    shape = family.sample_shape if half == "encode" else family.latent_shape
    frames = 25 if half == "encode" else 8
    draw = torch.Generator().manual_seed(3)
    return family.build().double(), torch.randn(
        (*shape[:2], frames, *shape[3:]), generator=draw, dtype=torch.float64).mul_(0.5)  # fmt: skip


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("name", [name for name in WALKERS + OTHERS if name in FAMILIES])
def test_equals_one_step_at_a_time(name: str, half: str) -> None:
    vae, tensor = long_video(name, half)
    expected = run_half(name, vae, half, tensor)
    with halovae.optimize(vae, options=halovae.Options(frames_per_call=3)) as handle:
        found = run_half(name, vae, half, tensor)
        assert handle.last is not None
        assert (max(handle.last.steps, default=1) == 3) == (name in WALKERS)
    assert error(found, expected) <= getattr(FAMILIES[name], f"{half}_tolerance")


def test_in_inference_mode() -> None:
    """Where operators come undecomposed, dropout that is switched off among them."""
    with torch.inference_mode():
        vae, tensor = long_video("wan21", "decode")
        expected = run_half("wan21", vae, "decode", tensor)
        with halovae.optimize(vae, options=halovae.Options(frames_per_call=3)) as handle:
            assert error(run_half("wan21", vae, "decode", tensor), expected) <= 1e-6
            assert handle.last is not None
            assert max(handle.last.steps) == 3


def on_shards(rank: int, name: str, half: str, frames: int, **options: Any) -> tuple[tuple[int, ...], int]:
    """The steps and how many messages this rank has sent. The first one compares the result."""
    vae, tensor = long_video(name, half)
    with halovae.parallelize(vae, **options, options=halovae.Options(frames_per_call=frames)) as handle:
        found = run_half(name, vae, half, tensor)
        assert handle.last is not None
    if rank == 0:
        assert error(found, run_half(name, vae, half, tensor)) <= getattr(FAMILIES[name], f"{half}_tolerance")
    return handle.last.steps, handle.last.messages


def on_halves(rank: int, name: str, half: str) -> tuple[int, tuple[int, ...], int]:
    """First how many messages a call of single steps sends."""
    vae, tensor = long_video(name, half)
    with halovae.parallelize(vae, axis="height", verify=False, options=halovae.Options(frames_per_call=1)) as handle:
        run_half(name, vae, half, tensor)
        assert handle.last is not None
    return handle.last.messages, *on_shards(rank, name, half, 3, axis="height", verify=False)


def with_a_spare(rank: int) -> tuple[tuple[int, ...], int]:
    """Probed before, as calls are that nobody asks otherwise for."""
    return on_shards(rank, "wan21", "decode", 3, axis=(2, 1))


@pytest.mark.parametrize(("name", "half"), [("wan21", "encode"), ("wan22", "decode")])
def test_fewer_messages_on_shards(two_ranks: Ranks, name: str, half: str) -> None:
    (own, steps, fewer), other = two_ranks.run(on_halves, name, half)
    assert other[1] == steps == ((1, 1, 3, 2) if half == "encode" else (1, 1, 3, 3))
    assert fewer < 0.65 * own


def test_spare_ranks_wait(three_ranks: Ranks) -> None:
    found = three_ranks.run(with_a_spare)
    assert [steps for steps, _ in found] == [(1, 1, 3, 3)] * 3


def test_steps_go_together_whatever_follows() -> None:
    vae, tensor = long_video("wan21", "decode")
    calls = Recorder(vae, "decode", vae.decode).record((torch.cat([tensor, tensor, tensor], 2),), {}).calls
    assert len(calls) == 24
    assert sizes(calls, lambda step: 1) == (1,) * 24
    assert sizes(calls, lambda step: 4) == (1, 1, 4, 4, 4, 4, 4, 2)
    assert sizes(calls, lambda step: 100) == (1, 1, 22)
    assert sizes(calls, lambda step: 4, first=6) == (4, 4, 4, 4, 2)
    assert sizes(calls[:3], lambda step: 4) == (1, 1, 1)


class Normed(nn.Module):
    """Its norm looks at all frames of a call, and it hands a cache along."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = _CachedNorm()

    def decode(self, z: Tensor) -> Tensor:
        cache: list[Any] = [None]
        result: Any = None
        for frame in z.split(1, 2):
            step = self.decoder(frame, cache)
            result = step if result is None else torch.cat([result, step], 2)
        return result


class _CachedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(4, 256, (2, 3, 3), padding=(0, 1, 1)), nn.GroupNorm(32, 256)

    def forward(self, frames: Tensor, cache: list[Any]) -> Tensor:
        before = torch.zeros_like(frames[:, :, :1]) if cache[0] is None else cache[0]
        cache[0] = frames[:, :, -1:].clone()
        return self.norm(self.conv(torch.cat([before, frames], 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_over_frames_walks_by_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vae, tensor = Normed().to(dtype), torch.randn(1, 4, 12, 16, 24, dtype=dtype)
    with torch.no_grad(), halovae.optimize(vae, options=halovae.Options(frames_per_call=2)) as handle:
        vae.decode(tensor)
        assert handle.last is not None
        assert not handle.last.steps


def test_settings_that_change_are_heard_of() -> None:
    vae, tensor = long_video("wan21", "decode")
    tensor = torch.cat([tensor, tensor])
    with halovae.optimize(vae, options=halovae.Options(frames_per_call=3)) as handle:
        expected = run_half("wan21", vae, "decode", tensor)
        assert handle.last is not None
        steps = handle.last.steps
        vae.enable_slicing()
        assert error(run_half("wan21", vae, "decode", tensor), expected) <= 1e-6
        assert len(handle.last.steps) > len(steps)


class Impatient(nn.Module):
    """Looks at each result before it makes the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1))

    def decode(self, z: Tensor) -> Tensor:
        results: list[Tensor] = []
        for frame in z.split(1, 2):
            results.append(self.decoder(frame) + 1)
        return torch.cat(results, 2)


def test_a_vae_that_reads_each_result_walks_by_itself() -> None:
    vae, tensor = Impatient().double(), torch.randn(1, 3, 12, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = vae.decode(tensor)
        with halovae.optimize(vae, options=halovae.Options(frames_per_call=4)) as handle:
            assert error(vae.decode(tensor), expected) <= 1e-12
            assert handle.last is not None
            assert not handle.last.steps


def test_on_a_cpu_a_vae_walks_as_it_is() -> None:
    vae, tensor = long_video("wan21", "decode")
    with halovae.optimize(vae) as handle:
        run_half("wan21", vae, "decode", tensor)
        assert handle.last is not None
        assert not handle.last.steps


@pytest.mark.parametrize("frames", [0, -1, 1.5, "many", True])
def test_a_wrong_number_is_refused(frames: Any) -> None:
    with pytest.raises(InputError, match=r"frames_per_call is .*at least 1, or 'auto'"):
        Options(frames_per_call=frames)
