"""The table of operator rules: one registered function per operator that needs one.

A rule takes the mesh, the torch function and its arguments, and returns what the function would return on this
rank's shard, with layouts marked. A function without a rule is refused as soon as a sharded tensor reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.exact.mesh import Mesh

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions. A second rule for the same function is a mistake and raises."""

    def register(implementation: Rule) -> Rule:
        for function in dict.fromkeys(functions):
            if function in RULES:
                raise ValueError(f"{function} has a rule already: {RULES[function]}")
            RULES[function] = implementation
        return implementation

    return register


def named(*names: str) -> Iterator[Any]:
    """Every torch function of these names: `torch.x`, `torch.nn.functional.x`, `Tensor.x`, `Tensor.x_`, `Tensor.__x__`.

    Raises:
        AttributeError: torch has nothing of that name.
    """
    for name in names:
        spellings = [(torch, name), (F, name), (torch.special, name)]
        spellings += [(Tensor, s) for s in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")]
        found = {getattr(place, spelling) for place, spelling in spellings if hasattr(place, spelling)}
        if not found:
            raise AttributeError(f"torch has no function named {name!r}")
        yield from found


def writes(function: Any) -> bool:
    """Whether a torch function writes into its first operand: `x.add_(y)`, `x += y`."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name != "__invert__"
    return name.endswith("_")


__all__ = ["RULES", "Mesh", "Rule", "named", "rule", "writes"]
