"""Libraries that keep silent: each rank would say the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of diffusers and the hub."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import logging as hub_logging

    with _silent(diffusers_logging), _silent(hub_logging), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def all_quiet() -> Iterator[None]:
    """The same, and none of transformers, which only whole pipelines import."""
    from transformers.utils import logging as transformers_logging

    with quiet(), _silent(transformers_logging):
        yield


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """As the `logging` modules of these libraries have it; the hub's knows no bars."""
    level, bars = logging.get_verbosity(), hasattr(logging, "enable_progress_bar") and logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
