"""Peaks and shortages are seen, and what calls have taken tells what others will."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from halovae.base.errors import RankFailedError, TooLittleMemoryError
from halovae.base.memory import PeakMemory, free_bytes, is_shortage

GIB = 2**30


def test_a_peak_is_seen() -> None:
    memory = PeakMemory(torch.device("cpu"))
    if memory.read() is None:
        pytest.skip("the system does not tell")
    held = torch.ones(300 * 2**20, dtype=torch.uint8)
    assert memory.growth >= 0.9 * held.nbytes


def test_free_memory_is_known() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20


def allocate(size: int) -> None:
    torch.empty(size, dtype=torch.uint8)


@pytest.mark.parametrize("take", [lambda: allocate(2**60), lambda: bytes(2**62)], ids=["torch", "python"])
def test_a_shortage_is_known(take: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        take()
    assert is_shortage(caught.value)


def test_what_is_no_shortage() -> None:
    assert is_shortage(torch.OutOfMemoryError("80 GiB"))
    assert is_shortage(TooLittleMemoryError("80 GiB"))
    assert not is_shortage(RuntimeError("shapes differ"))
    assert not is_shortage(RankFailedError(1, "OutOfMemoryError: out of memory"))
