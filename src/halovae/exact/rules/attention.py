"""Attention and matrix products: local queries meet the keys and values of all shards.

Video VAEs mask attention by frame: a token sees the tokens of its own and earlier frames. Written out, such a mask has
(frames * height * width)^2 elements. Here it never is: the functions that VAEs build it with return a stand-in of the
full shape and no memory, which carries the table with one row and column per frame.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.base.functions import SIZE_QUESTIONS, named, outside_modes
from halovae.base.geometry import Extent
from halovae.base.replaced import replaced, value_here
from halovae.exact.halo import extend, gather_dim, own, own_part
from halovae.exact.layout import (
    AxisFactor,
    Dim,
    GatheredFactor,
    Layout,
    axes_in,
    global_length,
    is_sharded,
    layout_of,
    mark,
    plain,
    require_layout,
    shape_of,
)
from halovae.exact.mesh import Mesh
from halovae.exact.rules.elementwise import align, broadcast, elementwise_layout, fit
from halovae.exact.rules.norms import sum_over_ranks
from halovae.exact.shard_mode import let_stand_for, maker, rule, stand_in_of


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
    if dropout_p:
        raise NotExactError("dropout is active: call vae.eval() first")
    if by_frame := mask_of(attn_mask):
        return _by_frame(mesh, func, query, key, value, by_frame, **kwargs)
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


# ---- attention by a function of positions ----------------------------------------------------------------------------


@contextmanager
def flex_attention_by_rule(mesh: Mesh) -> Iterator[None]:
    """Within it, torch's `flex_attention` runs by a rule: function modes don't see it, and it can't run under one."""
    module: Any = sys.modules.get("torch.nn.attention.flex_attention")
    with ExitStack() as stack:
        if module is not None:
            for name, call in (
                ("flex_attention", functools.partial(_flex_attention, mesh, value_here(module.flex_attention))),
                ("create_block_mask", outside_modes(value_here(module.create_block_mask))),
            ):
                stack.enter_context(replaced(module, name, call, here=True))
        yield


