"""What rules must not do: guess. Masks, sizes that decide, random numbers, and everything that is refused."""

from __future__ import annotations

import copy
import json
import math
import operator
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import GRID, assert_same, check, draw, image, on_shards, picture_bounds, tokens, video
from torch import Tensor, nn

from halovae.base.errors import NotExactError
from halovae.base.functions import named, writes
from halovae.exact.run import Bounds
from halovae.exact.shard_mode import RULES, rule


def frame_mask_by_rows(frames: int, size: int, like: Tensor) -> Tensor:
    """As HunyuanVideo 1.5 builds it: row after row."""
    mask = torch.full((frames * size, frames * size), float("-inf"), dtype=like.dtype, device=like.device)
    for i in range(frames * size):
        mask[i, : (i // size + 1) * size] = 0
    return mask.unsqueeze(0).expand(1, -1, -1)


def frame_mask_by_grid(frames: int, size: int, like: Tensor) -> Tensor:
    """As HunyuanVideo builds it: from the frame number of each token."""
    numbers = torch.arange(1, frames + 1, dtype=torch.int32).repeat_interleave(size)
    rows, columns = torch.meshgrid(numbers, numbers, indexing="ij")
    return torch.where(columns <= rows, 0, float("-inf")).to(dtype=like.dtype).unsqueeze(0).expand(1, -1, -1)


def boolean_mask_by_grid(frames: int, size: int, like: Tensor) -> Tensor:
    numbers = torch.arange(frames).repeat_interleave(size)
    rows, columns = torch.meshgrid(numbers, numbers, indexing="ij")
    return rows >= columns


MASKS = [frame_mask_by_rows, frame_mask_by_grid, boolean_mask_by_grid]


@pytest.mark.parametrize("build", MASKS)
def test_frame_causal_attention(build: Any) -> None:
    def call(x: Tensor) -> Tensor:
        mask = build(x.shape[2], x.shape[3] * x.shape[4], x)
        assert mask.stride(-1) == 0 or type(x.shape[3]) is int  # on shards it is never written out
        return F.scaled_dot_product_attention(*[tokens(x)] * 3, attn_mask=mask)

    check(call, (video(),), GRID)


REFUSED_MASKS: dict[str, tuple[Any, str]] = {
    "not causal": (lambda m: m.transpose(-1, -2), "transpose"),
    "inverted": (lambda m: m <= -1, "not frame-causal"),
    "of a sum": (lambda m: m.sum(-1), "sum"),
    "with a full mask": (lambda m: m + torch.zeros(3, 3), "meets a tensor"),
    "softened": (lambda m: torch.where(m == 0, 0.0, -1e4), "not frame-causal"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED_MASKS.values(), ids=REFUSED_MASKS.keys())
def test_other_masks_are_refused(change: Any, reason: str) -> None:
    def call(x: Tensor) -> Tensor:
        mask = change(frame_mask_by_grid(x.shape[2], x.shape[3] * x.shape[4], x))
        return F.scaled_dot_product_attention(*[tokens(x)] * 3, attn_mask=mask)

    with pytest.raises(NotExactError, match=reason):
        on_shards(call, (video(),), GRID)


@settings(max_examples=8, deadline=None)
@given(picture_bounds(), st.sampled_from([1, 2, 4]))
def test_group_norm_on_any_cut(bounds: Bounds, groups: int) -> None:
    x = 3 + 5 * draw(2, 4, bounds[0][-1], bounds[1][-1])
    check(lambda x: F.group_norm(x, groups, draw(4, seed=1), draw(4, seed=2)), (x,), bounds)


@settings(max_examples=8, deadline=None)
@given(picture_bounds())
def test_attention_on_any_cut(bounds: Bounds) -> None:
    x = draw(1, 4, bounds[0][-1], bounds[1][-1])
    check(lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3), (x,), bounds)
    check(lambda x: (tokens(x) @ x.flatten(2)).softmax(-1) @ tokens(x), (x,), bounds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_in_low_precision_is_as_near_to_the_truth_as_torch(dtype: torch.dtype) -> None:
    """Mean far from zero, where sums of squares in low precision would lose everything."""
    x = (10 + draw(2, 8, 12, 18)).to(dtype)
    truth = F.group_norm(x.double(), 2)
    allowed = 1.5 * (F.group_norm(x, 2).double() - truth).abs().max()
    for found in on_shards(lambda x: F.group_norm(x, 2), (x,), GRID):
        assert found.dtype == dtype
        assert (found.double() - truth).abs().max() <= allowed


def test_sums_in_low_precision_are_added_in_float32() -> None:
    x = torch.full((1, 1, 12, 18), 1.0, dtype=torch.bfloat16)
    for found in on_shards(lambda x: (x.sum(), x.mean()), (x,), GRID):
        assert found[0] == 216
        assert found[1] == 1


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        more = torch.rand(x.shape[-2:], generator=generator, dtype=x.dtype)[None]
        one = torch.randn((1, 4, 1, 1), generator=generator, dtype=x.dtype)
        return x + noise * more + one


def test_noise_is_drawn_for_the_whole_picture() -> None:
    check(Noisy(), (image(),), GRID)


def test_generators_that_differ_follow_the_first_rank() -> None:
    seeds = iter(range(6))

    def call(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        scale = torch.randn(1, generator=generator, dtype=x.dtype)
        return x * scale + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    found = on_shards(call, (image(),), GRID)
    for other in found[1:]:
        assert_same(other, found[0], 0.0)


def by_size(x: Tensor) -> Tensor:
    """Every number that a network makes of a size is that of the whole picture."""
    h, w = x.shape[-2:]
    assert (h > 11, h >= 12, h < 13, h == 12, h != 4) == (True,) * 5
    assert (h * w, h % 5, w % 7, -h % 5, h / w, 2 * h, h // 5, h - 1) == (216, 2, 4, 3, 12 / 18, 24, 2, 11)
    assert (h * 0.5, h**2, float(h), math.sqrt(h), divmod(h, 5)) == (6.0, 144, 12.0, math.sqrt(12), (2, 2))
    assert h + w > 29
    assert 20 - h < 9
    assert max(h, 5) == 12
    # What leaves as an ordinary number, by whatever way.
    assert (int(h), operator.index(w), round(h), h.bit_length(), h ^ 0, h >> 1, int(str(w)), float(f"{w:03d}")) == (
        12, 18, 12, 4, 12, 6, 18, 18.0
    )  # fmt: skip
    assert list(range(0, w, 6)) == [0, 6, 12]
    assert ("abcdefghijklmnop"[:h], "x" * h, [1] * w) == ("abcdefghijkl", "x" * 12, [1] * 18)
    assert json.loads(json.dumps([h, w])) == [12, 18]
    assert {(12, 18): "found", 12: "too"}[tuple(x.shape[-2:])] == "found"
    assert hash(h) == hash(12)
    assert {h, 12, x.size(2)} == {12}
    assert type(copy.deepcopy(h)) is int
    assert pickle.loads(pickle.dumps((h, w))) == (12, 18)
    # Of the tensor itself, of parts and views of it.
    assert x.shape == x.size() == (2, 4, 12, 18)
    assert f"{x.shape}" == "torch.Size([2, 4, 12, 18])"
    assert (x.shape.numel(), x.numel(), torch.numel(x), x.nelement(), math.prod(x.shape[2:])) == (*[1728] * 4, 216)
    assert (x.nbytes, x[:1].nbytes, x.stride(), x.stride(1), x.mT.contiguous().stride(2)) == (
        13824, 6912, (864, 216, 18, 1), 216, 12
    )  # fmt: skip
    assert (len(x), len(x[0, 0]), len(x[0].permute(2, 0, 1)), len(x.flatten(2)[0, 0])) == (2, 12, 18, 216)
    assert torch.zeros(h, w).shape == torch.empty(x.shape)[0, 0].shape == x.new_ones(int(h), w).shape == (12, 18)
    assert torch.tensor([h, w]).tolist() == [12, 18]
    assert torch.zeros(h, 2)[:, :1].shape[0] == 12
    assert F.interpolate(x, size=(2 * h, int(w))).shape[2:] == (24, 18)
    return x


def test_numbers_made_of_sizes_are_those_of_the_whole_picture() -> None:
    check(by_size, (image(),), GRID)


def padded_to_a_multiple(x: Tensor) -> Tensor:
    """A network pads what does not divide, though on some ranks it would."""
    rows, cols = (5 - x.shape[2] % 5) % 5, (7 - x.shape[3] % 7) % 7
    return F.avg_pool2d(F.pad(x, (0, cols, 0, rows), mode="replicate"), 3, 1, 1)[:, :, : x.shape[2] + rows]


def test_padding_to_a_multiple() -> None:
    check(padded_to_a_multiple, (image(),), GRID)


REFUSED: dict[str, tuple[Any, str]] = {
    "roll": (lambda x: x.roll(1, 2), "roll"),
    "flip rows": (lambda x: x.flip(2), "flip.*reverses"),
    "flip everything": (lambda x: torch.flip(x, (-1,)), "reverses"),
    "cumsum over rows": (lambda x: x.cumsum(2), "cumsum"),
    "fft": (lambda x: torch.fft.fft(x), "fft"),
    "argmax over rows": (lambda x: x.argmax(2), "argmax"),
    "argmax over everything": (lambda x: x.argmax(), "argmax"),
    "max over everything": (lambda x: x.max(), "max"),
    "topk over columns": (lambda x: x.topk(1), "topk"),
    "norm over columns": (lambda x: x.norm(1, 3), "norm"),
    "sort over columns": (lambda x: x.sort(), "sort"),
    "variance of everything": (lambda x: x.var(False), "var"),
    "layer norm over columns": (lambda x: F.layer_norm(x, x.shape[-1:]), "layer_norm"),
    "instance norm": (lambda x: F.instance_norm(x), "instance_norm"),
    "batch statistics": (lambda x: F.batch_norm(x, None, None, training=True), "batch statistics"),
    "active dropout": (lambda x: F.dropout(x, 0.5), "dropout is active"),
    "rows up to a constant": (lambda x: x[:, :, :4], "getitem"),
    "first columns": (lambda x: x[..., : x.shape[-1] // 2], "getitem"),
    "every second row": (lambda x: x[:, :, ::2], "getitem"),
    "one row": (lambda x: x[:, :, 0], "getitem"),
    "rows by a list": (lambda x: x[:, :, [0, 1]], "getitem"),
    "a boolean mask": (lambda x: x[x > 0], "getitem"),
    "positions as index": (lambda x: draw(4, 3)[x.argmax(1)], "getitem"),
    "positions in a tuple": (lambda x: draw(4, 3)[x.argmax(1), 0], "getitem"),
    "positions by index_select": (lambda x: draw(4, 3).index_select(0, x[0].argmax(0).flatten()), "made of shards"),
    "the larger of an ordinary tensor": (lambda x: torch.max(draw(2, 4, 12, 18), x), "knows nothing"),
    "narrow to a constant": (lambda x: x.narrow(2, 0, 4), "narrow"),
    "select a row": (lambda x: x.select(-1, 0), "select"),
    "split rows": (lambda x: x.split(6, dim=2), "split"),
    "split rows, one part here": (lambda x: x.split(100, dim=3), "split"),
    "chunk columns": (lambda x: torch.chunk(x, 2, -1), "chunk"),
    "unbind rows": (lambda x: x.unbind(2), "unbind"),
    "cat rows": (lambda x: torch.cat([x, x], dim=2), "joined along"),
    "a mask drawn by hand": (lambda x: (m := x.new_zeros(x.shape[-2:]), m[0].fill_(1), x + m), "getitem"),
    "a blank with a border": (lambda x: (m := torch.zeros(x.shape[-2:]), m.__setitem__(0, 1.0), x + m), "setitem"),
    "a blank, written through a view": (lambda x: torch.zeros(x.shape[-2:]).t()[0].fill_(1), "getitem"),
    "random numbers in a blank": (lambda x: x + torch.empty(x.shape[-2:]).normal_(), "normal_"),
    "randn_like": (lambda x: torch.randn_like(x), "randn_like"),
    "normal_": (lambda x: x.normal_(), "normal_"),
    "a shard into an ordinary tensor": (lambda x: draw(2, 4, 12, 18).__setitem__(slice(None), x), "knows nothing"),
    "a shard added to an ordinary tensor": (lambda x: draw(2, 4, 12, 18).add_(x), "knows nothing"),
    "an ordinary tensor of another size": (lambda x: x + draw(4, 6, 6), "6 positions meets 12 of the picture"),
    "all rows with all rows": (lambda x: x.sum(3)[..., None] - x.sum(3)[..., None, :], "a shard has a part only"),
    "weights of shards": (lambda x: F.linear(draw(2, 4), x.mean((0, 3)).t()), "weights are made of shards"),
    "kernels of shards": (lambda x: F.conv2d(draw(1, 2, 8, 8), x[:, :2]), "weights are made of shards"),
    "positions set in an ordinary tensor": (lambda x: draw(2, 4, 12, 18).__setitem__(x > 0, 1.0), "knows nothing"),
    "strides of a part": (lambda x: x[:, :2].stride(), "stride"),
    "out": (lambda x: torch.add(x, 1, out=torch.empty(0, dtype=x.dtype)), "out="),
    "out of cat": (lambda x: torch.cat([x, x], 1, out=torch.empty(0, dtype=x.dtype)), "out="),
    "data": (lambda x: x.data, "__get__|data"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "item": (lambda x: x[0, 0].item(), "item"),
    "torch.tensor of a shard": (lambda x: torch.as_tensor(x), "ordinary tensor"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where without values": (lambda x: torch.where(x > 0), "lists positions"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "gather": (lambda x: x.gather(2, torch.zeros(2, 4, 1, 1, dtype=torch.long)), "gather"),
    "einsum": (lambda x: torch.einsum("bchw,bchv->bcwv", x, x), "einsum"),
    "as_strided": (lambda x: x.as_strided((2, 2), (1, 1)), "as_strided"),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, x), "cosine_similarity"),
    "no view at all": (lambda x: x.view(2, 4, 7, -1), r"no view of \(2, 4, 12, 18\) as \(2, 4, 7, -1\)"),
    "view by a constant": (lambda x: x.reshape(2, 4, 2, -1, x.shape[3]), "reshape|view"),
    "view as another dtype": (lambda x: x.view(torch.int64), "dtype"),
    "repeat rows": (lambda x: x.repeat(1, 1, 2, 1), "repeated as a whole"),
    "pixel_unshuffle across a cut": (lambda x: F.pixel_unshuffle(F.pad(x, (0, 0, 0, 0)), 4), "fewer than 2|divide"),
    "product with a vector": (lambda x: x @ torch.ones(18, dtype=x.dtype), "vector|whole picture"),
    "masked attention over space": (
        lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3, attn_mask=torch.ones(1, 1)), "not by frame"
    ),
    "causal attention over space": (
        lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3, is_causal=True), "not by frame"
    ),
    "attention with dropout": (
        lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3, dropout_p=0.1), "dropout is active"
    ),
    "dtype beyond torch": (lambda x: bool((x > 0).all()), "all"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(call: Any, reason: str) -> None:
    with pytest.raises(NotExactError, match=reason):
        on_shards(call, (image(),), GRID)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 2)


def test_a_refusal_names_operator_and_submodule() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(Inner()))
    with pytest.raises(NotExactError, match=r"can't run torch\.Tensor\.roll in 1\.0 \(Inner\): no rule"):
        on_shards(network, (image(),), GRID)


def test_every_rule_is_registered_once() -> None:
    function = next(iter(RULES))
    with pytest.raises(ValueError, match="has a rule already"):
        rule(function)(lambda *args: None)


def test_a_name_that_torch_has_not_is_a_mistake() -> None:
    with pytest.raises(AttributeError, match="no function named 'tanhh'"):
        list(named("tanhh"))


def test_writes_knows_functions_that_write_in_place() -> None:
    assert all(map(writes, (Tensor.add_, Tensor.__iadd__, Tensor.copy_, torch.relu_)))
    assert not any(map(writes, (Tensor.add, Tensor.__add__, Tensor.__rsub__, Tensor.__invert__, torch.where)))
