"""What Ray does not promise to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import worker


@contextmanager
def silent() -> Iterator[None]:
    """Within it, a driver does not print what Ray's processes tell it of errors; options have no say in that."""
    told, worker.print_to_stdstream = worker.print_to_stdstream, lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = told