@outside_modes
def _flex_attention(
    mesh: Mesh, func: Any, query: Tensor, key: Tensor, value: Tensor, score_mod: Any = None, block_mask: Any = None,
    scale: float | None = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """`[batch, heads, tokens, channels]`. A shard fetches the keys and values up to those that its queries may see: a
    neighbourhood around each token needs a halo of half a window."""
    if not any(map(layout_of, (query, key, value))):
        return func(query, key, value, score_mod, block_mask, scale, **kwargs)
    if block_mask is None:
        raise NotExactError("flex_attention of shards without a block mask")
    if score_mod is not None or any(v for name, v in kwargs.items() if name != "kernel_options"):
        raise NotExactError("flex_attention of shards with more than a block mask and a scale")
    queries, keys = layout_of(query), layout_of(key)
    dims = [layout.dims[-2] if layout else () for layout in (queries, keys, layout_of(value))]
    if not queries or not keys or dims[1] != dims[2] or block_mask.shape[-2:] != (queries.whole[-2], keys.whole[-2]):
        raise NotExactError("queries, keys and values of flex_attention are cut differently, or its mask is not theirs")
    (query, queries), (key, keys), (value, _) = (own(mesh, t, layout_of(t)) for t in (query, key, value))  # pyright: ignore
    positions = torch.arange(queries.whole[-2], device=query.device)
    rows, columns = own_part(mesh, positions, 0, queries.dims[-2]), torch.arange(keys.whole[-2], device=query.device)
    key, value, columns = _seen(mesh, key, value, keys, _needs(block_mask, queries.dims[-2], keys.dims[-2]), columns)
    batch, heads = (torch.arange(size, device=query.device) for size in block_mask.shape[:2])
    visible = block_mask.mask_mod(batch[:, None, None, None], heads[:, None, None], rows[:, None], columns)
    result = F.scaled_dot_product_attention(query, key, value, visible, scale=scale)
    return mark(result, _query_layout(mark(query, queries), result))


def _needs(block_mask: Any, queries: Dim, keys: Dim) -> dict[int, tuple[Extent, ...]]:
    """By place of the axes among the factors of the keys: which of their positions the queries of each part may see.

    By the blocks of the mask, which are known of all ranks.
    """
    blocks = block_mask.to_dense().flatten(0, 1).any(0)
    size_q, size_k = block_mask.BLOCK_SIZE
    axes = {factor.axis: factor for factor in queries if isinstance(factor, AxisFactor)}
    shapes = [[global_length((factor,)) for factor in dim] for dim in (queries, keys)]
    needs: dict[int, tuple[Extent, ...]] = {}
    for place, factor in enumerate(keys):
        if not isinstance(factor, AxisFactor):
            continue
        extents: list[Extent] = []
        for part in range(factor.cut.parts):
            asking = torch.zeros(shapes[0], dtype=torch.bool, device=blocks.device)
            if (axis := axes.get(factor.axis)) is None:
                asking.fill_(True)
            else:
                low, high = axis.cut.owned(part)
                asking.narrow(queries.index(axis), low, high - low).fill_(True)
            seen = blocks[asking.flatten().nonzero().flatten().div(size_q, rounding_mode="floor").unique()].any(0)
            tokens = seen.repeat_interleave(size_k)[: global_length(keys)].view(shapes[1])
            found = tokens.movedim(place, 0).flatten(1).any(1).nonzero().flatten().tolist()
            own_low, own_high = factor.cut.owned(part)
            extents.append((min([own_low, *found]), max([own_high, *(position + 1 for position in found)])))
        needs[place] = tuple(extents)
    return needs


def _seen(
    mesh: Mesh, key: Tensor, value: Tensor, layout: Layout, needs: dict[int, tuple[Extent, ...]], positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Keys, values and their positions within `needs`, along a dimension of tokens."""
    factors = layout.dims[-2]
    split = Layout((*layout.dims[:-2], *((factor,) for factor in factors), layout.dims[-1]))
    first = len(layout.dims) - 2
    positions = positions.view([global_length((factor,)) for factor in factors])
    for place, extents in needs.items():
        low, high = extents[mesh.part(factors[place].axis)]  # pyright: ignore
        positions = positions.narrow(place, low, high - low)
    fetched: list[Tensor] = []
    for tensor in (key, value):
        shape = (*split.shape[:-1], tensor.shape[-1])
        wanted = {first + place: extents for place, extents in needs.items()}
        got = extend(mesh, tensor.reshape(shape), split, wanted)
        fetched.append(got.flatten(first, first + len(factors) - 1))
    return fetched[0], fetched[1], positions.flatten()


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
def product(mesh: Mesh, func: Any, left: Tensor, *right: Tensor, **named: Tensor) -> Tensor:
    return _product(mesh, func, left, *right, *named.values())


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
    layout = require_layout(left, right)
    if is_sharded(layout.dims[-1]):
        raise NotExactError("distances between sharded points")
    return mark(func(left, right, *args, **kwargs), layout.replace(-1, plain(right.shape[-2])))


@rule(F.linear)
def linear(mesh: Mesh, func: Any, tensor: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    layout = require_layout(tensor, weight, bias)
    if is_sharded(layout.dims[-1]):
        raise NotExactError("the channels of a linear layer are sharded")
    return mark(func(tensor, weight, bias), layout.replace(-1, plain(weight.shape[0])))


@rule(F.embedding)
def embedding(mesh: Mesh, func: Any, tensor: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    layout = require_layout(tensor, weight)
    return mark(func(tensor, weight, *args, **kwargs), Layout((*layout.dims, plain(weight.shape[1]))))


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


@maker(torch.meshgrid)
def meshgrid(mesh: Mesh, func: Any, *tensors: Any, **kwargs: Any) -> Any:
    vectors = list(tensors[0]) if len(tensors) == 1 and not isinstance(tensors[0], Tensor) else list(tensors)
    runs = [run for vector in vectors if (run := getattr(vector, _RUNS, None))]
    if len(vectors) != 2 or len(runs) != 2 or vectors[0].shape != vectors[1].shape:
        return func(*tensors, **kwargs)
    size = runs[0][1]
    tables = func(*(run[0] for run in runs), **kwargs)
    return tuple(_stand_in((size, size), table, BlockMask(size, table)) for table in tables)
