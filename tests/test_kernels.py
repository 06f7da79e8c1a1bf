"""The fast kernels: under the fast mode, each composition gives what plain torch gives. In float64, a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shards import EXACT, GRID, assert_same, draw, image, on_shards, video
from torch import Tensor

from halovae.kernels import convolution
from halovae.kernels.fast_mode import FastMode, finished
from halovae.kernels.lazy.deferred import Deferred, computed, recipe_of
from halovae.kernels.lazy.joined import Joined
from halovae.kernels.memory_format import is_channels_last

pytestmark = pytest.mark.usefixtures("small_pieces")

VIDEO, IMAGE = (1, 4, 5, 12, 9), (2, 4, 12, 9)
W3, W2, BIAS = draw(6, 4, 3, 3, 3, seed=1), draw(6, 4, 3, 3, seed=1), draw(6, seed=2)
GAMMA = draw(4, 1, 1, 1, seed=3)


def causal(x: Tensor, cache: Tensor | None = None, mode: str = "constant") -> Tensor:
    """A convolution that looks back in time, at a cache if there is one."""
    back = 2
    if cache is not None:
        x, back = torch.cat([cache, x], dim=2), back - cache.shape[2]
    return F.conv3d(F.pad(x, (1, 1, 1, 1, back, 0), mode=mode), W3, BIAS)


def norm(x: Tensor, gamma: Tensor = GAMMA) -> Tensor:
    return F.silu(F.normalize(x, dim=1) * 2.0 * gamma.to(x.dtype) + 0.0)


def written_later(x: Tensor) -> Tensor:
    """What waits must see the picture as it was."""
    padded = F.pad(x, (1, 1, 1, 1))
    x[:, :, 0] = 7.0
    x.mul_(2)
    return F.conv3d(padded, W3) + F.pad(x, (0, 0, 0, 0, 1, 1)).mean()


def kept(x: Tensor) -> tuple[Tensor, Tensor]:
    """A deferred tensor with several users."""
    y = norm(x)
    tail = y[:, :, -2:].clone()
    return causal(y, tail), y + x


def copied(x: Tensor, how: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """A copy is what the picture was, whoever is written later, and writing it leaves the picture alone."""
    x = F.conv2d(x, W2, BIAS)
    early, late, written = how(x), how(x), how(x)
    y = F.group_norm(early, 2) + late
    if written.data_ptr() != x.data_ptr():
        F.silu(written, inplace=True)
    x.mul_(2)
    return y, early, late.view(2, 6, -1), x


def grown(x: Tensor) -> Tensor:
    """A result that grows frame by frame."""
    out = x[:, :, :1]
    for frame in range(1, x.shape[2]):
        out = torch.cat([out, x[:, :, frame : frame + 1]], 2)
    return out


def shuffled(x: Tensor) -> Tensor:
    """Pixels moved into channels and back by hand."""
    b, c, h, w = x.shape
    deep = x.reshape(b, c, h // 2, 2, w // 3, 3).permute(0, 3, 5, 1, 2, 4).reshape(b, 6 * c, h // 2, w // 3)
    back = (2 * deep).reshape(b, 2, 3, c, h // 2, w // 3).permute(0, 3, 4, 1, 5, 2).reshape((b, c, h, w))
    return F.conv2d(back, W2)


def shuffled_in_place(x: Tensor) -> Tensor:
    """A view, where one will do: who writes it writes the picture."""
    x.reshape(2, 4, 2, 6, 9, 1).reshape(2, 4, 12, 9).mul_(2)
    return x


def up(x: Tensor, mode: str = "nearest", **geometry: Any) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode=mode), W2, BIAS, **({"padding": 1} | geometry))


CASES: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...]]] = {
    "conv3d": (lambda x: F.conv3d(x, W3, BIAS, padding=1), VIDEO),
    "conv3d, strided, dilated": (lambda x: F.conv3d(x, W3, None, (1, 2, 2), 2, (1, 2, 1)), VIDEO),
    "conv2d": (lambda x: F.conv2d(x, W2, BIAS, padding=1), IMAGE),
    "conv2d by keywords": (lambda x: F.conv2d(input=x, weight=W2, padding=(2, 0)), IMAGE),
    "conv2d, padding same": (lambda x: F.conv2d(x, W2, padding="same"), IMAGE),
    "conv2d, two groups": (lambda x: F.conv2d(x, W2[:, :2], groups=2), IMAGE),
    "conv2d without a batch": (lambda x: F.conv2d(x[0], W2), IMAGE),
    "transposed, a group for each channel": (lambda x: F.conv_transpose2d(x, W2[:4, :1], None, 2, groups=4), IMAGE),
    "asymmetric padding": (lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), W2, BIAS, stride=2), IMAGE),
    "wide padding": (lambda x: F.conv2d(F.pad(x, (5, 4, 3, 6)), W2, BIAS), IMAGE),
    "padding of a value": (lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=2.0), W2, padding=1), IMAGE),
    "padding twice": (lambda x: F.conv2d(F.pad(F.pad(x, (1, 0, 2, 0)), (0, 3)), W2, padding=1), IMAGE),
    "negative padding": (lambda x: F.conv2d(F.pad(x, (-1, 1)), W2), IMAGE),
    "reflect padding": (lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), W2), IMAGE),
    "padding alone": (lambda x: F.pad(x, (1, 2, 0, 1, 2, 0), mode="replicate"), VIDEO),
    "padded channels": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)), VIDEO),
    "causal, first frame": (lambda x: causal(x[:, :, :1]), VIDEO),
    "causal, first frames": (causal, VIDEO),
    "causal, replicated": (lambda x: causal(x, mode="replicate"), VIDEO),
    "causal, one cached": (lambda x: causal(x[:, :, 1:], x[:, :, :1]), VIDEO),
    "causal, two cached": (lambda x: causal(x[:, :, 2:], x[:, :, :2]), VIDEO),
    "joined in another dimension": (lambda x: torch.cat([x, x], 1), VIDEO),
    "joined with another dtype": (lambda x: torch.cat([x, x.float()], 2), VIDEO),
    "norm over channels": (norm, VIDEO),
    "norm over channels of images": (lambda x: norm(x, GAMMA[..., 0]), IMAGE),
    "norm over the last dimension": (lambda x: F.normalize(x, dim=-1) * GAMMA[0, 0, 0], IMAGE),
    "norm, then a full-sized factor": (lambda x: F.normalize(x, dim=1) * x, VIDEO),
    "norm, shifted": (lambda x: 3 + F.normalize(x, dim=1) * GAMMA + GAMMA, VIDEO),
    "norm of zeros": (lambda x: F.normalize(x * 0, dim=1), VIDEO),
    "norm, sum of absolute values": (lambda x: F.normalize(x, p=1.0), VIDEO),
    "norm into silu in place": (lambda x: F.silu(F.normalize(x, dim=1), inplace=True), VIDEO),
    "upsampled": (up, IMAGE),
    "upsampled, nearest-exact": (lambda x: up(x, "nearest-exact"), IMAGE),
    "upsampled, by pairs": (lambda x: F.conv2d(F.interpolate(x, scale_factor=(2.0, 2.0)), W2, padding=1), IMAGE),
    "upsampled, unpadded": (lambda x: up(x, padding=0), IMAGE),
    "upsampled, strided": (lambda x: up(x, stride=2), IMAGE),
    "upsampled, alone": (lambda x: F.interpolate(x, scale_factor=2.0), IMAGE),
    "upsampled, linear": (lambda x: up(x, "bilinear"), IMAGE),
    "upsampled by three": (lambda x: F.conv2d(F.interpolate(x, scale_factor=3.0), W2, padding=1), IMAGE),
    "upsampled to a size": (lambda x: F.conv2d(F.interpolate(x, size=(24, 18)), W2, padding=1), IMAGE),
    "several users": (kept, VIDEO),
    "written later": (lambda x: written_later(x.clone()), VIDEO),
    "divided by one": (lambda x: copied(x, lambda y: y / 1.0), IMAGE),
    "divided by a number": (lambda x: copied(x, lambda y: y / 2), IMAGE),
    "contiguous": (lambda x: F.conv2d(x, W2).contiguous().view(2, 6, -1).sum(2), IMAGE),
    "contiguous, normed, padded": (lambda x: F.pad(F.group_norm(F.conv2d(x, W2).contiguous(), 2), (1, 1)), IMAGE),
    "padding for nobody": (lambda x: (F.pad(x, (1, 1, 1, 1)), F.conv2d(x, W2, padding=1))[1], IMAGE),
    "grown frame by frame": (grown, VIDEO),
    "shuffled by hand": (shuffled, IMAGE),
    "repeated channels": (
        lambda x: (
            F.conv2d(x, W2).repeat_interleave(4, dim=1, output_size=4 * len(W2)),
            torch.repeat_interleave(x, 2, -3),
            x.repeat_interleave(2, -2),
            x.repeat_interleave(2),
            torch.repeat_interleave(x, torch.arange(x.shape[1]), dim=1),
        ),
        IMAGE,
    ),
    "reshaped by keywords": (lambda x: torch.reshape(input=x, shape=(2, 4, 6, 2, 9, 1)), IMAGE),
    "shuffled in place": (lambda x: shuffled_in_place(x.clone(memory_format=torch.contiguous_format)), IMAGE),
    "shuffled frames": (
        lambda x: x.reshape(1, 2, 2, 5, 12, 3, 3).permute(0, 1, 3, 2, 4, 6, 5).reshape(1, 2, 10, 12, 9),
        VIDEO,
    ),
    "cropped, what is upsampled": (lambda x: F.conv2d(F.interpolate(x, scale_factor=2.0)[:, :, 1:-1, 2:], W2), IMAGE),
    "cropped, what is padded": (lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1))[..., 1:, :-1], W2), IMAGE),
    "cropped, what is joined": (lambda x: torch.cat([x[:, :, :1], x], 2)[:, :, 1:, :-1, ::2], VIDEO),
    "one frame and some channels of what is joined": (lambda x: torch.cat([x, x], 2)[:, 1:, 3], VIDEO),
    "views of channels and rows": (lambda x: F.conv3d(x, W3, padding=1).view(1, -1, 9).sum(1), VIDEO),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", CASES)
def test_same_as_plain_torch(name: str, channels_last: bool) -> None:
    function, shape = CASES[name]
    x = draw(*shape)
    if channels_last:
        x = x.to(memory_format=(torch.channels_last, torch.channels_last_3d)[len(shape) - 4])
    with torch.no_grad():
        expected = function(x.clone())
        with FastMode():
            found = function(x.clone())
    results = found if isinstance(found, tuple) else (found,)
    assert_same(tuple(map(finished, results)), expected if isinstance(expected, tuple) else (expected,), EXACT)


SHARDED = [
    "conv2d", "asymmetric padding", "causal, two cached", "causal, replicated", "norm over channels", "several users",
    "upsampled", "upsampled, nearest-exact", "upsampled, unpadded", "upsampled, strided", "upsampled, alone",
    "conv3d", "conv3d, strided, dilated", "wide padding", "padding of a value", "padding twice", "padding alone",
    "reflect padding", "causal, first frame", "causal, one cached", "written later",
    "padding for nobody",
]  # fmt: skip
CUTS = [GRID, ((0, 5, 12), (0, 18)), ((0, 4, 8, 12), (0, 18)), ((0, 12), (0, 6, 12, 18))]


@pytest.mark.parametrize("bounds", CUTS, ids=str)
@pytest.mark.parametrize("name", SHARDED)
def test_same_on_shards(name: str, bounds: Any) -> None:
    """The operators' rules call the kernels; an upsampling that waits gets its halo from the small picture."""
    check_on_shards(name, bounds)


