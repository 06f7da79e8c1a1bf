"""Kernels that others compile are found on disk, and were not launched before; without a device.

Run by a test, since Triton decides at its import whether it interprets or compiles.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from halovae.kernels.gpu import compiled_ahead, triton_chain, triton_copy
from halovae.kernels.gpu.compiled_ahead import compiled_ahead as ahead

found: list[tuple[str, bool]] = []


class Device:
    """As much of a driver as it takes to ask for a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def strange(x):  # pyright: ignore
    pass


def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
    found.append((src.name, cache_hit))


def launch(out: torch.Tensor) -> None:
    source = torch.ones(40, 16, dtype=torch.bfloat16)
    triton_chain.run(source, out, silu=True)
    triton_chain.run(source[:30], out, silu=True)  # the same kernel
    triton_chain.run(source, out, plus=1.0)
    triton_copy.run(source.view(1, 5, 8, 16), out.view(1, 5, 8, 16))


driver.set_active(Device())  # pyright: ignore[reportArgumentType]
knobs.compilation.listener = listen
out = torch.zeros(40, 16, dtype=torch.bfloat16)
started = time.perf_counter()
with ahead(workers=2):
    assert compiled_ahead.are_noted()
    launch(out)
    with suppress(AttributeError):  # of the driver, which can't launch
        strange[(1,)](out)
assert not compiled_ahead.are_noted()
assert not out.any()
assert found == [("strange", False)], found  # Kernels of others are theirs.
print(f"{time.perf_counter() - started:.1f} s")
for kernel in (triton_chain._chain, triton_copy._copy_rows):
    assert not kernel.device_caches[0][0]
found.clear()
for _ in range(3):
    with suppress(AttributeError):
        launch(out)
print(found)
