"""The table of operator rules: one registered function per operator that needs one.

A rule takes the mesh, the torch function and its arguments, and returns what the function would return on this
rank's shard, with layouts marked. A function without a rule is refused as soon as a sharded tensor reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from halovae.base.functions import named, registrar, writes
from halovae.exact.mesh import Mesh

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
rule = registrar(RULES)
"""Registers a rule for torch functions."""

__all__ = ["RULES", "Mesh", "Rule", "named", "rule", "writes"]
