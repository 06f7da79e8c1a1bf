"""Sliding windows on shards: `gather(op(scatter(x))) == op(x)`, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shards import check, draw, on_shards, picture_bounds
from threads import run_threads
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.exact.mesh import Mesh
from halovae.exact.run import Bounds, scatter
from halovae.exact.shard_mode import ShardMode

few = settings(max_examples=12, deadline=None)

CONVOLUTIONS = {2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


def picture(bounds: Bounds, n: int = 2, channels: int = 4, batch: int = 2) -> Tensor:
    frames = [5] if n == 3 else []
    return draw(batch, channels, *frames, bounds[0][-1], bounds[1][-1])


def run_or_refuse(function: Any, inputs: tuple[Tensor, ...], bounds: Bounds) -> None:
    """Check, where torch takes the sizes and no shard of the result gets thinner than two rows."""
    try:
        function(*inputs)
    except RuntimeError:
        assume(False)
    try:
        check(function, inputs, bounds)
    except NotExactError as error:
        assert "fewer than 2 rows" in str(error)  # noqa: PT017  (either outcome is right, depending on the sizes)


window_sizes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@few
@given(
    picture_bounds(least=3), window_sizes, st.integers(1, 3), st.integers(0, 2), st.integers(1, 2),
    st.sampled_from([1, 2]), st.sampled_from([2, 3]),
)  # fmt: skip
def test_convolution(
    bounds: Bounds, kernel: tuple[int, int], stride: int, padding: int, dilation: int, groups: int, n: int
) -> None:
    sizes = (3,) * (n - 2) + kernel
    weight, bias = draw(6, 4 // groups, *sizes, seed=1), draw(6, seed=2)
    run_or_refuse(
        lambda x: CONVOLUTIONS[n](x, weight, bias, stride, padding, dilation, groups), (picture(bounds, n),), bounds
    )


@few
@given(
    picture_bounds(), window_sizes, st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.integers(0, 1),
    st.sampled_from([2, 3]),
)  # fmt: skip
def test_transposed_convolution(
    bounds: Bounds, kernel: tuple[int, int], stride: int, padding: int, dilation: int, extra: int, n: int
) -> None:
    extra = min(extra, stride - 1)
    weight, bias = draw(4, 3, *((2,) * (n - 2) + kernel), seed=1), draw(6, seed=2)
    run_or_refuse(
        lambda x: TRANSPOSED[n](x, weight, bias, stride, padding, extra, 2, dilation), (picture(bounds, n),), bounds
    )


@few
@given(picture_bounds(least=3), window_sizes, st.integers(1, 3), st.booleans(), st.booleans(), st.booleans())
def test_pools(bounds: Bounds, kernel: tuple[int, int], stride: int, ceil: bool, padded: bool, largest: bool) -> None:
    padding = min(kernel) // 2 if padded else 0
    if largest:
        run_or_refuse(lambda x: F.max_pool2d(x, kernel, stride, padding, 1, ceil), (picture(bounds),), bounds)
    else:
        ceil = ceil and not padding
        run_or_refuse(lambda x: F.avg_pool2d(x, kernel, stride, padding, ceil), (picture(bounds),), bounds)


@few
@given(
    picture_bounds(least=4), st.tuples(*[st.integers(0, 3)] * 4), st.sampled_from(["constant", "replicate", "reflect"])
)
def test_pad(bounds: Bounds, amounts: tuple[int, ...], mode: str) -> None:
    weight = draw(4, 4, 3, 3, seed=1)
    check(lambda x: F.pad(x, amounts, mode=mode), (picture(bounds),), bounds)
    check(lambda x: F.conv2d(F.pad(x, amounts, mode=mode), weight), (picture(bounds),), bounds)
    check(lambda x: F.pad(x, amounts, mode=mode).mean((2, 3)), (picture(bounds),), bounds)


GRID: Bounds = ((0, 4, 12), (0, 6, 10, 18))


def module(kind: type[torch.nn.Module], *args: Any, **kwargs: Any) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args, **kwargs).double().eval()


CALLS: dict[str, Any] = {
    "conv, padding same": lambda x: F.conv2d(x, draw(4, 4, 3, 5, seed=1), padding="same"),
    "conv, padding same, dilated": lambda x: F.conv2d(x, draw(4, 4, 3, 3, seed=1), padding="same", dilation=2),
    "conv, padding valid": lambda x: F.conv2d(x, draw(4, 4, 3, 3, seed=1), padding="valid"),
    "conv by keywords": lambda x: F.conv2d(input=x, weight=draw(4, 4, 3, 3, seed=1), bias=None, padding=(1, 0)),
    "conv, depthwise": lambda x: F.conv2d(x, draw(4, 1, 3, 3, seed=1), padding=1, groups=4),
    "conv, kernel below stride": lambda x: F.conv2d(x, draw(4, 4, 1, 1, seed=1), stride=2),
    "conv, even kernel": lambda x: F.conv2d(x, draw(4, 4, 4, 2, seed=1), stride=2, padding=(1, 0)),
    "conv, circular-free module": module(torch.nn.Conv2d, 4, 4, 3, padding=1, padding_mode="replicate"),
    "conv, reflect module": module(torch.nn.Conv2d, 4, 4, 3, padding=1, padding_mode="reflect"),
    "two convs": lambda x: F.conv2d(F.conv2d(x, draw(4, 4, 3, 3), padding=1), draw(4, 4, 3, 3), stride=2, padding=1),
    "conv over frames as batch": lambda x: F.conv2d(x.flatten(0, 0), draw(4, 4, 3, 3), padding=1),
    "conv1d over one row as sequence": lambda x: F.conv1d(
        x.permute(0, 3, 1, 2).reshape(2 * x.shape[3], 4, x.shape[2]), draw(4, 4, 3), padding=1
    ),
    "conv1d over one pixel as batch": lambda x: F.conv1d(
        x.permute(0, 2, 3, 1).reshape(2 * x.shape[2] * x.shape[3], 1, 4), draw(2, 1, 3), padding=1
    ),
    "asymmetric pad": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), draw(4, 4, 3, 3, seed=1), stride=2),
    "pad with a value": lambda x: F.pad(x, (1, 2, 3, 0), value=-2.5),
    "pad, then pointwise, then conv": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=1).exp(), draw(4, 4, 3, 3)),
    "pad twice": lambda x: F.pad(F.pad(x, (1, 0, 0, 1)), (1, 1, 2, 2), mode="replicate"),
    "pad of channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad of channels and rows": lambda x: F.pad(x, (0, 0, 1, 1, 1, 2), value=3.0),
    "crop of channels": lambda x: F.pad(x, (0, 0, 0, 0, -1, -1)),
    "ZeroPad2d": torch.nn.ZeroPad2d((0, 1, 0, 1)),
    "pad of nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "pad, then sum": lambda x: F.pad(x, (1, 1, 1, 1), value=1).sum((2, 3)),
    "pad, then group norm": lambda x: F.group_norm(F.pad(x, (1, 1, 1, 1), value=1), 2),
    "pad, then flatten and matmul": lambda x: (lambda y: y @ y.transpose(-1, -2))(
        F.pad(x, (0, 0, 1, 1), value=1).transpose(1, 2)
    ),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "average pool, overlapping, padded": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "average pool of whole columns": lambda x: F.avg_pool2d(x, (1, 3), (1, 2)),
    "average pool module": torch.nn.AvgPool2d(2, ceil_mode=True),
    "average pool, divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "max pool, overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool module": torch.nn.MaxPool2d(3, 1, 1, dilation=1),
    "nearest up": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "nearest-exact up": lambda x: F.interpolate(x, scale_factor=(2.0, 3.0), mode="nearest-exact"),
    "nearest up to a size": lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3])),
    "nearest up to a fixed size": lambda x: F.interpolate(x, size=(24, 36)),
    "nearest down": lambda x: F.interpolate(x, scale_factor=0.5),
    "nearest down to a size": lambda x: F.interpolate(x, size=(x.shape[2] // 2, x.shape[3])),
    "bilinear up": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "bilinear up by size": lambda x: F.interpolate(x, size=(x.shape[2] * 3, x.shape[3] * 2), mode="bilinear"),
    "bilinear along rows only": lambda x: F.interpolate(x, scale_factor=(2, 1), mode="bilinear"),
    "linear along rows": lambda x: F.interpolate(x.permute(0, 3, 1, 2).flatten(0, 1), scale_factor=2, mode="linear"),
    "upsample module": torch.nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
    "halo meets no halo": lambda x: F.pad(x, (1, 1, 1, 1)) + F.conv2d(x, draw(4, 4, 1, 1), padding=1),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_calls(call: Any) -> None:
    check(call, (picture(GRID),), GRID)


VIDEO_CALLS: dict[str, Any] = {
    "causal conv": lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), draw(4, 4, 3, 3, 3, seed=1)),
    "causal conv, replicate": lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), draw(4, 4, 3, 3, 3)),
    "causal conv, reflect in space": lambda x: F.conv3d(F.pad(x, (1,) * 6, mode="reflect"), draw(4, 4, 3, 3, 3)),
    "temporal conv": lambda x: F.conv3d(x, draw(4, 4, 3, 1, 1, seed=1), padding=(1, 0, 0), stride=(2, 1, 1)),
    "spatial conv": lambda x: F.conv3d(x, draw(4, 4, 1, 3, 3, seed=1), padding=(0, 1, 1), stride=(1, 2, 2)),
    "cache, then conv": lambda x: F.conv3d(
        torch.cat([x[:, :, -2:], x], dim=2), draw(4, 4, 3, 3, 3, seed=1), padding=(0, 1, 1)
    ),
    "zeros as cache": lambda x: F.conv3d(
        torch.cat([x.new_zeros(1, 4, 2, *x.shape[-2:]), x], dim=2), draw(4, 4, 3, 3, 3), padding=(0, 1, 1)
    ),
    "zeros_like as cache": lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2),
    "average pool in time": lambda x: F.avg_pool3d(x, (3, 1, 1), (2, 1, 1)),
    "average pool in space": lambda x: F.avg_pool3d(x, (1, 2, 2), (1, 2, 2)),
    "trilinear": lambda x: F.interpolate(x, scale_factor=(2, 2, 2), mode="trilinear", align_corners=False),
    "nearest in space": lambda x: F.interpolate(x, scale_factor=(1, 2, 2)),
    "nearest in time": lambda x: F.interpolate(x, scale_factor=(2, 1, 1)),
    "transposed": lambda x: F.conv_transpose3d(x, draw(4, 2, 1, 4, 4, seed=1), stride=(1, 2, 2), padding=(0, 1, 1)),
    "avg_pool1d over pixels as batch": lambda x: F.avg_pool1d(
        x.permute(0, 3, 4, 1, 2).reshape(-1, 4, 5), kernel_size=2, stride=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", VIDEO_CALLS.values(), ids=VIDEO_CALLS.keys())
def test_video_calls(call: Any) -> None:
    check(call, (picture(GRID, 3, batch=1),), GRID)


def test_channels_last_stays_channels_last() -> None:
    weight = draw(4, 4, 3, 3, seed=1)

    def call(x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        assert padded.is_contiguous(memory_format=torch.channels_last)
        return F.conv2d(padded, weight)

    check(call, (picture(GRID).to(memory_format=torch.channels_last),), GRID)


def test_a_halo_is_fetched_once_for_pad_and_convolution() -> None:
    weight, single = draw(4, 4, 3, 3, seed=1), draw(4, 4, 1, 1, seed=1)

    def messages(function: Any) -> int:
        def work(comm: Any) -> int:
            mesh = Mesh(comm, (2, 1))
            shard = scatter(mesh, picture(GRID), (GRID[0], (0, 18)))
            with ShardMode(mesh):
                function(shard)
            return comm.traffic.messages

        return max(run_threads(2, work))

    assert messages(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), weight)) == 1
    assert messages(lambda x: F.conv2d(x, weight, padding=1)) == 1
    assert messages(lambda x: F.conv2d(x, single)) == 0


REFUSED: dict[str, tuple[Any, str]] = {
    "circular pad": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), "circular"),
    "negative pad": (lambda x: F.pad(x, (-1, -1, 0, 0)), "negative"),
    "wide reflect": (lambda x: F.pad(x, (0, 0, 5, 0), mode="reflect"), "reflect"),
    "same, even kernel": (lambda x: F.conv2d(x, draw(4, 4, 2, 2), padding="same"), "even kernel"),
    "unfold": (lambda x: F.unfold(x, 3), "unfold"),
    "fold": (lambda x: F.fold(x.flatten(2), (12, 18), 1), "fold"),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), "bicubic"),
    "aligned corners": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), "bilinear"),
    "resampling by 1.5": (lambda x: F.interpolate(x, scale_factor=1.5), "whole factor"),
    "bilinear down": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"), "whole factor"),
    "area": (lambda x: F.interpolate(x, scale_factor=2, mode="area"), "area"),
    "average without padding": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "leaves out"),
    "max pool with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), "max_pool2d"),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d"),
    "grid_sample": (lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, dtype=x.dtype)), "grid_sample"),
    "conv1d over flattened rows and columns": (lambda x: F.conv1d(x.flatten(2), draw(4, 4, 3)), "flattened"),
    "conv over sharded channels": (lambda x: F.conv2d(x.transpose(1, 2), draw(4, 12, 1, 1)), "channels"),
    "shards of one row": (lambda x: F.avg_pool2d(x, 4), "fewer than 2 rows"),
}


@pytest.mark.parametrize(("call", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(call: Any, reason: str) -> None:
    with pytest.raises(NotExactError, match=reason):
        on_shards(call, (picture(GRID),), GRID)
