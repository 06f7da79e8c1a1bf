"""Any pipeline of diffusers on ranks: find it, load it, spread it, and call it for one video or picture after another.

Example:
    >>> setup = Setup(vae_mode="exact", ulysses_degree=2)
    >>> pipeline = load_pipeline(find_pipeline("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "text-to-video"), setup)
    >>> with Runner(pipeline, setup, comm.world(), device) as runner:
    ...     frames = runner.run(Generation(prompt="a cup of coffee")).frames
"""

from __future__ import annotations

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

_HOMES = {
    "TASKS": "generation_settings",
    "Generation": "generation_settings",
    "PipelineSource": "load",
    "Result": "runner",
    "Runner": "runner",
    "Setup": "generation_settings",
    "find_pipeline": "load",
    "load_pipeline": "load",
    "make_demo_model": "demo",
}


def __getattr__(name: str) -> Any:
    """Import diffusers only when it is needed."""
    if name not in _HOMES:
        raise AttributeError(f"module 'halovae.pipelines' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"halovae.pipelines.{_HOMES[name]}"), name)
