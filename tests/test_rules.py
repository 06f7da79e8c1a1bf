"""Every operator with a rule, on shards and whole, in float64; and every kind of operator without one, refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shards import GRID, check, draw, heads, image, tokens, video
from torch import Tensor, nn

VIEWS: dict[str, Any] = {
    "by plain numbers": lambda x: x.view(2, 4, int(x.shape[2]) // 2, 2, 18).reshape(2, -1, int(x.shape[3])),
    "by the numbers of a flattened view": lambda x: x.flatten(2).reshape(2, 4, len(x.flatten(2)[0, 0]) // 18, 18),
    "expand to the width": lambda x: x.mean(3, keepdim=True).expand(-1, -1, -1, x.shape[3]) + x,
    "expand to plain numbers": lambda x: x.mean((2, 3), keepdim=True).expand(3, 2, -1, 12, 18) + x,
    "expand an ordinary tensor": lambda x: draw(4, 1, 1).expand(x.shape) + draw(1, 18).expand_as(x) * x,
    "an ordinary tensor, reshaped": lambda x: draw(864 * 2).reshape_as(x) + x + draw(864).view(*x.shape[1:]),
    "flatten": lambda x: x.flatten(2),
    "patchify": lambda x: (
        x.reshape(2, 4, x.shape[2] // 2, 2, x.shape[3] // 2, 2).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    ),
    "patchify with view": lambda x: x.view(2, 4, -1, 2, x.size(3) // 2, 2).permute(0, 5, 3, 1, 2, 4),
    "unpatchify": lambda x: (
        x.view(2, 1, 2, 2, *x.shape[2:]).permute(0, 1, 4, 2, 5, 3).reshape(2, 1, x.shape[2] * 2, -1)
    ),
    "rows to batch and back": lambda x: (
        x.transpose(1, 2).reshape(-1, 4, x.shape[3]).unflatten(0, (2, -1)).transpose(1, 2)
    ),
    "tokens and back": lambda x: tokens(x).transpose(1, 2).reshape(x.shape),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "view of a cropped shard": lambda x: x.permute(0, 1, 3, 2).contiguous().view(2, 4, x.shape[3] * x.shape[2]),
    "permute by a list": lambda x: torch.permute(x, dims=[0, 1, 3, 2]),
    "movedim": lambda x: x.movedim(1, -1),
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(2, 3),
    "squeeze and unsqueeze": lambda x: x[:, :1].squeeze(1).unsqueeze(2),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "expand_as": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) if False else x[:, :1].expand_as(x),
    "repeat channels": lambda x: x.repeat(1, 3, 1, 1),
    "repeat batch": lambda x: x.repeat(2, 1, 1, 1, 1),
    "repeat_interleave channels": lambda x: x.repeat_interleave(3, dim=1),
    "repeat_interleave rows": lambda x: x.repeat_interleave(2, dim=2),
    "repeat_interleave by keywords": lambda x: torch.repeat_interleave(x, repeats=2, dim=-1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "flip channels": lambda x: x.flip(1),
    "flip channels by list": lambda x: torch.flip(x, [0, 1]),
    "contiguous": lambda x: x.permute(0, 2, 3, 1).contiguous(),
}

INDEXING: dict[str, Any] = {
    "chunk": lambda x: x.chunk(2, dim=1),
    "chunk by position": lambda x: torch.chunk(x, 2, 1),
    "split": lambda x: x.split([1, 3], dim=1),
    "split of the batch": lambda x: x.split(1),
    "tensor_split": lambda x: x.tensor_split(3, dim=1),
    "unbind": lambda x: x.unbind(1),
    "iterate": lambda x: list(x),
    "select": lambda x: x.select(1, 2),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "narrow of everything": lambda x: x.narrow(2, 0, x.shape[2]),
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "slices": lambda x: x[:, 1:3],
    "ellipsis": lambda x: x[..., :, :],
    "new dims": lambda x: x[:, None, :, None],
    "an int": lambda x: x[0],
    "a list of channels": lambda x: x[:, [2, 0]],
    "a mask of channels": lambda x: x[:, torch.tensor([True, False, True, True])],
    "up to the height": lambda x: x[:, :, : x.shape[2], : x.size(-1)],
    "beyond the height": lambda x: x[:, :, :100],
    "set channels": lambda x: (y := x.clone(), y.__setitem__((slice(None), 0), x[:, 1]))[0],
    "set to a number": lambda x: (y := x.clone(), y.__setitem__((slice(None), slice(1, 3)), 7.0))[0],
    "set to an ordinary tensor": lambda x: (y := x.clone(), y.__setitem__((slice(None), 0), draw(12, 18)))[0],
    "cat with an ordinary tensor": lambda x: torch.cat([x, draw(2, 1, 12, 18), x.new_full((2, 1, 12, 18), 2.0)], 1),
    "stack of an ordinary tensor": lambda x: torch.stack([x, draw(2, 4, 12, 18)]),
    "cat of a row that is whole": lambda x: torch.cat([x, x.mean(3, keepdim=True).expand(-1, -1, -1, 18)], 1),
    "set to the height": lambda x: (y := x.clone(), y.__setitem__((0,), x.shape[2]))[0],
    "fill a blank": lambda x: (y := torch.zeros(x.shape, dtype=x.dtype), y.__setitem__((slice(None), 1), x[:, 1]))[0],
    "fill a blank wholly": lambda x: (y := x.new_empty(x.shape), y.__setitem__(slice(None), x))[0],
    "cat channels": lambda x: torch.cat([x, x.exp()], dim=1),
    "cat by axis": lambda x: torch.cat((x, x), axis=-3),
    "cat with a blank": lambda x: torch.cat([x, torch.zeros(2, 1, *x.shape[2:], dtype=x.dtype)], 1),
    "cat with an empty cache": lambda x: torch.cat([torch.zeros(0, dtype=x.dtype), x], 1),
    "cat of a halo": lambda x: torch.cat([F.pad(x, (1, 1, 1, 1)), F.pad(x, (2, 0, 0, 2))], 1),
    "stack": lambda x: torch.stack([x, 2 * x], dim=-3),
    "stack at the end": lambda x: torch.stack([x, 2 * x], -1),
}  # fmt: skip

ELEMENTWISE: dict[str, Any] = {
    "arithmetic": lambda x: 1 - (x + 1) * x / (2 + x.abs()) ** 2 - x // 2 + x % 0.7,
    "in place": lambda x: x.clone().add_(1).mul_(x).clamp_(-1, 1).sub_(x[:, :1]),
    "+=": lambda x: (y := x.clone(), y.__iadd__(x))[1],
    "per channel": lambda x: x * torch.arange(4.0, dtype=x.dtype).view(1, 4, 1, 1),
    "per row statistics": lambda x: x - x.mean(1, keepdim=True),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where with numbers": lambda x: torch.where(x > 0, 1.0, x),
    "masked_fill": lambda x: x.masked_fill(x < 0, -1.0),
    "activations": lambda x: F.silu(F.gelu(F.leaky_relu(F.softplus(F.relu(x) - x.tanh()))), inplace=True),
    "clamp by tensors": lambda x: x.clamp(min=-torch.ones(1, 4, 1, 1, dtype=x.dtype)),
    "lerp": lambda x: torch.lerp(x, x.exp(), 0.3),
    "copy_": lambda x: torch.empty_like(x).copy_(x.flip(1)),
    "copy_ into a blank": lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
    "fill_ and zero_": lambda x: x.clone().fill_(3.0) + x.clone().zero_(),
    "dtypes": lambda x: x.float().double().to(torch.float64).type_as(x) + (x > 0).to(x),
    "ones plus": lambda x: x + torch.ones(2, 1, *x.shape[-2:], dtype=x.dtype),
    "full plus": lambda x: x + x.new_full(x.shape, 2.0) + torch.full_like(x, 1.0),
    "detach": lambda x: x.detach().clone().requires_grad_(False),
    "comparisons": lambda x: (x > x.flip(1)) & ~(x == 0) | x.isnan(),
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "coordinates": lambda x: x + torch.arange(x.shape[3]) * torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)[:, None],
    "coordinates of a grid": lambda x: x
    * torch.stack(torch.meshgrid(torch.arange(x.shape[2]), torch.arange(int(x.shape[3])), indexing="ij")).sum(0),
    "coordinates of tokens": lambda x: tokens(x) + torch.arange(x.shape[2] * x.shape[3])[:, None],
    "coordinates, of rows that have a halo": lambda x: F.pad(x, (1, 1, 1, 1)) * torch.arange(14)[:, None],
    "coordinates in a blank": lambda x: (
        x + torch.zeros(x.shape[-2:], dtype=x.dtype).add_(torch.arange(x.shape[3]))
    ),
    "an ordinary tensor": lambda x: draw(2, 1, 12, 18, seed=1) * x - draw(12, 1, seed=2),
    "an ordinary tensor where a row is whole": lambda x: x.mean(2, keepdim=True).expand(-1, -1, 12, -1) * draw(12, 18),
    "copy_ of an ordinary tensor": lambda x: torch.empty_like(x).copy_(draw(2, 4, 12, 18)),
    "noise of a size in numbers": lambda x: (
        x + torch.randn(2, 4, 12, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    ),
    "halos meet": lambda x: F.pad(x, (1, 1, 1, 1)) * F.pad(x, (2, 0, 1, 1)),
    "a shard of other bounds": lambda x: F.conv2d(x, torch.ones(4, 4, 2, 2, dtype=x.dtype), padding=1)[:, :4]
    + F.pad(x, (0, 1, 0, 1)),
    "fractional sizes": lambda x: x * (x.shape[2] / x.shape[3]) * x.shape[2] ** -0.5 * math.sqrt(x.size(2) * x.size(3)),
    "size as a value": lambda x: x * x.shape[2] + x.size(3) - torch.tensor(x.shape[2]),
    "count by hand": lambda x: x - x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3]),
    "count by hand, without keepdim": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "numel": lambda x: x * x.numel() / 100 - x.sum() / x.numel(),
}  # fmt: skip

REDUCTIONS: dict[str, Any] = {
    "sum": lambda x: x.sum(),
    "sum of rows": lambda x: x.sum(2),
    "sum of rows, keepdim": lambda x: torch.sum(x, dim=-2, keepdim=True),
    "sum by input": lambda x: torch.sum(input=x, dim=(2, 3)),
    "sum by axis": lambda x: x.sum(axis=(0, 3)),
    "sum of bools": lambda x: (x > 0).sum((2, 3)),
    "sum of all bools": lambda x: (x > 0).sum(),
    "sum of ints": lambda x: (x * 10).int().sum(3),
    "sum as another dtype": lambda x: x.float().sum((2, 3), dtype=torch.float64),
    "mean": lambda x: x.mean(),
    "mean of channels": lambda x: x.mean(1),
    "mean of the picture": lambda x: x.mean(dim=(-2, -1), keepdim=True),
    "mean of everything behind the batch": lambda x: x.flatten(2).mean(1),
    "mean with a halo": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0).mean((2, 3)),
    "max of channels": lambda x: x.max(dim=1),
    "max by position": lambda x: x.max(1)[0],
    "argmax of channels": lambda x: x.argmax(1),
    "amax of the batch": lambda x: x.amax(0, keepdim=True),
    "softmax of rows": lambda x: x.softmax(-2),
    "softmax of tokens": lambda x: F.softmax(tokens(x), dim=1),
    "log_softmax of columns": lambda x: F.log_softmax(x.float(), dim=3, dtype=torch.float64),
    "softmax of what is hidden": lambda x: x.masked_fill(torch.arange(12)[:, None] < 5, -math.inf).softmax(2),
    "softmax of channels": lambda x: F.softmax(x, dim=1),
    "softmax by position": lambda x: x.softmax(1),
    "cumsum of channels": lambda x: x.cumsum(1),
    "topk of channels": lambda x: x.topk(2, 1),
    "topk by keyword": lambda x: torch.topk(x, k=2, dim=1).values,
    "sort of channels": lambda x: x.sort(dim=1, descending=True)[0],
    "norm of channels": lambda x: x.norm(dim=1),
    "norm of an order": lambda x: x.norm(2, 1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 2, 1, True),
    "std of channels": lambda x: x.std(1),
    "var of channels": lambda x: torch.var(x, dim=1, keepdim=True, correction=0),
    "normalize": lambda x: F.normalize(x, dim=1),
    "all and any of channels": lambda x: (x > 0).any(1) & (x < 2).all(dim=1),
    "cdist to codes": lambda x: torch.cdist(x.permute(0, 2, 3, 1).reshape(-1, 4), draw(5, 4, seed=3)).unflatten(
        0, (2, x.shape[2], x.shape[3])
    ),
    "embedding of the nearest code": lambda x: F.embedding(x.argmax(1), draw(4, 3, seed=3)),
}  # fmt: skip

NORMS: dict[str, Any] = {
    "group norm": lambda x: F.group_norm(x, 2, draw(4, seed=1), draw(4, seed=2)),
    "group norm without scales": lambda x: F.group_norm(x, 4, eps=1e-3),
    "group norm module": nn.GroupNorm(2, 4).double(),
    "group norm of rows as batch": lambda x: F.group_norm(x.transpose(1, 2).reshape(-1, 4, x.shape[3]), 2)
    .unflatten(0, (2, x.shape[2]))
    .transpose(1, 2),
    "group norm of tokens": lambda x: F.group_norm(x.flatten(2), 2),
    "group norm of pixels": lambda x: F.group_norm(tokens(x).flatten(0, 1), 2).unflatten(0, (2, -1)),
    "layer norm of channels": lambda x: F.layer_norm(x.movedim(1, -1), (4,), draw(4, seed=1)),
    "rms norm": lambda x: F.rms_norm(x.movedim(1, -1), (4,)),
    "batch norm": lambda x: F.batch_norm(x, torch.ones(4, dtype=x.dtype), torch.full((4,), 2.0, dtype=x.dtype)),
}  # fmt: skip


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Without the fused function, as diffusers' simplest processors do it: `[batch, tokens, channels]`."""
    blank = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype) if mask is None else mask
    scores = torch.baddbmm(blank, query, key.transpose(-1, -2), beta=int(mask is not None), alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), value)


