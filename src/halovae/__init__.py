"""halovae runs the encode and the decode of any diffusers VAE on N devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halovae.base.errors import (
    DisagreementError,
    HalovaeError,
    InputError,
    NotExactError,
    RankFailedError,
    TilingError,
    TooLittleMemoryError,
    VerificationError,
)

if TYPE_CHECKING:
    from halovae.api.parallelize import Handle, optimize, parallelize, restore, summary
    from halovae.api.sharded import Sharded, sharded
    from halovae.base.options import CallReport, Options

__version__ = "0.1.0"

__all__ = [
    "CallReport",
    "DisagreementError",
    "HalovaeError",
    "Handle",
    "InputError",
    "NotExactError",
    "Options",
    "RankFailedError",
    "Sharded",
    "TilingError",
    "TooLittleMemoryError",
    "VerificationError",
    "optimize",
    "parallelize",
    "restore",
    "sharded",
    "summary",
]

_HOMES = {
    "CallReport": "base.options",
    "Handle": "api.parallelize",
    "Options": "base.options",
    "Sharded": "api.sharded",
    "optimize": "api.parallelize",
    "parallelize": "api.parallelize",
    "restore": "api.parallelize",
    "sharded": "api.sharded",
    "summary": "api.parallelize",
}


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: `halovae --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'halovae' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"halovae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
