"""Any pipeline of diffusers on ranks: find it, load it, spread it, and call it for one video or picture after another.

Example:
    >>> setup = Setup(vae_mode="exact", ulysses_degree=2)
    >>> pipeline = load_pipeline(find_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text-to-video"), setup)
    >>> with Runner(pipeline, setup, comm.world(), device) as runner:
    ...     frames = runner.run(Generation(prompt="a cup of coffee")).frames
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halovae.pipelines.demo import make_demo_model
    from halovae.pipelines.generation_settings import TASKS, Generation, Setup
    from halovae.pipelines.load import PipelineSource, find_pipeline, load_pipeline
    from halovae.pipelines.runner import Result, Runner

__all__ = [
    "TASKS",
    "Generation",
    "PipelineSource",
    "Result",
    "Runner",
    "Setup",
    "find_pipeline",
    "load_pipeline",
    "make_demo_model",
]


def __getattr__(name: str) -> Any:
    """Import diffusers only when it is needed."""
    for home in ("generation_settings", "load", "runner", "demo") if name in __all__ else ():
        module = import_module(f"halovae.pipelines.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'halovae.pipelines' has no attribute {name!r}")
