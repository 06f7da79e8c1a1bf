"""The rules for accelerators against torch: what they defer, fold and leave alone.

Triton's interpreter runs the kernels.
"""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_pictures import TOLERANCE, channels_last, error, frames, video
from shards import on_shards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from halovae.exact.run import Bounds
from halovae.kernels import convolution as kernels_convolution
from halovae.kernels import fast_arithmetic, fast_rules, fast_views, group_norm
from halovae.kernels.fast_mode import FastMode, finished
from halovae.kernels.gpu import (
    convolutions,
    copies,
    fused,
    support,
    triton_attention,
    triton_chain,
    triton_shuffled,
)
from halovae.kernels.kept import kept
from halovae.kernels.lazy import chain, upsampled
from halovae.kernels.lazy.chain import Chain, MeanSquare
from halovae.kernels.lazy.deferred import Deferred, recipe_of
from halovae.kernels.lazy.joined import Joined


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules take the kernels of an accelerator, which the interpreter runs."""
    monkeypatch.setattr(support, "supports", lambda _: True)
    monkeypatch.setattr(fused, "FEW_QUERIES", 1)
    monkeypatch.setattr(upsampled, "LOW", (torch.float32, torch.bfloat16, torch.float16))
    for module in (chain, support, fast_arithmetic, fast_rules, fast_views, upsampled):
        monkeypatch.setattr(module, "device_type", lambda _: "cuda")


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 64, 9, 11), 32), ((2, 96, 4, 8, 9), 32), ((1, 512, 3, 3), 1), ((2, 64, 50), 32), ((1, 320, 3, 3), 5)],
)
@pytest.mark.filterwarnings("ignore:overflow")  # of positions beyond the last, which are not stored
def test_group_norm_and_what_follows(shape: tuple[int, ...], groups: int, as_on_gpu: None):
    source = channels_last(frames(*shape) + 50)  # a mean large beside the spread: sums of squares would lose it
    weight, bias = frames(shape[1]), frames(shape[1]) + 1
    parameters = weight.double(), bias.double()
    expected = F.silu(F.group_norm(source.double(), groups, *parameters, 1e-6))
    with torch.no_grad(), FastMode():
        found = F.silu(F.group_norm(source, groups, weight, bias, 1e-6))
    assert len(shape) == 3 or isinstance(recipe_of(found), Chain)
    assert error(finished(found).double(), expected) < 2e-5  # float32, with a mean fifty times the spread

    parts = source.split(source.shape[-1] // 2 + 1, -1)
    moments = [group_norm.moments(part, groups) for part in parts]
    found = finished(group_norm.normalized(parts[0], moments, weight, bias, 1e-6))
    expected = F.group_norm(source.double(), groups, *parameters, 1e-6)[..., : found.shape[-1]]
    assert error(found.double(), expected) < 2e-5


def test_group_norm_takes_the_bias_that_waits(as_on_gpu: None):
    source, bias, weight = video(2, 32, 2, 5, 6), frames(32), frames(32)
    waiting = Chain(source, source.dtype).plus(bias.view(-1, 1, 1, 1))
    found = group_norm.group_norm(Deferred(waiting), 8, weight, None, 1e-6)
    recipe = recipe_of(found)
    assert isinstance(recipe, Chain)
    assert recipe.base is source
    assert error(finished(found), F.group_norm(source + bias.view(-1, 1, 1, 1), 8, weight, None, 1e-6)) < 1e-5


def test_group_norm_hands_on_what_is_not_a_number(as_on_gpu: None):
    source = video(1, 16, 2, 3, 5)
    source[0, 3, 0, 0, 0] = torch.nan
    with torch.no_grad(), FastMode():
        found = F.group_norm(source, 4)
    assert torch.equal(finished(found).isnan(), F.group_norm(source, 4).isnan())


def per_channel(picture: Tensor) -> Tensor:
    return picture / torch.sqrt(torch.mean(picture**2, dim=1, keepdim=True) + 1e-8)


def channels_moved(picture: Tensor) -> Tensor:
    moved = picture.movedim(1, -1)
    moved = moved * torch.rsqrt(moved.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-8)
    return moved.to(picture.dtype).movedim(-1, 1)


@pytest.mark.parametrize("norm", [per_channel, channels_moved])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_root_mean_square_that_is_written_out_is_one_step(norm: Any, dtype: torch.dtype, as_on_gpu: None):
    source = video(1, 24, 3, 6, 5).to(dtype)
    expected = F.silu(norm(source.double()))
    with torch.no_grad(), FastMode():
        found = F.silu(norm(source))
    recipe = recipe_of(found)
    assert isinstance(recipe, Chain)
    assert [step.kind for step in recipe.steps] == ["rms", "silu"]
    assert error(finished(found).double(), expected) < (
        1e-6 if dtype == torch.float32 else 2**-7
    )  # one rounding, which the interpreter does downwards


@pytest.mark.parametrize(
    "others",
    [
        lambda picture: (picture**2).mean(1, keepdim=True) * picture,
        lambda picture: torch.sqrt(picture.pow(2).mean((2, 3, 4))),
        lambda picture: (picture + 1) * torch.rsqrt((picture**2).mean(1, keepdim=True) + 1e-8),
        lambda picture: (picture**2).sum() + 2**picture,
    ],
)
def test_squares_for_anything_else_are_squares(others: Any, as_on_gpu: None):
    source = video(1, 24, 3, 6, 5)
    with torch.no_grad(), FastMode():
        found = others(source)
    assert error(finished(found), others(source)) < 1e-6  # sums in another order


@pytest.mark.filterwarnings("ignore:invalid value")  # of places beyond the last, which count for nothing
@pytest.mark.parametrize("pairs", [(70, 130), (33, 5000)])
def test_attention_with_a_wide_head(pairs: tuple[int, int], as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    # A CPU has no product of low precision with a float32 result.
    monkeypatch.setattr(triton_attention, "has_wide_products", lambda: True)
    monkeypatch.setattr(triton_attention, "products", lambda one, other, out: out.copy_(one.float() @ other.float()))
    monkeypatch.setattr(triton_attention, "_SCORE_BYTES", 4 * 32 * pairs[1])
    query, key, value = (frames(2, 1, length, 384).half() for length in (pairs[0], pairs[1], pairs[1]))
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with torch.no_grad(), FastMode():
        found = F.scaled_dot_product_attention(query, key, value)
    assert error(found.double(), expected) < 2**-9  # shares are rounded to half precision


@pytest.mark.parametrize("kernel", [(1, 1, 2), (2, 2, 1)])
def test_a_transposed_convolution_whose_kernel_is_its_stride(kernel: tuple[int, ...], as_on_gpu: None):
    source, weight, bias = video(2, 6, 3, 4, 5), frames(6, 1, *kernel), frames(6)
    expected = F.conv_transpose3d(source, weight, bias, stride=kernel, groups=6)
    with torch.no_grad(), FastMode():
        found = F.conv_transpose3d(source, weight, bias, stride=kernel, groups=6)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert error(found, expected) < 1e-6


def conditioned(picture: Tensor, small: Tensor, weights: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
    """A norm that is multiplied by, and added to, what a smaller video says; its first frame stands for one."""
    first, rest = picture[:, :, :1], picture[:, :, 1:]
    sizes = (first.shape[-3:], rest.shape[-3:])
    parts = [F.interpolate(z, size=size) for z, size in zip((small[:, :, :1], small[:, :, 1:]), sizes, strict=True)]
    large = torch.cat(parts, dim=2)
    by, more = (F.conv3d(large, weight, bias) for weight in weights)
    large[:, :, 0:].clone()
    return F.silu(F.group_norm(picture, 4, bias, None, 1e-6) * by + more)


def test_what_a_smaller_video_says_is_read_by_the_pass_that_needs_it(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    picture, small, bias = video(2, 16, 5, 8, 12), video(2, 4, 3, 2, 3), frames(16)
    weights = frames(16, 4, 1, 1, 1), frames(16, 4, 1, 1, 1) + 1
    expected = conditioned(picture.double(), small.double(), (weights[0].double(), weights[1].double()), bias.double())
    monkeypatch.setattr(upsampled.Repeated, "compute", lambda _: pytest.fail("was made large"))
    with torch.no_grad(), FastMode():
        found = conditioned(picture, small, weights, bias)
        assert error(finished(found).double(), expected) < 1e-5


def upsampled_in_time(video: Tensor, weight: Tensor) -> Tensor:
    first, rest = (F.interpolate(part, scale_factor=2.0) for part in (video[:, :, 0], video[:, :, 1:]))
    large = torch.cat((first[:, :, None], rest), 2)
    batch, channels, length, height, width = large.shape
    pictures = large.permute(0, 2, 1, 3, 4).reshape(batch * length, channels, height, width)
    pictures = F.conv2d(pictures, weight, padding=1)
    return pictures.reshape(batch, length, *pictures.shape[1:]).permute(0, 2, 1, 3, 4)


def upsampled_by_frames(video: Tensor, weight: Tensor) -> Tensor:
    batch, channels, length, height, width = video.shape
    large = F.interpolate(video.permute(0, 2, 1, 3, 4).reshape(-1, channels, height, width), scale_factor=2.0)
    large = large.reshape(batch, length, channels, *large.shape[2:]).permute(0, 2, 1, 3, 4)
    pictures = F.conv2d(
        large.permute(0, 2, 1, 3, 4).reshape(-1, *large.shape[1:2], *large.shape[3:]), weight, padding=1
    )
    return pictures.reshape(batch, length, *pictures.shape[1:]).permute(0, 2, 1, 3, 4)


@pytest.mark.parametrize("network", [upsampled_in_time, upsampled_by_frames])
def test_an_upsampled_video_is_folded_into_the_convolution_of_its_frames(network: Any, as_on_gpu: None):
    source, weight = video(2, 8, 3, 4, 5), frames(6, 8, 3, 3)
    with torch.no_grad(), FastMode(), counted("upsample_nearest") as calls:
        found = finished(network(source, weight))
    assert not calls
    assert error(found.double(), network(source.double(), weight.double())) < 1e-5


def counted(name: str) -> Any:
    """Within it, calls of operators with this in their name are listed."""

    class Calls(TorchDispatchMode):
        def __enter__(self) -> list[str]:
            super().__enter__()
            return self.found

        found: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if name in str(func):
                self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    return Calls()


SHUFFLES = {
    "to pixels": lambda x: x.reshape(1, 4, 2, 2, 2, 3, 4, 6).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5)
    .flatten(2, 3),
    "to channels": lambda x: x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 4, 6, 2, 3, 5).flatten(1, 3),
    "repeated": lambda x: x.repeat(1, 3, 1, 1, 1),
    "stacked": lambda x: torch.stack((x[:, :16], x[:, 16:]), 3).reshape(1, 16, 6, 4, 6),
    "joined to nothing": lambda x: torch.cat((x[:, :, :0], x), 2),
    "frames of a join": lambda x: torch.cat((x[:, :, :1], x, x[:, :, -1:]), 2)[:, :, -3:-1].clone(),
}  # fmt: skip


@pytest.mark.parametrize("shuffle", SHUFFLES.values(), ids=SHUFFLES)
def test_what_is_rearranged_by_hand_stays_channels_last(shuffle: Any, as_on_gpu: None):
    source = video(1, 32, 3, 4, 6)
    with torch.no_grad(), FastMode():
        found = shuffle(source)
    value = found.computed() if isinstance(found, Deferred) else found
    assert torch.equal(value, shuffle(source))
    assert value.is_contiguous(memory_format=torch.channels_last_3d)


def to_channels(video: Tensor, block: tuple[int, int, int]) -> Tensor:
    """Pixels of each block as channels, as networks write it."""
    for dim in (4, 3, 2):
        video = video.unflatten(dim, (-1, block[dim - 2]))
    return video.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def to_channels_of_a_shard(video: Tensor, block: tuple[int, int, int]) -> Tensor:
    """The same, as it is written where every size is said."""
    (time, height, width), (p, q, r) = video.shape[2:], block
    video = video.reshape(*video.shape[:2], time // p, p, height // q, q, width // r, r)
    return video.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def downsampled(video: Tensor, weight: Tensor, bias: Tensor, block: tuple[int, int, int], rearranged: Any) -> Tensor:
    """Means of a video's own pixels, and a convolution of it whose pixels become channels."""
    video = torch.cat((video[:, :, : block[0] - 1], video), 2)
    before = video[:, :, :1].repeat(1, 1, 2, 1, 1)
    convolved = F.conv3d(torch.cat((before, video), 2), weight, bias, padding=(0, 1, 1))
    own, new = rearranged(video, block), rearranged(convolved, block)
    return new + own.unflatten(1, (new.shape[1], -1)).mean(dim=2)


