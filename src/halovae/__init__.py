"""halovae runs the encode and the decode of any diffusers VAE on N devices."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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
    from halovae.api.handle import Handle
    from halovae.api.parallelize import optimize, parallelize, restore, summary
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
    "Handle": "api.handle",
    "Options": "base.options",
    "Sharded": "api.sharded",
    "optimize": "api.parallelize",
    "parallelize": "api.parallelize",
    "restore": "api.parallelize",
    "sharded": "api.sharded",
    "summary": "api.parallelize",
}


_MOVED = {
    "config": "base.options", "errors": "base.errors", "parallel": "api.parallelize", "context": "api.sharded",
    "models": "media.models", "latents": "media.latents_file", "codec": "media.codec", "fit": "media.vae_limits",
    "quality": "evaluation", "report": "evaluation.report",
}  # fmt: skip
"""Modules by the names that they had; these work for one version more."""


class _Moved(MetaPathFinder, Loader):
    """Imports a module by its old name, with a warning that names the new one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{__name__}.{_MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now, and goes in the next version", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its new name, which it keeps."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Moved())


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: `halovae --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'halovae' has no attribute {name!r}")
    return getattr(import_module(f"halovae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