def sliced_attention(x: Tensor) -> Tensor:
    """One head after the other."""
    query = tokens(x)
    result = torch.zeros((query.shape[0], query.shape[1], 4), dtype=x.dtype)
    for i in range(query.shape[0]):
        result[i : i + 1] = plain_attention(*[query[i : i + 1]] * 3)
    return result


PRODUCTS: dict[str, Any] = {
    "linear over channels": lambda x: F.linear(tokens(x), draw(5, 4, seed=1), draw(5, seed=2)),
    "matmul with weights": lambda x: tokens(x) @ draw(4, 5, seed=1),
    "weights by a picture": lambda x: draw(5, 4, seed=1) @ x.flatten(2),
    "queries by keys": lambda x: (tokens(x) @ x.flatten(2)).softmax(-1) @ tokens(x),
    "keys by queries": lambda x: x.flatten(2) @ ((tokens(x) * 2) @ (x.flatten(2) + 1)).softmax(-1).transpose(-1, -2),
    "keys by queries, weighted by sums": lambda x: x.flatten(2)
    @ (lambda scores: scores / scores.sum(1, keepdim=True))((tokens(x) @ x.flatten(2)).exp()),
    "plain attention": lambda x: plain_attention(tokens(x), tokens(x) + 1, tokens(x) * 2),
    "plain attention with a mask": lambda x: plain_attention(*[tokens(x)] * 3, mask=draw(1, 216, 216)),
    "plain attention, keys first": lambda x: (
        torch.bmm(tokens(x), x.flatten(2)).softmax(-2).transpose(1, 2).contiguous() @ tokens(x)
    ),
    "plain attention of rows": lambda x: plain_attention(*[x.movedim(1, 3).flatten(0, 1)] * 3).unflatten(0, (2, 12)),
    "sliced attention": sliced_attention,
    "baddbmm over tokens": lambda x: torch.baddbmm(draw(4, 1), x.flatten(2), tokens(x), beta=2, alpha=0.5),
    "mm": lambda x: torch.mm(x[0].flatten(1).t(), draw(4, 3)),
    "rows by an ordinary batch": lambda x: x.permute(2, 0, 1, 3).flatten(1, 2) @ draw(12, 18, 3),
    "linear attention": lambda x: (x.flatten(2) @ tokens(x)) @ x.flatten(2),
    "bmm by keyword": lambda x: torch.bmm(x.flatten(2), mat2=tokens(x)),
    "attention over channels": lambda x: torch.matmul(x.flatten(2), other=tokens(x)).softmax(-1) @ x.flatten(2),
    "attention": lambda x: F.scaled_dot_product_attention(heads(x), heads(x) + 1, heads(x) * 2),
    "attention, scaled": lambda x: F.scaled_dot_product_attention(heads(x), heads(x), value=heads(x), scale=0.3),
    "attention over rows": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 3, 2, 1)] * 3),
    "attention over columns": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 1)] * 3),
    "one query for all": lambda x: F.scaled_dot_product_attention(draw(2, 1, 4, seed=1), tokens(x), tokens(x)),
    "keys from outside": lambda x: F.scaled_dot_product_attention(tokens(x), draw(2, 7, 4), draw(2, 7, 4, seed=1)),
    "attention of a halo": lambda x: F.scaled_dot_product_attention(*[tokens(F.pad(x, (0, 0, 1, 1), value=1.0))] * 3),
}  # fmt: skip