@pytest.mark.parametrize("rearranged", [to_channels, to_channels_of_a_shard])
@pytest.mark.parametrize(
    ("block", "inputs", "outputs"),
    [((1, 2, 2), 24, 12), ((2, 1, 1), 16, 16), ((2, 2, 2), 16, 4), ((2, 1, 4), 32, 2)],
)
def test_pixels_that_become_channels_are_added_in_one_pass(
    rearranged: Any,
    block: tuple[int, int, int],
    inputs: int,
    outputs: int,
    as_on_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kernels_convolution, "device_type", lambda _: "cuda")
    source = video(2, inputs, 3 if block[0] == 2 else 2, 4, 8)
    weight, bias = frames(outputs, inputs, 3, 3, 3), frames(outputs)
    expected = downsampled(*(t.double() for t in (source, weight, bias)), block, to_channels)
    with torch.no_grad(), FastMode(), Operators() as seen:
        found = downsampled(source, weight, bias, block, rearranged)
    assert not {torch.ops.aten.mean.dim, torch.ops.aten.add.Tensor, torch.ops.aten.cat.default} & {*seen.calls}
    assert error(found.double(), expected) < TOLERANCE
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("bounds", [((0, 4, 8), (0, 8)), ((0, 8), (0, 4, 8))])
def test_shards_take_the_same_kernels(bounds: Bounds, as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels_convolution, "device_type", lambda _: "cuda")
    monkeypatch.setattr(MeanSquare, "compute", lambda _: pytest.fail("was not part of a chain"))
    calls, sums = list[int](), triton_shuffled.run
    one_at_a_time, launch = threading.RLock(), GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_at_a_time:  # the interpreter is for one thread
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    monkeypatch.setattr(triton_shuffled, "run", lambda terms, out: calls.append(len(terms)) or sums(terms, out))
    source, first, second, bias = video(1, 16, 3, 8, 8), frames(16, 16, 3, 3, 3), frames(4, 16, 3, 3, 3), frames(4)

    def network(source: Tensor) -> Tensor:
        normed = F.dropout(F.silu(per_channel(source)), 0.5, training=False)
        padded = torch.cat((normed[:, :, :1].repeat(1, 1, 2, 1, 1), normed), 2)
        convolved = F.conv3d(padded, first.to(source.dtype), padding=(0, 1, 1)) + source
        return downsampled(convolved, *(t.to(source.dtype) for t in (second, bias)), (2, 2, 2), to_channels)

    with torch.no_grad():
        for found in on_shards(network, (source,), bounds, fast=True):
            assert error(found.double(), network(source.double())) < TOLERANCE
    assert calls == [2, 2]


