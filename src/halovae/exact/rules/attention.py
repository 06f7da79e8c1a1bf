"""Attention and matrix products: local queries meet the keys and values of all shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.exact.halo import gather_dim, own, own_part
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    GatheredFactor,
    Layout,
    axes_in,
    is_sharded,
    layout_of,
    mark,
    plain,
    require_whole,
    shape_of,
)
from halovae.exact.registry import Mesh, rule
from halovae.exact.rules.broadcasting import broadcast
from halovae.exact.rules.elementwise import align, elementwise_layout, fit
from halovae.exact.rules.masks import block_table, is_block_mask
from halovae.exact.rules.reductions import sum_over_ranks


@rule(F.scaled_dot_product_attention)
def attention(
    mesh: Mesh,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`[..., queries, channels]` against `[..., tokens, channels]`.

    Tokens are spatial only where their dimension is sharded; one sequence per pixel needs nothing. A mask by frame
    becomes one attention per frame over the frames it sees, so it is never written out.
    """
    layouts = [layout_of(t) for t in (query, key, value)]
    if dropout_p and any(layouts):
        raise NotExactError("dropout is active: call vae.eval() first")
    if is_block_mask(attn_mask):
        assert attn_mask is not None
        return _by_frame(mesh, func, query, key, value, attn_mask, **kwargs)
    if not any(layouts):
        return func(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    if any(layout and is_sharded(layout.dims[-1]) for layout in layouts):
        raise NotExactError("the channels of an attention are sharded")
    tokens = any(layout and is_sharded(layout.dims[-2]) for layout in layouts)
    if tokens and (attn_mask is not None or is_causal):
        raise NotExactError("tokens of one attention are sharded under a mask that is not by frame")
    key, value = (gathered(mesh, tensor, -2) for tensor in (key, value))
    if attn_mask is not None and layout_of(attn_mask):
        raise NotExactError("the attention mask is sharded")
    result = func(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
    return mark(result, _query_layout(query, result))


def _query_layout(query: Tensor, result: Tensor) -> Layout | None:
    layout = layout_of(query)
    return layout and layout.replace(-1, plain(result.shape[-1]))


def gathered(mesh: Mesh, tensor: Tensor, dim: int) -> Tensor:
    """The tensor with one dimension whole on every rank."""
    layout = layout_of(tensor)
    if layout is None or not is_sharded(layout.dims[dim]):
        return tensor
    return gather_dim(mesh, tensor, layout, dim % tensor.ndim)


def _by_frame(mesh: Mesh, func: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    seen = frames_seen(block_table(mask))
    layout = layout_of(query)
    if mask.shape[-1] != (layout.whole[-2] if layout else query.shape[-2]):
        raise NotExactError("the attention mask has not the length of the query")
    local = query.shape[-2] // len(seen)
    outer = layout.dims[-2][0] if layout else None
    if outer and len(seen) > 1 and (isinstance(outer, AxisFactor) or outer.size % len(seen)):
        raise NotExactError("the tokens of a frame are not next to each other")
    key, value = (gathered(mesh, tensor, -2) for tensor in (key, value))
    whole = key.shape[-2] // len(seen)
    frames = [
        func(query.narrow(-2, frame * local, local), *(t.narrow(-2, 0, count * whole) for t in (key, value)), **kwargs)
        for frame, count in enumerate(seen)
    ]
    result = torch.cat(frames, dim=-2)
    return mark(result, _query_layout(query, result))


def frames_seen(table: Tensor) -> list[int]:
    """How many leading frames each frame attends to, from an additive or boolean `[..., frames, frames]` table.

    Raises:
        NotExactError: a frame sees anything but a prefix, or the mask differs along its leading dimensions.
    """
    rows = table.reshape(-1, *table.shape[-2:])
    visible = rows if rows.dtype == torch.bool else rows == 0
    hidden = ~visible if rows.dtype == torch.bool else rows == float("-inf")
    counts = visible[0].sum(-1)
    prefix = torch.arange(table.shape[-1], device=table.device) < counts[:, None]
    if not bool(((visible == prefix) & (hidden == ~prefix)).all()) or not bool((counts > 0).all()):
        raise NotExactError("the attention mask is not frame-causal")
    return counts.tolist()


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(mesh: Mesh, func: Any, left: Tensor, other: Tensor) -> Tensor:
    return _product(mesh, func, left, other)


@rule(torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
def bmm(mesh: Mesh, func: Any, left: Tensor, mat2: Tensor) -> Tensor:
    return _product(mesh, func, left, mat2)


@rule(torch.baddbmm, Tensor.baddbmm)
def baddbmm(
    mesh: Mesh, func: Any, tensor: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`beta * tensor + alpha * batch1 @ batch2`; attention without a fused function adds its mask so."""

    def scaled(left: Tensor, right: Tensor) -> Tensor:
        blank = left.new_empty(()).expand(left.shape[0], left.shape[1], right.shape[2])
        return func(blank, left, right, beta=0, alpha=alpha)

    product = _product(mesh, scaled, batch1, batch2)
    if not beta:
        return product
    product, tensor = align(mesh, [product, tensor])
    total = torch.add(product, tensor, alpha=beta)
    return mark(total, elementwise_layout([product, tensor], shape_of(total)))


def _product(mesh: Mesh, func: Any, left: Tensor, right: Tensor) -> Tensor:
    a, b = layout_of(left), layout_of(right)
    if a is None and b is None:
        return func(left, right)
    if left.ndim < 2 or right.ndim < 2:
        raise NotExactError("a product with a vector")
    batches = [{p: d for p, d in layout.sharded_places.items() if p < -2} for layout in (a, b) if layout]
    left, right = (fit(mesh, t, places) for t, places in ((left, batches[-1]), (right, batches[0])))
    a, b = layout_of(left), layout_of(right)
    inner = [layout and is_sharded(layout.dims[dim]) for layout, dim in ((a, -1), (b, -2))]
    if all(inner):
        assert a is not None
        assert b is not None
        return _partial_product(mesh, func, left, right, a, b)
    if any(inner):
        left, right = gathered(mesh, left, -1), gathered(mesh, right, -2)
    columns = b.dims[-1] if b else plain(right.shape[-1])
    if a and axes_in([a.dims[-2]]) & axes_in([columns]):
        right = gathered(mesh, right, -1)
        columns = (GatheredFactor(right.shape[-1], columns),)
    if left.shape[-1] != right.shape[-2]:
        raise NotExactError("a sharded factor meets one that is not the size of the whole picture")
    result = func(left, right)
    rows = a.dims[-2] if a else plain(left.shape[-2])
    return mark(result, _batch_layout(left, right, result, rows, columns))


def _partial_product(mesh: Mesh, func: Any, left: Tensor, right: Tensor, a: Layout, b: Layout) -> Tensor:
    """Both factors are cut along the summed dimension: each rank has part of the sum.

    Rows or columns that were gathered for an earlier product, as queries are in `values @ (keys.T @ queries)`, are cut
    again.
    """
    if a.dims[-1] != b.dims[-2] or is_sharded(a.dims[-2]) or is_sharded(b.dims[-1]):
        raise NotExactError("the factors of a product are cut differently")
    left, right = mark(*own(mesh, left, a)), mark(*own(mesh, right, b))
    total = sum_over_ranks(mesh, func(left, right), axes_in(a.dims[-1:]))
    sides: list[Dim] = []
    for dim, (factor, *_) in ((-2, a.dims[-2]), (-1, b.dims[-1])):
        if isinstance(factor, GatheredFactor):
            total = own_part(mesh, total, dim, factor.shards)
        sides.append(factor.shards if isinstance(factor, GatheredFactor) else plain(total.shape[dim]))
    return mark(total, _batch_layout(left, right, total, *sides))


def _batch_layout(left: Tensor, right: Tensor, result: Tensor, rows: Dim, columns: Dim) -> Layout:
    layouts = [(layout_of(t), tuple(t.shape[:-2])) for t in (left, right)]
    operands = [(layout and Layout(layout.dims[:-2]), shape) for layout, shape in layouts]
    return Layout((*broadcast(operands, result.shape[:-2]).dims, rows, columns))


@rule(torch.cdist)
def cdist(mesh: Mesh, func: Any, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    a, b = layout_of(left), layout_of(right)
    if b or (a and is_sharded(a.dims[-1])):
        raise NotExactError("distances between sharded points")
    result = func(left, right, *args, **kwargs)
    return result if a is None else mark(result, a.replace(-1, plain(right.shape[-2])))


@rule(F.linear)
def linear(mesh: Mesh, func: Any, tensor: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    layout = layout_of(tensor)
    require_whole(weight, bias)
    if layout and is_sharded(layout.dims[-1]):
        raise NotExactError("the channels of a linear layer are sharded")
    result = func(tensor, weight, bias)
    return result if layout is None else mark(result, layout.replace(-1, plain(weight.shape[0])))


@rule(F.embedding)
def embedding(mesh: Mesh, func: Any, tensor: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layout = layout_of(tensor)
    require_whole(weight)
    result = func(tensor, weight, *args, **kwargs)
    return result if layout is None else mark(result, Layout((*layout.dims, plain(weight.shape[1]))))
