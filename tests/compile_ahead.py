"""Kernels that are compiled ahead are those that are launched, and are found on disk; without a device.

Run by a test, since Triton decides at its import whether it interprets or compiles.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from diffusers import AutoencoderKL
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from halovae.calls import compile_kernels
from halovae.calls.target import Target
from halovae.exact.mesh import Mesh, plan_shards
from halovae.exact.run import run_sharded
from halovae.kernels import convolution, fast_arithmetic, fast_rules, fast_views
from halovae.kernels.gpu import compiled_ahead, support, triton_chain, triton_copy
from halovae.kernels.kept import Kept
from halovae.kernels.lazy import chain, upsampled

Jobs = set[tuple[str, ...]]
CALL = "00ff"
CPU = torch.device("cpu")


class Device:
    """As much of a driver as it takes to ask for a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def inner(x):  # pyright: ignore
    return x


@triton.jit
def strange(x, FUNCTION: tl.constexpr):  # pyright: ignore
    tl.store(x, FUNCTION(0.0))


def found(launch: Callable[[], Any]) -> list[tuple[str, bool]]:
    """The kernels that are asked for, and whether each was on disk."""
    seen: list[tuple[str, bool]] = []

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        seen.append((src.name, cache_hit))

    # The error is that of the driver, which can't launch.
    with patch.object(knobs.compilation, "listener", listen), suppress(AttributeError):
        launch()
    return seen


def others_compile_and_nothing_is_launched() -> None:
    source, out = torch.ones(40, 16, dtype=torch.bfloat16), torch.zeros(40, 16, dtype=torch.bfloat16)
    launches = [
        functools.partial(triton_chain.run, source, out, silu=True),
        functools.partial(triton_copy.run, source.view(1, 5, 8, 16), out.view(1, 5, 8, 16)),
        functools.partial(triton_chain.run, source[:30], out, silu=True),  # the same kernel again
    ]
    assert not compiled_ahead.are_compiled(CALL)
    with patch.object(CompiledKernel, "run", None):  # What passes arguments on to a kernel takes a device.
        with compiled_ahead.compiled_ahead(CPU, 2) as asked:
            for launch in launches:
                assert found(launch) == []
            asked.name = CALL
        threads = [threading.Thread(target=compiled_ahead.wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # Kernels of others, whose constants may be anything, have nothing to do with it.
    assert found(lambda: strange[(1,)](out, inner)) == [("strange", False)]
    assert compiled_ahead.are_compiled(CALL)
    assert not out.any()
    assert [*map(found, launches)] == [[], [], []]


@contextmanager
def only_noted(jobs: Jobs) -> Iterator[None]:
    """Instead of being compiled, kernels are taken note of."""

    def note(compile_fn: Callable[[], Any], _: Any) -> None:
        source = inspect.getclosurevars(compile_fn).nonlocals["src"]
        jobs.add((source.name, source.hash()))

    with patch.object(compiled_ahead, "_compile", note), Kept().in_use():
        yield
        compiled_ahead.wait()


def a_small_picture_asks_for_the_kernels_of_a_large_one(half: str, picture: Tensor, ratio: int, ranks: int) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(32, 64), latent_channels=4).bfloat16().requires_grad_(False)
    target, plan = Target(vae), plan_shards(*picture.shape[-2:], ratio, ranks, "height")
    small, large, again = Jobs(), Jobs(), Jobs()
    with only_noted(small):
        compile_kernels.compile_kernels(target, half, 0, plan, lambda: ratio, (picture,), {})
    mesh = Mesh(compile_kernels._Absent(0, ranks), plan.shape)
    with only_noted(large), compiled_ahead.compiled_ahead(CPU, 1):
        run_sharded(mesh, functools.partial(target.run_untiled, half), (picture,), {}, plan.bounds)
    assert {"_chain", "_moments", "_merge"} <= {name for name, _ in large}
    assert large <= small, large - small
    with patch.object(compile_kernels, "are_compiled", lambda _: True), only_noted(again):
        compile_kernels.compile_kernels(target, half, 0, plan, lambda: ratio, (picture,), {})
    assert not again


if __name__ == "__main__":
    driver.set_active(Device())  # pyright: ignore[reportArgumentType]
    support.supports = lambda _: True
    for module in (chain, convolution, fast_arithmetic, fast_rules, fast_views, upsampled):
        module.device_type = lambda _: "cuda"
    support.is_hopper = lambda _: False
    compile_kernels._cores = lambda: 8
    torch.set_num_threads(1)
    with torch.no_grad():
        a_small_picture_asks_for_the_kernels_of_a_large_one("encode", torch.randn(1, 3, 272, 304).bfloat16(), 2, 1)
        a_small_picture_asks_for_the_kernels_of_a_large_one("decode", torch.randn(1, 4, 100, 72).bfloat16(), 1, 2)
        others_compile_and_nothing_is_launched()  # Now they are compiled: the other two would find them.
