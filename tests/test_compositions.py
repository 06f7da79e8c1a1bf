"""Random stacks of operators on random cuts: the result is the un-parallel one, or a refusal; never another picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from shards import check, draw, picture_bounds
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.exact.run import Bounds

TOLERANCE = 1e-9
"""Relative; six operators in a row, some of which divide by small numbers, amplify rounding."""

THREE, ONE, TWO = draw(4, 4, 3, 3, seed=1) / 6, draw(4, 4, 1, 1, seed=2) / 2, draw(4, 4, 2, 2, seed=3) / 4
FOUR, DEEP, SQUARE = draw(4, 4, 4, 4, seed=4) / 8, draw(4, 1, 5, 5, seed=5) / 5, draw(4, 4, seed=6) / 2


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def rows(x: Tensor) -> Tensor:
    """[batch * height, channels, width]"""
    return x.transpose(1, 2).reshape(-1, 4, x.shape[3])


def weighted(x: Tensor) -> Tensor:
    scores = F.relu(tokens(x)) @ F.relu(x.flatten(2))
    return (x.flatten(2) @ (scores / (scores.sum(1, keepdim=True) + 1))).reshape(x.shape)


def patches(x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    split = x.reshape(batch, 4, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return split.reshape(batch, 16, height // 2, width // 2)[:, 3::4]


def into_blank(x: Tensor) -> Tensor:
    blank = torch.zeros(x.shape[0], 6, *x.shape[2:], dtype=x.dtype)
    blank[:, :4] = x
    return blank[:, 1:5]


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: F.conv2d(x, THREE, padding=1),
    "conv, valid": lambda x: F.conv2d(x, THREE),
    "conv, stride 2": lambda x: F.conv2d(x, THREE, padding=1, stride=2),
    "conv, kernel 1": lambda x: F.conv2d(x, ONE),
    "conv, kernel 2": lambda x: F.conv2d(x, TWO, stride=2),
    "conv, depthwise": lambda x: F.conv2d(x, DEEP, padding=2, groups=4),
    "conv, dilated": lambda x: F.conv2d(x, THREE, padding=2, dilation=2),
    "conv, transposed": lambda x: F.conv_transpose2d(x, FOUR, stride=2, padding=1),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "pad, one side": lambda x: F.pad(x, (0, 1, 0, 1)),
    "pad, replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "pad, reflect": lambda x: F.pad(x, (1, 0, 1, 1), mode="reflect"),
    "pad to a multiple": lambda x: F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)),
    "group norm": lambda x: F.group_norm(x, 2),
    "group norm of rows": lambda x: F.group_norm(rows(x), 2).reshape(-1, x.shape[2], 4, x.shape[3]).transpose(1, 2),
    "layer norm": lambda x: F.layer_norm(x.movedim(1, -1), (4,)).movedim(-1, 1),
    "silu": F.silu,
    "relu, in place": lambda x: F.relu(x.clone(), inplace=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average, overlapping": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "residual": lambda x: x + F.conv2d(F.pad(F.silu(x), (1, 1, 1, 1)), THREE),
    "residual, in place": lambda x: x.clone().add_(F.conv2d(x, THREE, padding=1)),
    "padded residual": lambda x: F.pad(x, (1, 1, 1, 1)) + F.conv2d(x, ONE, padding=1),
    "attention": lambda x: (
        x + F.scaled_dot_product_attention(*[tokens(x)] * 3).transpose(1, 2).reshape(-1, 4, *x.shape[2:])
    ),
    "attention by products": lambda x: (
        x.flatten(2) @ (0.5 * tokens(x) @ x.flatten(2)).softmax(2).permute(0, 2, 1)
    ).reshape(x.shape),
    "attention by sums": weighted,
    "linear attention": lambda x: (
        (tokens(x) @ (x.flatten(2) @ tokens(x))).transpose(1, 2).reshape(x.shape) / (x.shape[2] * x.shape[3])
    ),
    "attention of rows": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 1)] * 3).permute(0, 3, 1, 2),
    "minus the mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "minus the mean of columns": lambda x: x - x.mean(2, keepdim=True),
    "squeeze and excite": lambda x: (
        x * F.linear(x.sum((2, 3)) / (x.shape[2] * x.shape[3]), SQUARE).sigmoid()[:, :, None, None]
    ),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.repeat_interleave(4, dim=1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2)[:, ::4],
    "patches": patches,
    "transpose": lambda x: x.transpose(2, 3),
    "conv of columns": lambda x: (
        F.conv1d(x.permute(0, 3, 1, 2).reshape(-1, 4, x.shape[2]), THREE[..., 1], padding=1)
        .reshape(-1, x.shape[3], 4, x.shape[2])
        .permute(0, 2, 3, 1)
    ),
    "cat and chunk": lambda x: torch.cat([x, F.conv2d(x, THREE, padding=1)], 1).chunk(2, 1)[1],
    "cat of pads": lambda x: torch.cat([F.pad(x, (1, 1, 1, 1)), F.pad(x, (2, 0, 0, 2))], 1)[:, 2:6],
    "into a blank": into_blank,
    "noise": lambda x: x + torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)),
    "softmax of channels": lambda x: x.softmax(1),
    "a size as a scale": lambda x: x * x.shape[2] ** -0.5,
}


GROWING = ("nearest", "bilinear", "pixel_shuffle")
"""Twice as many rows and columns: after some of them, attention asks for more memory than there is."""


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6),
    st.sampled_from([1, 2, 4]).flatmap(lambda ratio: picture_bounds(ratio=ratio)),
)
def test_any_stack_of_operators_is_exact_or_refused(names: list[str], bounds: Bounds) -> None:
    def network(x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](x)
        return x

    assume(sum(name in GROWING for name in names) <= 2)
    x = draw(2, 4, bounds[0][-1], bounds[1][-1])
    try:
        network(x)
    except (RuntimeError, ValueError):
        assume(False)  # the un-parallel network takes no such picture
    try:
        check(network, (x,), bounds, TOLERANCE)
    except NotExactError as error:
        assert "exact mode can't run torch" in str(error)  # noqa: PT017  (a refusal is right too)
