"""Libraries that keep silent: each rank would say the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from halovae.media.models import quiet as diffusers_quiet


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of diffusers, transformers and the hub: each rank would show them."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with diffusers_quiet():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
