"""Everything that a trial of a VAE depends on, in words that are the same in every process.

Verdicts of trials are kept under these words (`verdicts.py`). Where somebody's code takes part that words can't tell,
which are hooks, methods patched on an instance, compiled modules, rules from elsewhere, there are none: the trial is
made in each process.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from halovae.base import verdicts
from halovae.base.compiled import is_compiled
from halovae.base.private_diffusers import LIBRARY_HOOKS
from halovae.base.private_torch import COMPILED_CALL, DeviceContext, any_global_hook, function_modes
from halovae.base.trees import tensors_in
from halovae.calls.module_facts import TELLING
from halovae.calls.state import has_hooks
from halovae.calls.target import Substitute, Target, told
from halovae.exact.shard_mode import RULES
from halovae.kernels import autocast
from halovae.kernels.fast_rules import RULES as KERNELS

_DEEP = 3
"""Levels of objects within objects that are looked into."""
_TOLD = (Tensor, torch.Generator, type(None), *TELLING)
"""Types of arguments that are told in full, or whose values a trial replaces."""
_TOLD_BY_NAME = (Mapping, nn.Module, type, FunctionType, *TELLING)
"""What is not looked into, though it has attributes."""
_CONTAINER = "return_dict"
"""What diffusers calls the argument that says how a result is wrapped: that changes nothing in it."""


def words_of(target: Target, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What a trial depends on besides the values of its pictures; None where that can't be told, or nothing is kept."""
    if verdicts.folder() is None:
        return None
    try:
        if not all(isinstance(value, _TOLD) for value in (*args, *kwargs.values())):
            return None
        code = code_words(target.vae)
        if code is None or is_compiled(target.facts.modules(), target.originals[half]):
            return None
        tensors = [(tuple(t.shape), t.dtype, t.device.type) for t in tensors_in((args, kwargs))]
        named = {name: _described(value) for name, value in kwargs.items() if name != _CONTAINER}
        given = [[*map(_described, args)], named]
        # The values of weights do not change which rules are right. But zeros hide a branch, and large ones amplify
        # rounding: with the very same weights the verdict is the very one that would be given here.
        return told([half, code, target.digest(), str(tensors), told(given), autocast.state()])
    except Exception:  # Whatever a stranger's attributes raise.
        return None


def code_words(vae: nn.Module) -> str | None:
    """A digest of a VAE's code, config and settings, whatever its weights are; None as of `words_of`.

    What modules keep in attributes with an underscore is taken for the state that calls leave in them.
    """
    if verdicts.folder() is None:
        return None
    try:
        if has_hooks(vae) or any_global_hook() or _is_watched():
            return None
        if not all(rule.__module__.startswith("halovae.") for rules in (RULES, KERNELS) for rule in rules.values()):
            return None
        modules = list(vae.modules())
        code = _Code({type(module).__module__.partition(".")[0] for module in modules} - {"torch"})
        for module in modules:
            for name, value in sorted(vars(module).items()):
                value = _within(value)
                if _is_patched(module, name, value):
                    return None
                if not name.startswith("_") and not isinstance(value, (Substitute, MethodType)):
                    code.say(f"{name} {_described(value)}")
                    code.add(value)
            code.add(type(module))
        code.say(told([name for name, _ in vae.named_modules()]))
        config = getattr(vae, "config", None)
        if isinstance(config, Mapping):
            entries = cast("Mapping[Any, Any]", config)
            code.say(told({name: value for name, value in entries.items() if not str(name).startswith("_")}))
        return code.digest()
    except Exception:  # As above.
        return None


def _is_watched() -> bool:
    """Whether somebody's function mode sees the operators; a default device is none."""
    return any(not isinstance(mode, DeviceContext) for mode in function_modes())


def _within(value: Any) -> Any:
    """What a function of halovae's own wraps that stands in a method's place, to take its time or to report of it."""
    while _is_ours(value) and (wrapped := getattr(value, "__wrapped__", None)):
        value = wrapped
    return value


def _is_ours(value: Any) -> bool:
    while isinstance(value, functools.partial):
        value = cast("functools.partial[Any]", value).func
    function = getattr(value, "__func__", value)
    return isinstance(function, FunctionType) and str(function.__globals__.get("__name__")).startswith("halovae.")


def _is_patched(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute stands in the way of what the class of the module has."""
    if name in LIBRARY_HOOKS:
        return True
    if isinstance(value, Substitute):
        return value.own is not None
    if isinstance(value, MethodType) and value.__self__ is module:
        return value.__func__ is not getattr(type(module), name, None)
    return callable(value) and hasattr(type(module), name) and name not in ("__getstate__", COMPILED_CALL)


def _described(value: Any, depth: int = 0) -> str:
    """As `told`, and what objects hold too."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_described(item, depth) for item in cast('list[Any]', value))}]"
    if depth == _DEEP or not hasattr(value, "__dict__") or isinstance(value, _TOLD_BY_NAME):
        return told(value)
    held = sorted(vars(value).items())
    return f"{told(value)}({', '.join(f'{name}={_described(item, depth + 1)}' for name, item in held)})"


class _Code:
    """A digest of functions and classes by what they do: a method that is patched makes another one.

    Args:
        packages: names of those whose code counts; versions tell what others do.
    """

    def __init__(self, packages: set[str]) -> None:
        self._packages, self._seen, self._hash = packages, set[int](), hashlib.sha256()
        self._kept: list[Any] = []

    def say(self, words: str) -> None:
        self._hash.update(words.encode() + b"\n")

    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, value: Any) -> None:
        """Take in the code of a function or class, and of all that it calls by name."""
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._kept.append(value)  # Else another one could get its id.
                waiting += self._taken_in(value)

    def _taken_in(self, value: Any) -> Iterator[Any]:
        if isinstance(value, (staticmethod, classmethod)) or hasattr(value, "__func__"):
            yield value.__func__
        elif isinstance(value, property):
            yield from (value.fget, value.fset)
        elif isinstance(value, functools.partial):
            yield from (cast("Any", value.func), *value.args, *value.keywords.values())
        elif isinstance(value, type):
            self.say(told(value))
            if self._is_own(value):
                yield from value.__mro__
                for name, item in sorted(vars(value).items()):
                    if not name.startswith("__") or isinstance(item, FunctionType):
                        self.say(f"{name} {told(item)}")
                        yield item
        elif isinstance(value, FunctionType):
            self.say(told(value))
            if self._is_own(value):
                yield from self._taken_from(value)
        elif hasattr(value, "__wrapped__"):
            yield value.__wrapped__

    def _taken_from(self, function: FunctionType) -> Iterator[Any]:
        names: set[str] = set()
        self.say(_in_words(function.__code__, names))
        self.say(told([function.__defaults__, function.__kwdefaults__]))
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # Nothing was put in so far.
                continue
            self.say(told(held))
            yield held
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            # Words at the top of a file may be drawn anew in each process, to name a session.
            if isinstance(value, (FunctionType, bool, int, float)):
                self.say(f"{name} {told(value)}")
                yield value

    def _is_own(self, value: Any) -> bool:
        return str(value.__module__).partition(".")[0] in self._packages


def _in_words(code: CodeType, names: set[str]) -> str:
    """What code does, without where it stands; the names that it uses are added to `names`."""
    names.update(code.co_names)
    constants = [_in_words(c, names) if isinstance(c, CodeType) else told(c) for c in code.co_consts]
    return told([code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags, constants])