def check_on_shards(name: str, bounds: Any) -> None:
    function, shape = CASES[name]
    x = image() if len(shape) == 4 else video()
    with torch.no_grad():
        expected = function(x)
        for found in on_shards(function, (x,), bounds, fast=True):
            assert_same(found, expected, EXACT)


def test_repeated_channels_stay_channels_last() -> None:
    with torch.no_grad(), FastMode():
        convolved = F.conv2d(draw(*IMAGE), W2)
        repeated = F.pixel_shuffle(convolved.repeat_interleave(4, dim=1), 2)
    assert is_channels_last(computed(repeated))


LOW = ["conv3d", "causal, first frame", "causal, two cached", "asymmetric padding", "several users", "upsampled"]


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_no_farther_from_the_truth(name: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    """Than plain torch, but for a fifth of its own rounding; in float32 whatever this processor prefers."""
    monkeypatch.setattr(convolution, "working_dtype", lambda given: torch.float32)
    function, shape = CASES[name]
    x = draw(*shape, dtype=dtype)
    cast = {"W3": W3, "W2": W2, "BIAS": BIAS, "GAMMA": GAMMA}
    for key, value in cast.items():
        monkeypatch.setitem(globals(), key, value.to(dtype))
    plain = function(x)
    with FastMode():
        fast = function(x)
    for key, value in cast.items():
        monkeypatch.setitem(globals(), key, value.to(dtype).double())
    truth = function(x.double())
    first = tuple(r[0] if isinstance(r, tuple) else r for r in (plain, fast, truth))
    assert first[1].dtype == first[0].dtype
    errors = [(finished(r).double() - first[2]).norm() / first[2].norm() for r in first[:2]]
    assert errors[1] <= errors[0] * 1.2 + torch.finfo(dtype).eps / 5


def test_nothing_is_written_before_it_is_needed() -> None:
    x = draw(*VIDEO)
    with FastMode():
        padded = F.pad(torch.cat([x, x], 2), (1, 1))
        assert isinstance(padded, Deferred)
        assert isinstance(recipe_of(padded), Joined)
        assert padded.shape == (1, 4, 10, 12, 11)
        assert recipe_of(padded) is not None, "a question computed it"
        padded.sum()
    assert recipe_of(padded) is None


def test_a_deferred_tensor_is_a_tensor_outside_the_mode() -> None:
    x = draw(*VIDEO)
    with FastMode():
        padded = F.pad(x, (1, 1))
    assert_same(padded + 1, F.pad(x, (1, 1)) + 1)


@pytest.mark.parametrize("sizes", [(6, 8), (4, 6, 8)], ids=["picture", "video"])
def test_a_bias_with_gaps(sizes: tuple[int, ...]):
    """The library's convolution with packed weights reads a bias as if it had none."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 32, *sizes, generator=generator)
    weight = torch.randn(24, 32, *[3] * len(sizes), generator=generator)
    bias, function = torch.randn(48, generator=generator)[::2], (F.conv2d, F.conv3d)[len(sizes) - 2]

    def calls() -> list[Tensor]:
        found = [function(picture, weight, bias, padding=1)]
        if len(sizes) == 2:
            found.append(F.conv2d(F.interpolate(picture, scale_factor=2.0), weight, bias, padding=1))
        return found

    with torch.no_grad(), FastMode():
        found = list(map(finished, calls()))
    for one, expected in zip(found, calls(), strict=True):
        assert (one - expected).abs().max() < 1e-5 * expected.abs().max()  # float32, added up in another order
