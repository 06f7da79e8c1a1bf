"""Attention masks that are constant on blocks of tokens, kept as their small table of blocks.

Video VAEs mask attention by frame: a token sees the tokens of its own and earlier frames. Written out, such a mask has
(frames * height * width)^2 elements. Here it never is: the functions that VAEs build it with return a stand-in of the
full shape and no memory, which carries the table with one row and column per frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import NotExactError
from halovae.exact.registry import Mesh, named, rule
from halovae.exact.rules.sizes import ABOUT_SIZES

_BLOCKS = "_halovae_blocks"
_RUNS = "_halovae_runs"


@dataclass
class BlockMask:
    """A square mask of `size` tokens: `table[..., i, j]` holds for the block pair (i, j) of `size / blocks` tokens.

    A mask under construction has no table yet but the length of each row's prefix of zeros; the rest is -inf.
    """

    size: int
    table: Tensor | None = None
    prefixes: list[int] = field(default_factory=list)

    def resolved(self) -> Tensor:
        """The table.

        Raises:
            NotExactError: the rows' prefixes don't form blocks.
        """
        if self.table is not None:
            return self.table
        changes = [i for i in range(1, self.size) if self.prefixes[i] != self.prefixes[i - 1]]
        block = changes[0] if changes else self.size
        blocks, rest = divmod(self.size, block)
        if rest or any(length % block for length in self.prefixes) or changes != list(range(block, self.size, block)):
            raise NotExactError("the attention mask is not the same for all tokens of a frame")
        table = torch.full((blocks, blocks), float("-inf"), device="cpu")
        for row in range(blocks):
            table[row, : self.prefixes[row * block] // block] = 0
        self.table = table
        return table


def is_block_mask(value: object) -> bool:
    return isinstance(value, Tensor) and hasattr(value, _BLOCKS)


def block_table(value: Tensor) -> Tensor:
    """The table of a stand-in, `[..., blocks, blocks]`."""
    return _blocks(value).resolved()


def _blocks(value: Tensor) -> BlockMask:
    return getattr(value, _BLOCKS)


def prefix_mask(size: int, dtype: torch.dtype | None, device: Any) -> Tensor:
    """The stand-in of a `[size, size]` mask full of -inf, into whose rows prefixes of zeros are written."""
    size = int(size)
    return _stand_in((size, size), dtype, device, BlockMask(size, prefixes=[0] * size))


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any, mask: BlockMask) -> Tensor:
    tensor = torch.zeros((), dtype=dtype, device=device).expand(shape)
    setattr(tensor, _BLOCKS, mask)
    return tensor


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
    return tuple(_stand_in((size, size), t.dtype, t.device, BlockMask(size, table=t)) for t in tables)


def apply(mesh: Mesh, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function that got a stand-in.

    Elementwise functions and leading dimensions act on the table, row prefixes are noted, attention knows what to do.

    Raises:
        NotExactError: anything else.
    """
    if func is Tensor.__setitem__:
        return _note_prefix(*args)
    if func in ABOUT_SIZES:
        return func(*args, **kwargs)
    if func in _ON_TABLES:
        return _on_tables(func, args, kwargs)
    if func in _ON_LEADING_DIMS:
        return _reshaped(func, args[0], args[1:], kwargs)
    if func is torch.nn.functional.scaled_dot_product_attention:
        from halovae.exact.rules.attention import attention

        return attention(mesh, func, *args, **kwargs)
    raise NotExactError(f"{getattr(func, '__name__', func)} of an attention mask")


_ON_TABLES = set(
    named("le", "lt", "ge", "gt", "eq", "where", "to", "type_as", "bool", "float", "unsqueeze", "mul", "add",
          "logical_not", "masked_fill")
)  # fmt: skip


def _on_tables(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    stand_ins = [a for a in (*args, *kwargs.values()) if is_block_mask(a)]
    size = _blocks(stand_ins[0]).size
    if any(isinstance(a, Tensor) and a.ndim and not is_block_mask(a) for a in args) or any(
        tuple(s.shape[-2:]) != (size, size) for s in stand_ins
    ):
        raise NotExactError("an attention mask meets a tensor that is not one")
    small = [block_table(a) if is_block_mask(a) else a for a in args]
    table = func(*small, **{k: block_table(v) if is_block_mask(v) else v for k, v in kwargs.items()})
    if table.shape[-1] != table.shape[-2]:
        raise NotExactError("an attention mask loses its square shape")
    return _stand_in((*table.shape[:-2], size, size), table.dtype, table.device, BlockMask(size, table=table))


_ON_LEADING_DIMS = {Tensor.expand, Tensor.view, Tensor.reshape, Tensor.repeat_interleave}


def _reshaped(func: Any, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Views and repeats that leave the two token dimensions alone."""
    shape = tuple(func(torch.empty(mask.shape, device="meta"), *args, **kwargs).shape)
    table, size = block_table(mask), _blocks(mask).size
    if shape[-2:] != tuple(mask.shape[-2:]):
        raise NotExactError("an attention mask changes along its tokens")
    table = table.reshape(-1, *table.shape[-2:])
    if bool((table != table[:1]).any()):
        raise NotExactError("an attention mask differs along its leading dimensions")
    table = table[0].expand(*shape[:-2], *table.shape[-2:])
    return _stand_in(shape, mask.dtype, mask.device, BlockMask(size, table=table))


def _note_prefix(mask: Tensor, index: Any, value: Any) -> None:
    """`mask[row, :length] = 0`."""
    blocks = _blocks(mask)
    row, columns = index if isinstance(index, tuple) and len(index) == 2 else (None, None)
    if blocks.table is not None or not isinstance(row, int) or not isinstance(columns, slice) or value != 0:
        raise NotExactError("an attention mask that is not made of rows")
    start, stop, step = columns.indices(blocks.size)
    if (start, step) != (0, 1):
        raise NotExactError("an attention mask that is not made of prefixes")
    blocks.prefixes[row] = int(stop)
