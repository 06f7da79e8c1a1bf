"""The Triton kernels against torch. Without an accelerator Triton's interpreter runs them (see `conftest.py`)."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_pictures import TOLERANCE, channels_last, error, frames, frames_of, picture_of, video
from torch import Tensor

pytest.importorskip("triton")

from halovae.kernels import kept as store
from halovae.kernels.convolution import Convolution, on_gpu
from halovae.kernels.fill import Fill, fill_outside
from halovae.kernels.gpu import (
    convolutions,
    copies,
    fused,
    operators,
    room_around,
    support,
    triton_chain,
    triton_convolution,
    triton_copy,
    triton_norms,
)
from halovae.kernels.gpu.triton_convolution import Tile, convolve, pack, pack_upsampled, tile_for
from halovae.kernels.lazy.chain import Chain, Step
from halovae.kernels.lazy.deferred import recipe_of
from halovae.kernels.lazy.joined import Halo, Joined
from halovae.kernels.lazy.promise import kept, promised
from halovae.kernels.memory_format import memory_format

SMALL = Tile(positions=32, channels=16, more_channels=16, depth=16, warps=4, stages=2)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (24, 5), (3, 40), (32, 96)])
def test_convolution_over_time_and_space(inputs: int, outputs: int):
    source, bias = frames(4, 5, 7, inputs), frames(outputs)
    weight = frames(outputs, inputs, 3, 3, 3)
    expected = frames_of(F.conv3d(picture_of(source), weight, bias, padding=(0, 1, 1)))
    found = torch.empty_like(expected, memory_format=torch.contiguous_format)
    convolve(source, pack(weight, SMALL), bias, SMALL, kernel=(3, 3, 3), stride=1, before=(1, 1), out=found)
    assert error(found, expected) < TOLERANCE


def test_stride_with_padding_after_only():
    source, bias = frames(2, 6, 8, 16), frames(20)
    weight = frames(20, 16, 1, 3, 3)
    expected = frames_of(F.conv3d(F.pad(picture_of(source), (0, 1, 0, 1)), weight, bias, stride=(1, 2, 2)))
    found = torch.empty_like(expected, memory_format=torch.contiguous_format)
    convolve(source, pack(weight, SMALL), bias, SMALL, kernel=(1, 3, 3), stride=2, before=(0, 0), out=found)
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_upsampling_before_the_convolution_is_folded_into_it(size: tuple[int, int]):
    source, bias = frames(2, *size, 16), frames(24)
    weight = frames(24, 16, 3, 3)
    large = F.interpolate(source.permute(0, 3, 1, 2), scale_factor=2, mode="nearest-exact")
    expected = F.conv2d(large, weight, bias, padding=1).permute(0, 2, 3, 1)
    found = torch.empty_like(expected, memory_format=torch.contiguous_format)
    packed = pack_upsampled(weight, SMALL)
    convolve(source, packed, bias, SMALL, kernel=(1, 2, 2), stride=1, before=(1, 1), out=found, upsample=2)
    assert error(found, expected) < TOLERANCE


@pytest.mark.parametrize("outputs", [3, 96, 100, 128, 192, 384])
@pytest.mark.parametrize("inputs", [3, 48, 96, 192])
def test_every_tile_covers_all_channels_and_adds_up_to_its_width(inputs: int, outputs: int):
    tile = tile_for(inputs, outputs)
    packed = pack(torch.ones(outputs, inputs, 1, 1, 1), tile)
    assert packed.shape[1] % tile.width == 0
    assert packed.sum().item() == outputs * inputs


@pytest.mark.parametrize("channels", [1, 24, 96])
@pytest.mark.parametrize("silu", [True, False])
def test_chain(channels: int, silu: bool):
    source, factor, term = frames(50, channels), frames(channels), 0.25
    expected = F.normalize(source, dim=1, eps=1e-12) * factor + term
    found = torch.empty_like(source)
    triton_chain.run(source, found, normalize=1e-12, times=factor, plus=term, silu=silu)
    assert error(found, F.silu(expected) if silu else expected) < 1e-6  # float32 rounding of a few steps


def test_a_chain_without_a_norm():
    source, factor = frames(10, 16), 3.0
    found = torch.empty_like(source)
    triton_chain.run(source, found, times=factor)
    assert error(found, source * factor) < 1e-6


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 4, 300, 16), (3, 1, 1, 96)])
def test_rows_are_copied_into_a_larger_buffer(size: tuple[int, ...]):
    source = frames(size[0] + 1, size[1], size[2], size[3])[1:]
    buffer = torch.full((size[0] + 2, size[1] + 1, size[2] + 2, size[3]), -7.0)
    expected = buffer.clone()
    expected[2:, 1:, 1:-1] = source
    out = buffer[2:, 1:, 1:-1]
    assert triton_copy.fits(source)
    assert triton_copy.fits(out)
    triton_copy.run(source, out)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("channels", [5, 128])
@pytest.mark.parametrize("to_pixels", [True, False])
def test_pixels_and_channels_change_places(channels: int, to_pixels: bool):
    sizes = (2, channels, 2, 2, 4, 3, 2, 5)  # channels, pixels within a place, places
    within = frames(2, 3, 2, 5, channels, 2, 2, 4).permute(0, 4, 5, 6, 7, 1, 2, 3)
    apart = frames(2, 3, 2, 2, 2, 5, 4, channels).permute(0, 7, 2, 4, 6, 1, 3, 5)
    source, out = (within, torch.zeros_like(apart)) if to_pixels else (apart, torch.zeros_like(within))
    assert source.shape == out.shape == sizes
    shuffle = triton_copy.shuffle_of(sizes, source.stride(), out.stride())
    assert shuffle is not None
    triton_copy.run_shuffle(source, out, shuffle)
    assert torch.equal(out, source)
    assert triton_copy.shuffle_of(sizes, source.stride(), source.contiguous().stride()) is None


@pytest.mark.parametrize("shape", [(2, 8, 5, 6, 7), (3, 8, 7, 9)])
@pytest.mark.parametrize("modes", [("constant", "reflect"), ("replicate", "replicate"), ("reflect", "constant")])
def test_a_border_is_filled_in_one_pass(
    shape: tuple[int, ...], modes: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(support, "supports", lambda _: True)
    monkeypatch.setattr(copies, "_MANY", 1)
    dims = range(2, len(shape))
    fills = {dim: Fill(modes[dim > 2], 0.5 * dim) for dim in dims}
    valid = [(0, shape[0]), (0, shape[1]), *((1 + (dim == 3), shape[dim] - (dim > 2)) for dim in dims)]
    found, expected = channels_last(frames(*shape)), channels_last(frames(*shape))
    assert copies.fill(found, valid, fills)
    there = list(valid)
    for dim, each in fills.items():
        fill_outside(expected, dim, there, each)
    assert torch.equal(found, expected)


def test_rows_with_gaps_are_not_copied_as_rows():
    source = frames(2, 3, 5, 7)
    assert not triton_copy.fits(source.transpose(1, 2))
    assert not triton_copy.fits(source[:, :, ::2])
    assert not triton_copy.fits(source.transpose(2, 3))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first_tap", [0, 2])
def test_a_batch_of_videos(batch: int, first_tap: int):
    source, weight, bias = video(batch, 16, 3, 6, 8), frames(20, 16, 3, 3, 3), frames(20)
    expected = F.conv3d(source, weight[:, :, first_tap:], bias, padding=(0, 1, 1))
    found = convolutions.convolve(source, weight, bias, first_tap=first_tap, stride=1, before=(1, 1), size=(6, 8))
    assert error(found, expected) < TOLERANCE
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_batch_of_pictures_upsampled():
    source, weight, bias = frames(2, 16, 4, 5), frames(20, 16, 3, 3), frames(20)
    expected = F.conv2d(F.interpolate(source, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    assert error(convolutions.convolve_upsampled(source, weight, bias), expected) < TOLERANCE


@pytest.mark.parametrize("bordered", [(2,), (3,), (2, 3)])
def test_a_picture_upsampled_with_its_neighbours_rows(bordered: tuple[int, ...]):
    source, weight, bias = frames(1, 16, 6, 5), frames(20, 16, 3, 3), frames(20)
    whole = F.conv2d(F.interpolate(source, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    rows, cols = (slice(2, -2) if dim in bordered else slice(None) for dim in (2, 3))
    assert error(convolutions.convolve_upsampled(source, weight, bias, bordered), whole[:, :, rows, cols]) < TOLERANCE


@pytest.mark.parametrize("pads", [{}, {2: (2, 0), 3: (1, 1), 4: (1, 1)}, {3: (0, 1), 4: (0, 1)}])
def test_joined_and_padded_in_low_precision(pads: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolutions, "FEW_POSITIONS", 1)
    parts = (video(1, 24, 2, 10, 12, dtype=torch.float16), video(1, 24, 1, 10, 12, dtype=torch.float16))
    weight, bias = frames(8, 24, 3, 3, 3).half(), frames(8).half()
    stride = (1, 2, 2) if pads.get(3) == (0, 1) else (1, 1, 1)
    joined = Joined(parts, pads=pads)
    whole = F.pad(torch.cat(parts, 2), [p for dim in (4, 3, 2) for p in pads.get(dim, (0, 0))])
    expected = F.conv3d(whole.float(), weight.float(), bias.float(), stride)
    found = on_gpu(joined, Convolution(weight, bias, stride, (1, 1, 1)))
    assert error(found.float(), expected) < 2**-10  # one rounding; the interpreter has no products of bfloat16


def test_a_bias_waits_for_what_follows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convolutions, "convolves", lambda *_: False)
    source, weight, bias = video(1, 16, 3, 6, 8), frames(8, 16, 3, 3, 3), frames(8)
    found = on_gpu(Joined((source,)), Convolution(weight, bias, (1, 1, 1), (1, 1, 1)))
    assert isinstance(recipe_of(found), Chain)
    assert error(found, F.conv3d(source, weight, bias)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 24, 2, 3, 4), (2, 24, 3, 4)])
def test_a_chain_of_a_picture(shape: tuple[int, ...], dtype: torch.dtype):
    source = frames(*shape).to(dtype)
    gamma = frames(24, *[1] * (len(shape) - 2))
    steps = [Step("normalize", (1, 1e-12)), Step("times", 3 * gamma), Step("plus", 0.5), Step("silu")]
    expected = F.silu(F.normalize(source.float(), dim=1) * 3 * gamma + 0.5)
    found = fused.chain(source, dtype, torch.float32, steps)
    assert error(found.float(), expected) < (1e-6 if dtype == torch.float32 else 2**-7)
    assert found.dtype == dtype


def test_a_bias_and_a_sum_before_the_norm():
    source, other = video(1, 24, 2, 3, 4), frames(1, 24, 2, 3, 4) + 1
    bias, gamma = frames(24, 1, 1, 1), frames(24, 1, 1, 1) + 2
    steps = [Step("plus", bias), Step("normalize", (1, 1e-12)), Step("times", gamma), Step("plus", 0.5), Step("silu")]
    expected = F.silu(F.normalize(source + bias, dim=1) * gamma + 0.5)
    assert error(fused.chain(source, torch.float32, torch.float32, steps), expected) < 1e-6
    found = fused.sum_of(source, torch.float32, torch.float32, steps[:1], other)
    assert found is not None
    assert error(found, source + bias + other) < 1e-6
    assert fused.sum_of(source, torch.float32, torch.float32, steps, other) is None


def test_a_promise_that_was_read_is_its_value():
    promise = promised(video(1, 4, 1, 3, 5))
    assert kept(promise) is None
    promise.recipe.value = value = video(1, 4, 1, 3, 5)
    assert kept(promise) is value
    promise.computed()
    assert kept(promise) is value


def test_a_chain_of_another_form_is_computed_step_by_step():
    source = frames(1, 4, 2, 3)
    steps = [Step("silu"), Step("times", 2.0)]
    assert error(fused.chain(source, torch.float32, torch.float32, steps), F.silu(source) * 2) < 1e-6


@pytest.mark.parametrize("shape", [(1, 4, 2, 3, 5), (1, 4, 1, 3, 5), (1, 20, 3, 4, 6), (2, 8, 5, 7)])
@pytest.mark.parametrize("fill", [Fill(), Fill("replicate")])
def test_what_a_chain_gives_is_joined_and_padded_where_it_lies(shape: tuple[int, ...], fill: Fill):
    def made() -> Tensor:
        with room_around.leaving_room():
            return fused.chain(channels_last(frames(*shape)), torch.float32, torch.float32, [Step("silu")])

    def around(dim: int, size: int) -> Tensor:
        return channels_last(frames(*(size if d == dim else length for d, length in enumerate(shape))) + dim)

    store.kept().rooms.clear()
    whole, last, source = made(), len(shape) - 1, channels_last(frames(*shape))
    waited: list[int] = []
    halo = Halo(last, around(last, 1), around(last, 2), lambda: waited.append(1))
    edge = around(2, 1)
    in_time = [Joined((edge, whole)), *([Joined((edge, whole, edge))] if shape[2] > 1 else [])] if last == 4 else []
    for joined in (Joined((whole,)), *in_time, Joined((whole,), halo=halo)):
        for pads in ({}, {last - 1: (1, 1)}, {last: (1, 0)}, {last - 1: (2, 1), last: (0, 1)}):
            padded = joined.padded(pads, fill)
            assert padded is not None
            if padded.is_bare and len(padded.parts) == 1:
                continue
            expected = padded.slab(-2, (0, padded.shape[-2]), torch.float32, True)
            assert torch.equal(padded.settled(), expected)  # by a copy; the next one has room
            roomy = made()
            assert torch.equal(roomy, whole)
            alone = fused.chain(source, torch.float32, torch.float32, [Step("silu")])
            assert alone.is_contiguous(memory_format=memory_format(len(shape), True))
            parts = tuple(roomy if part is whole else part for part in padded.parts)
            found = replace(padded, parts=parts).settled()
            assert torch.equal(found, expected)
            assert found.untyped_storage().data_ptr() == roomy.untyped_storage().data_ptr()
    assert waited


def test_operators_of_the_kernels_do_what_these_do():
    """Trials run them, so that predictions know how long they take."""
    source, bias = frames(2, 5, 7, 16), frames(20)
    weight = frames(20, 16, 1, 3, 3)
    tile = tile_for(16, 20)
    packed = pack(weight, tile)
    expected = torch.empty(2, 5, 7, 20)
    convolve(source, packed, bias, tile, kernel=(1, 3, 3), stride=1, before=(1, 1), out=expected)
    found = torch.zeros_like(expected)
    pictures, out = source.movedim(-1, 1), found.movedim(-1, 1)
    operators.convolve(pictures, packed, bias, kernel=(1, 3, 3), stride=1, before=(1, 1), out=out)
    assert torch.equal(found, expected)

    rows = source.reshape(-1, 16)
    by_kernel, by_operator = torch.empty_like(rows), torch.zeros_like(rows)
    scale = frames(16)
    triton_chain.run(rows, by_kernel, normalize=1e-12, times=scale, silu=True)
    operators.chain(rows, by_operator, normalize=1e-12, times=scale, silu=True)
    assert torch.equal(by_operator, by_kernel)

    copied = torch.zeros_like(source)
    operators.copy(pictures, copied.movedim(-1, 1))
    assert torch.equal(copied, source)

    moments = triton_norms.moments(rows[None], 4)
    assert torch.equal(torch.ops.halovae.gpu_moments(rows[None], 4, None), moments)
    assert torch.equal(torch.ops.halovae.gpu_merged_moments(moments, 4), triton_norms.merged(moments, 4))
    affine = triton_norms.affine(moments, 4, 16, scale, None, 1e-6)
    assert torch.equal(torch.ops.halovae.gpu_affine(moments, 4, 16, scale, None, 1e-6), affine)


@pytest.mark.parametrize("found", ["moments", "merged", "affine"])
def test_operators_of_statistics_tell_their_shapes(found: str):
    def run(rows: Tensor) -> Tensor:
        parts = operators.moments(rows, 4, None)
        if found == "moments":
            return parts
        return operators.merged(parts, 4) if found == "merged" else operators.affine(parts, 4, 48, None, None, 0)

    rows = frames(2, 5000, 48)
    assert run(rows.to("meta")).shape == run(rows).shape


def test_three_channels_are_read_with_their_neighbours():
    source, weight, bias = video(2, 3, 4, 6, 8), frames(20, 3, 3, 3, 3), frames(20)
    expected = F.conv3d(source, weight[:, :, 1:], bias, padding=(0, 1, 1))
    found = convolutions.convolve(source, weight, bias, first_tap=1, stride=1, before=(1, 1), size=(6, 8))
    assert error(found, expected) < TOLERANCE
    expected = F.conv3d(F.pad(source, (2, 0)), weight, bias)
    found = convolutions.convolve(source, weight, bias, first_tap=0, stride=1, before=(0, 2), size=(4, 8))
    assert error(found, expected) < TOLERANCE


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="for Hopper alone"
)
@pytest.mark.parametrize(("kernel", "up", "before"), [(3, 1, (1, 1)), (3, 1, (0, 1)), (2, 2, (1, 1)), (2, 2, (0, 1))])
def test_patches_do_what_the_other_kernel_does(kernel: int, up: int, before: tuple[int, int]):
    from halovae.kernels.gpu import gluon_patches

    source, bias = (frames(*shape).bfloat16().cuda() for shape in ((4, 37, 45, 64), (96,)))
    rows = {(3, 1): 37, (3, 0): 35, (2, 1): 37, (2, 0): 35}[kernel, before[0]]
    times = 2 if kernel == 3 else 1
    packed = (frames(up * up * times * kernel * kernel * 64, 96) / 30).bfloat16().cuda()
    packed = packed.view(up * up, -1, 96) if up == 2 else packed
    out = torch.zeros(4 - times + 1, rows * up, 45 * up, 96, dtype=torch.bfloat16, device="cuda")
    geometry: Any = {"kernel": (times, kernel, kernel), "before": before, "upsample": up}
    assert gluon_patches.fits(source, packed, geometry["kernel"], 1, out)
    gluon_patches.run(source, packed, bias, out=out, **geometry)
    expected = torch.zeros_like(out)
    triton_convolution._launch(source, packed, bias, tile_for(64, 96), stride=1, out=expected, **geometry)
    assert error(out.float(), expected.float()) < 2**-7  # one rounding


@pytest.mark.parametrize("program", ["compile_gpu_kernels.py", "compile_ahead.py"])
def test_kernels_compile_for_a_device(program: str, tmp_path: Path):
    """The interpreter takes what the compiler refuses; the compiler needs no device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if program == "compile_ahead.py":
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run(
        [sys.executable, Path(__file__).parent / program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr
