"""The function mode that runs a network on shards: it sees every torch call and hands it to the operator's rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from halovae.errors import NotExactError
from halovae.exact import attention, elementwise, factories, indexing, masks, norms, reductions, sizes, views, windows
from halovae.exact.layout import layout_of
from halovae.exact.mesh import Mesh
from halovae.exact.registry import RULES

RULE_MODULES = (attention, elementwise, factories, indexing, masks, norms, reductions, sizes, views, windows)
"""Imported for their rules."""


class ShardMode(TorchFunctionMode):
    """Within it, torch functions treat tensors that carry a layout as shards of a whole.

    Args:
        mesh: the grid of shards.

    Raises:
        NotExactError: (while running) a function that mixes positions and has no rule met a sharded tensor.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _HARMLESS:
            return func(*args, **kwargs)
        tensors = list(_tensors(args, kwargs))
        if any(masks.is_block_mask(t) for t in tensors):
            return masks.apply(self._mesh, func, args, kwargs)
        rule = RULES.get(func)
        try:
            if rule is not None:
                return rule(self._mesh, func, *args, **kwargs)
            if not any(layout_of(t) for t in tensors):
                return func(*args, **kwargs)
            raise NotExactError("no rule says how it acts on shards")
        except NotExactError as error:
            raise _located(error, func) from None


def _tensors(args: Iterable[Any], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (v for v in value if isinstance(v, Tensor))


def _located(error: NotExactError, func: Callable[..., Any]) -> NotExactError:
    """The error with the operator and the module that called it, once."""
    if getattr(error, "located", False):
        return error
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    module = _calling_module()
    where = f" in {type(module).__name__}" if module is not None else ""
    located = NotExactError(f"exact mode can't run {name}{where}: {error}. Use mode='tile' for this VAE")
    located.located, located.module = True, module  # type: ignore[attr-defined]
    return located


def _calling_module() -> nn.Module | None:
    """The innermost nn.Module whose method is on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


_HARMLESS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "ndim", "requires_grad", "layout", "grad", "grad_fn", "is_leaf",
                 "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes")
} | {
    Tensor.dim, Tensor.stride, Tensor.is_contiguous, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__, Tensor.data_ptr, Tensor.get_device,
    Tensor.is_inference, Tensor.__hash__, Tensor.is_pinned,
}  # fmt: skip
"""Questions about a tensor that every shard answers for itself."""