TABLES = VIEWS | INDEXING | ELEMENTWISE | REDUCTIONS | NORMS | PRODUCTS


@pytest.mark.parametrize("call", TABLES.values(), ids=TABLES.keys())
def test_on_an_image(call: Any) -> None:
    check(call, (image(),), GRID)


def per_pixel(x: Tensor) -> Tensor:
    """[batch * height * width, frames, channels]"""
    return x.permute(0, 3, 4, 2, 1).flatten(0, 2)


def nothing(x: Tensor) -> Tensor:
    """A video without frames, taken apart and put together, as the first chunk of a causal network may be."""
    b, c, t, h, w = x.shape
    y = x + F.group_norm(F.pad(x, (1, 1, 1, 1)), 2).mean((3, 4), keepdim=True)
    f, g, v = t // 2, h // 2, w // 2
    y = y.view(b, c, f, 2, g, 2, v, 2).permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(b, 8 * c, f, g, v)
    y = y.view(b, 2, 4, c, t, g, v).mean(1).flatten(1, 2).reshape(b, 16, 0, g, v)
    y = y.view(b, c, 2, 2, t, g, v).permute(0, 1, 4, 5, 2, 6, 3).reshape(b, c, t, h, w)
    z = F.scaled_dot_product_attention(*[y.permute(0, 2, 3, 4, 1).flatten(2, 3)] * 3).unflatten(2, (h, w))
    return (y + z.permute(0, 4, 1, 2, 3)).transpose(1, 2).flatten(0, 1).unflatten(0, (b, t)).transpose(1, 2)


