"""Small pictures and a small VAE for the tests of the contract, and how far two results are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor


def kl(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    return FAMILIES["kl"].build(seed).to(dtype)


def pixels(height: int = 40, width: int = 56, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(rows: int = 5, cols: int = 7, batch: int = 2, seed: int = 2) -> Tensor:
    return torch.randn(batch, 4, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@contextlib.contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[Any]:
    with pytest.raises(kind, match=text) as caught:
        yield caught


# ---- signatures and values ------------------------------------------------------------------------------------------
