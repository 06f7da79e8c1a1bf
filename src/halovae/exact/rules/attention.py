"""Attention and matrix products: local queries meet the keys and values of all shards.

Video VAEs mask attention by frame: a token sees the tokens of its own and earlier frames. Written out, such a mask has
(frames * height * width)^2 elements. Here it never is: the functions that VAEs build it with return a stand-in of the
full shape and no memory, which carries the table with one row and column per frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import SIZE_QUESTIONS, named
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
from halovae.exact.mesh import Mesh
from halovae.exact.rules.elementwise import align, broadcast, elementwise_layout, fit
from halovae.exact.rules.norms import sum_over_ranks
from halovae.exact.shard_mode import let_stand_for, rule, stand_in_of


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
    if by_frame := mask_of(attn_mask):
        return _by_frame(mesh, func, query, key, value, by_frame, **kwargs)
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


def _by_frame(
    mesh: Mesh, func: Any, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **kwargs: Any
) -> Tensor:
    seen = frames_seen(mask.table)
    layout = layout_of(query)
    if mask.size != (layout.whole[-2] if layout else query.shape[-2]):
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


# ---- masks by frame --------------------------------------------------------------------------------------------------


_RUNS = "_halovae_runs"


@dataclass
class BlockMask:
    """A square mask of `size` tokens: `table[..., i, j]` holds for the block pair (i, j) of `size / blocks` tokens.

    A mask under construction has no table yet but the length of each row's prefix of zeros; the rest is -inf.
    """

    size: int
    known: Tensor | None = None
    prefixes: list[int] = field(default_factory=list)

    @property
    def table(self) -> Tensor:
        """`[..., blocks, blocks]`.

        Raises:
            NotExactError: the rows' prefixes don't form blocks.
        """
        if self.known is None:
            self.known = self._of_prefixes()
        return self.known

    def _of_prefixes(self) -> Tensor:
        changes = [i for i in range(1, self.size) if self.prefixes[i] != self.prefixes[i - 1]]
        block = changes[0] if changes else self.size
        blocks, rest = divmod(self.size, block)
        if rest or any(length % block for length in self.prefixes) or changes != list(range(block, self.size, block)):
            raise NotExactError("the attention mask is not the same for all tokens of a frame")
        table = torch.full((blocks, blocks), float("-inf"), device="cpu")
        for row in range(blocks):
            table[row, : self.prefixes[row * block] // block] = 0
        return table

    def run(self, mesh: Mesh, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Elementwise functions and leading dimensions act on the table, row prefixes are noted, attention knows what
        to do."""
        if func is Tensor.__setitem__:
            return self._note_prefix(*args[1:])
        if func in SIZE_QUESTIONS:
            return func(*args, **kwargs)
        if func in _ON_TABLES:
            return self._on_tables(func, args, kwargs)
        if func in _ON_LEADING_DIMS:
            return self._reshaped(func, args[0], args[1:], kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(mesh, func, *args, **kwargs)
        raise NotExactError(f"{getattr(func, '__name__', func)} of an attention mask")

    def _on_tables(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        masks = [tensor for tensor in tensors if mask_of(tensor)]
        others = any(value.ndim for value in args if isinstance(value, Tensor) and not mask_of(value))
        if others or any(tuple(mask.shape[-2:]) != (self.size, self.size) for mask in masks):
            raise NotExactError("an attention mask meets a tensor that is not one")
        table = func(*map(_table_of, args), **{name: _table_of(value) for name, value in kwargs.items()})
        if table.shape[-1] != table.shape[-2]:
            raise NotExactError("an attention mask loses its square shape")
        return _stand_in((*table.shape[:-2], self.size, self.size), table, BlockMask(self.size, table))

    def _reshaped(self, func: Any, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Views and repeats that leave the two token dimensions alone."""
        shape = tuple(func(torch.empty(mask.shape, device="meta"), *args, **kwargs).shape)
        if shape[-2:] != tuple(mask.shape[-2:]):
            raise NotExactError("an attention mask changes along its tokens")
        table = self.table.reshape(-1, *self.table.shape[-2:])
        if bool((table != table[:1]).any()):
            raise NotExactError("an attention mask differs along its leading dimensions")
        return _stand_in(shape, mask, BlockMask(self.size, table[0].expand(*shape[:-2], *table.shape[-2:])))

    def _note_prefix(self, index: Any, value: Any) -> None:
        """`mask[row, :length] = 0`."""
        row, columns = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
        if self.known is not None or not isinstance(row, int) or not isinstance(columns, slice) or value != 0:
            raise NotExactError("an attention mask that is not made of rows")
        start, stop, step = columns.indices(self.size)
        if (start, step) != (0, 1):
            raise NotExactError("an attention mask that is not made of prefixes")
        self.prefixes[row] = int(stop)


_ON_TABLES = set(
    named("le", "lt", "ge", "gt", "eq", "where", "to", "type_as", "bool", "float", "unsqueeze", "mul", "add",
          "logical_not", "masked_fill")
)  # fmt: skip
_ON_LEADING_DIMS = {Tensor.expand, Tensor.view, Tensor.reshape, Tensor.repeat_interleave}


def mask_of(value: object) -> BlockMask | None:
    """The mask that a tensor stands for."""
    known = stand_in_of(value)
    return known if isinstance(known, BlockMask) else None


def _table_of(value: Any) -> Any:
    mask = mask_of(value)
    return mask.table if mask else value


def _stand_in(shape: tuple[int, ...], like: Tensor, mask: BlockMask) -> Tensor:
    return let_stand_for(like.new_zeros(()).expand(shape), mask)


def prefix_mask(size: int, dtype: torch.dtype | None, device: Any) -> Tensor:
    """The stand-in of a `[size, size]` mask full of -inf, into whose rows prefixes of zeros are written."""
    size = int(size)
    blank = torch.zeros((), dtype=dtype, device=device)
    return _stand_in((size, size), blank, BlockMask(size, prefixes=[0] * size))


def remember_runs(func: Any, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`tensor.repeat_interleave(n)`, remembering that the result is n copies of each element."""
    result = func(tensor, *args, **kwargs)
    repeats = args[0] if args else kwargs.get("repeats")
    if tensor.ndim == 1 and isinstance(repeats, int):
        setattr(result, _RUNS, (tensor, tensor.shape[0] * repeats))
    return result


@rule(torch.meshgrid)
def meshgrid(mesh: Mesh, func: Any, *tensors: Any, **kwargs: Any) -> Any:
    vectors = list(tensors[0]) if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else list(tensors)
    runs = [run for vector in vectors if (run := getattr(vector, _RUNS, None))]
    if len(vectors) != 2 or len(runs) != 2 or vectors[0].shape != vectors[1].shape:
        return func(*tensors, **kwargs)
    size = runs[0][1]
    tables = func(*(run[0] for run in runs), **kwargs)
    return tuple(_stand_in((size, size), table, BlockMask(size, table)) for table in tables)