VIDEO: dict[str, Any] = {
    "attention in time": lambda x: F.scaled_dot_product_attention(*[per_pixel(x)] * 3, is_causal=True).unflatten(
        0, (1, x.shape[3], x.shape[4])
    ),
    "attention in time, masked": lambda x: F.scaled_dot_product_attention(
        *[per_pixel(x)] * 3, attn_mask=torch.full((3, 3), float("-inf")).triu(1).to(x)
    ),
    "attention per frame": lambda x: F.scaled_dot_product_attention(*[x.permute(0, 2, 3, 4, 1).flatten(2, 3)] * 3),
    "attention over everything": lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3),
    "frames as batch": lambda x: F.group_norm(x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (1, 3)),
    "group norm": lambda x: F.group_norm(x, 2),
    "frames one by one": lambda x: torch.stack([frame * 2 for frame in x.unbind(2)], dim=2),
    "last frames": lambda x: x[:, :, -2:].clone(),
    "frames, repeated": lambda x: torch.cat([x[:, :, :1], x.repeat_interleave(2, dim=2)], dim=2),
    "no frames": lambda x: torch.cat([nothing(x[:, :, :0]), x[:, :, :1], F.silu(x[:, :, 3:]) * x[:, :, :0]], dim=2),
    "time to channels": lambda x: x.transpose(1, 2).reshape(1, -1, *x.shape[3:]),
}


@pytest.mark.parametrize("call", VIDEO.values(), ids=VIDEO.keys())
def test_on_a_video(call: Any) -> None:
    check(call, (video(),), GRID)