@pytest.mark.parametrize("how", ["alone", "bare", "otherwise", "later"])
def test_pixels_that_become_channels_are_what_they_are(how: str, as_on_gpu: None):
    """Whatever is done with them, and with the memory they come from."""
    source = video(1, 16, 3, 4, 6)

    def call(source: Tensor) -> Tensor:
        shuffled = to_channels(source, (1, 2, 2))
        if how == "bare":
            return shuffled
        groups = shuffled.unflatten(1, (-1, 8))
        if how == "otherwise":
            return groups.mean(1) + groups.amax(1)
        means = groups.mean(2)
        if how == "later":
            source.mul_(2.0)
        return means if how == "alone" else means + 1.0

    expected = call(source.clone())
    with torch.no_grad(), FastMode():
        found = finished(call(source))
    assert error(found, expected) < 1e-6  # means in another order


@pytest.mark.parametrize("maker", ["chain", "sum"])
def test_frames_are_joined_to_their_video_where_it_lies(maker: str, as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels_convolution, "device_type", lambda _: "cuda")
    kept().rooms.clear()
    source, weight, bias = video(1, 16, 4, 5, 6), frames(8, 16, 3, 3, 3), frames(16)
    copied: list[int] = []
    copy = copies.copy
    monkeypatch.setattr(copies, "copy", lambda out, part: copied.append(part.shape[2]) or copy(out, part))

    def call() -> Tensor:
        if maker == "sum":
            normed = F.conv3d(source, weight[:, :, :1, :1, :1].repeat(2, 1, 1, 1, 1), bias) + source
        else:
            normed = F.dropout(F.silu(F.group_norm(source, 4)), 0.5, training=False)
        before, after = normed[:, :, :1].repeat((1, 1, 2, 1, 1)), normed[:, :, -1:].repeat(1, 1, 1, 1, 1)
        return F.conv3d(torch.cat([before, normed, after], 2), weight, padding=(0, 1, 1))

    expected = call()
    with torch.no_grad(), FastMode():
        for frames_of_copies in ([2, 4, 1], [2, 1]):
            copied.clear()
            assert error(finished(call()), expected) < TOLERANCE
            assert copied == frames_of_copies


