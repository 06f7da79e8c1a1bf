"""The function mode that runs a network on shards: it sees every torch call and hands it to the operator's rule.

`exact/run.py` imports the modules that register rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from halovae.base.errors import NotExactError
from halovae.base.functions import QUESTIONS, outside_modes, registrar
from halovae.exact.layout import layout_of
from halovae.exact.mesh import Mesh
from halovae.kernels import autocast

RULES: dict[Any, Callable[..., Any]] = {}
rule = registrar(RULES)
"""Registers a rule for torch functions. It takes the mesh, the function and its arguments, and returns what the
function would return on this rank's shard, with layouts marked. It is asked where one of these is a shard. A function
without a rule is refused there."""
_makers: set[Any] = set()


def maker(*functions: Any) -> Callable[..., Any]:
    """As `rule`, of functions that may make a shard of none, by the sizes that they get: always asked."""
    _makers.update(functions)
    return rule(*functions)


_ATTRIBUTE = "_halovae_stands_for"


def stand_in_of(value: object) -> Any:
    """What is known of a tensor that stands for another one, which is never made: its `run` makes the functions that
    get such a tensor, and refuses those that want the tensor itself. None for other tensors."""
    return getattr(value, _ATTRIBUTE, None) if isinstance(value, Tensor) else None


def let_stand_for(tensor: Tensor, known: Any) -> Tensor:
    setattr(tensor, _ATTRIBUTE, known)
    return tensor


class ShardMode(TorchFunctionMode):
    """Within it, torch functions treat tensors that carry a layout as shards of a whole.

    Raises:
        NotExactError: (while running) a function that mixes positions and has no rule met a sharded tensor.
        RankFailedError: (while running) another rank has failed.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._mesh = mesh

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in QUESTIONS and func not in RULES:  # A shard answers as the whole would.
            return _answer(func, *args, **kwargs)
        self._mesh.comm.check()
        if autocast.is_on():
            return autocast.run_cast(self._run_watched, func, args, kwargs)
        return self._run_watched(func, args, kwargs)

    def _run_watched(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        tensors = _tensors(args, kwargs)
        try:
            return self._run(func, tensors, args, kwargs)
        except NotExactError as error:
            raise _located(error, func) from None

    def _run(self, func: Callable[..., Any], tensors: list[Tensor], args: tuple[Any, ...], kwargs: Any) -> Any:
        if stand_in := next(filter(None, map(stand_in_of, tensors)), None):
            return stand_in.run(self._mesh, func, args, kwargs)
        sharded = any(map(layout_of, tensors))
        if not sharded and func not in _makers:
            return func(*args, **kwargs)
        if sharded and kwargs.get("out") is not None:
            raise NotExactError("it writes into out=")
        if func not in RULES:
            raise NotExactError("no rule says how it acts on shards")
        return RULES[func](self._mesh, func, *args, **kwargs)


@outside_modes
def _answer(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _located(error: NotExactError, func: Callable[..., Any]) -> NotExactError:
    """The error with the operator and the module that called it, once."""
    if getattr(error, "located", False):
        return error
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    located = NotExactError(f"exact mode can't run {name}{_place()}: {error}")
    located.located = True  # type: ignore[attr-defined]
    return located


def _place() -> str:
    """The innermost nn.Module whose method is on the stack, with its path in the outermost one."""
    modules: list[nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
        frame = frame.f_back
    if not modules:
        return ""
    path = next((path for path, module in modules[-1].named_modules() if module is modules[0]), "")
    return f" in {path} ({type(modules[0]).__name__})" if path else f" in {type(modules[0]).__name__}"