def by_rows(length: int, block: int) -> Tensor:
    mask = torch.full((length, length), float("-inf"), dtype=torch.float32, device=torch.device("cpu"))
    for i in range(length):
        mask[i, : (i // block + 1) * block] = 0
    return mask


def test_a_mask_written_row_by_row_is_made_at_once(as_on_gpu: None):
    with torch.no_grad(), FastMode(), counted("fill_") as calls:
        found = by_rows(12, 4)
        later = found.clone()
        found[2, 3:] = 1.0
    expected = by_rows(12, 4)
    assert torch.equal(later, expected)
    assert len(calls) == 4  # as many as there are frames, and the one that is no beginning
    expected[2, 3:] = 1.0
    assert torch.equal(finished(found), expected)


def test_mirrored_padding_waits_for_the_convolution(as_on_gpu: None):
    source = video(1, 4, 3, 6, 5)
    with torch.no_grad(), FastMode():
        padded = F.pad(source, (1, 2, 3, 1, 0, 0), mode="reflect")
        assert isinstance(recipe_of(padded), Joined)
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):
            F.pad(source, (5, 0, 0, 0, 0, 0), mode="reflect")
    assert torch.equal(finished(padded), F.pad(source, (1, 2, 3, 1, 0, 0), mode="reflect"))


def test_only_what_is_padded_has_gaps(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    """A network may view what it does not convolve in any way."""
    monkeypatch.setattr(kernels_convolution, "device_type", lambda _: "cuda")
    kept().rooms.clear()
    source, weight = channels_last(frames(1, 16, 6, 5)), frames(4, 16, 3, 3)
    normed = F.silu(F.group_norm(source, 4))
    expected = F.conv2d(F.pad(normed, (1, 1, 1, 1), mode="replicate"), weight)
    with torch.no_grad(), FastMode():
        for _ in range(3):
            found = F.conv2d(F.pad(F.silu(F.group_norm(source, 4)), (1, 1, 1, 1), mode="replicate"), weight)
            assert error(finished(found), expected) < TOLERANCE
            assert error(F.silu(F.group_norm(source, 4)).view(1, 16, -1), normed.view(1, 16, -1)) < TOLERANCE
            one = F.conv2d(F.silu(F.group_norm(source, 4)), weight[..., :1, :1])
            assert error(finished(one), F.conv2d(normed, weight[..., :1, :1])) < TOLERANCE
    assert kept().rooms


class Operators(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_frames_are_normed_one_by_one_without_a_copy(as_on_gpu: None):
    source, weight = channels_last(frames(1, 16, 3, 5, 6)), frames(16)

    def call() -> Tensor:
        pictures = source.permute(0, 2, 1, 3, 4).contiguous().view(3, 16, 1, 5, 6)
        normed = F.group_norm(pictures, 4, weight, None, 1e-6)
        return F.silu(normed.view(1, 3, 16, 5, 6).permute(0, 2, 1, 3, 4).contiguous())

    expected = call()
    with torch.no_grad(), FastMode():
        found = call()
        assert isinstance(recipe_of(found), chain.Seen)
        with Operators() as seen:
            result = found.computed()
    assert torch.ops.aten.clone.default not in seen.calls
    assert error(result, expected) < 1e-5
    assert result.is_contiguous(memory_format=torch.channels_last_3d)


def test_frames_of_several_videos_are_normed_where_they_are_padded(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    """Without a pass for a bias, or a copy from the second call on."""
    monkeypatch.setattr(kernels_convolution, "device_type", lambda _: "cuda")
    monkeypatch.setattr(copies, "_MANY", 1)
    kept().rooms.clear()
    source, first, second = video(2, 8, 3, 4, 5), frames(16, 8, 1, 1, 1), frames(16, 16, 3, 3, 3)
    weight, bias = frames(16), frames(16) + 1
    passes: list[str] = []
    copy, run = copies.copy, triton_chain.run
    monkeypatch.setattr(copies, "copy", lambda *args: passes.append("copy") or copy(*args))
    monkeypatch.setattr(triton_chain, "run", lambda *args, **form: passes.append("chain") or run(*args, **form))

    def call(source: Tensor, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        start = F.conv3d(source, first, bias)
        pictures = start.permute(0, 2, 1, 3, 4).contiguous().view(6, 16, 1, 4, 5)
        normed = F.group_norm(pictures, 4, weight, bias, 1e-6)
        active = F.silu(normed.view(2, 3, 16, 4, 5).permute(0, 2, 1, 3, 4).contiguous())
        padded = F.pad(F.pad(active, (1, 1, 1, 1, 0, 0), mode="reflect"), (0, 0, 0, 0, 2, 0))
        return start + F.conv3d(padded, second, bias)

    expected = call(*(t.double() for t in (source, first, second, weight, bias)))
    with torch.no_grad(), FastMode():
        for wanted in (["chain", "copy", "chain"], ["chain", "chain"]):
            passes.clear()
            found = finished(call(source, first, second, weight, bias))
            assert passes == wanted
            assert error(found.double(), expected) < TOLERANCE


def test_a_value_around_a_mirrored_picture_comes_in_the_same_copy(as_on_gpu: None):
    source, weight = channels_last(frames(1, 4, 3, 5, 6)), frames(8, 4, 3, 3, 3)

    def padded() -> Tensor:
        return F.pad(F.pad(source, (1, 1, 1, 1, 0, 0), mode="reflect"), (0, 0, 0, 0, 2, 0), value=0.5)

    with torch.no_grad(), FastMode():
        found = padded()
        recipe = recipe_of(found)
        assert isinstance(recipe, Joined)
        assert recipe.parts == (source,)
        assert torch.equal(found.computed(), padded())
        assert error(finished(F.conv3d(padded(), weight)), F.conv3d(padded(), weight)) < TOLERANCE


def test_parameters_with_gaps_and_of_other_sizes(as_on_gpu: None, monkeypatch: pytest.MonkeyPatch):
    """The kernels read rows of as many values as there are channels: torch says where there are none."""
    monkeypatch.setattr(convolutions, "FEW_POSITIONS", 1)
    monkeypatch.setattr(convolutions, "convolves", lambda *_: True)
    source, weight = channels_last(frames(1, 32, 6, 8)), frames(24, 32, 3, 3)
    scale, bias = frames(64)[::2], frames(48)[::2]
    calls = [lambda: F.group_norm(source, 8, scale, scale), lambda: F.conv2d(source, weight, bias, padding=1)]
    for call in calls:
        with torch.no_grad(), FastMode():
            found = finished(call())
        assert error(found, call()) < TOLERANCE
    wrong = [
        lambda: F.group_norm(source, 8, frames(16)),
        lambda: F.group_norm(source, 5),
        lambda: F.conv2d(source, weight, frames(16)),
        lambda: F.conv2d(source, frames(24, 16, 3, 3)),
    ]
    for call in wrong:
        with torch.no_grad(), FastMode(), pytest.raises(RuntimeError):
            finished(call())
