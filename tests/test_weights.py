"""What the kernels make of weights: anew when they change, and for each size of a piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shards import assert_same, draw
from torch import Tensor

from halovae.kernels import kept as weights
from halovae.kernels.cpu import packed
from halovae.kernels.fast_mode import FastMode
from halovae.kernels.kept import Kept, apart


def _by_data(weight: Tensor) -> None:
    weight.data[2, 1, 0, 0] += 5


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "one element behind torch's back": _by_data,
    "replaced": lambda weight: setattr(weight, "data", weight.data * 3),
    "transposed": lambda weight: setattr(weight, "data", weight.data.transpose(2, 3)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (5, 3, 3, 3)])
def test_a_changed_weight_is_noticed(
    kept: Callable[[], int], change: str, inference: bool, shape: tuple[int, ...]
) -> None:
    """Folded into an upsampling, packed, and in another order in memory."""
    with torch.inference_mode(inference):
        weight = torch.nn.Parameter(draw(*shape, dtype=torch.float32), requires_grad=False)
        last = torch.nn.Parameter(weight.detach().clone(memory_format=torch.channels_last), requires_grad=False)
        x = draw(2, shape[1], 12, 9, dtype=torch.float32)

        def run(*weights: Tensor) -> list[Tensor]:
            return [F.conv2d(F.interpolate(x, scale_factor=2.0), w, padding=1) for w in weights] + [
                F.conv2d(x, w) for w in weights
            ]

        with FastMode():
            run(weight, last)
            assert kept()
        assert not kept()
        for each in (weight, last):
            CHANGES[change](each)
        with FastMode():
            found = run(weight, last)
            if not inference:  # Within a call too, where torch counts it.
                weight.add_(1)
                found += run(weight)
        expected = run(weight - 1 if not inference else weight, last) + ([] if inference else run(weight))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, 1e-5)


class Wrapped(torch.nn.Parameter):
    """As classes of quantized weights do: its memory is not what it stands for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            return func(*(arg * 2 if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


def test_a_weight_that_is_more_than_its_memory_answers_for_itself() -> None:
    weight, x = draw(5, 4, 3, 3, dtype=torch.float32), draw(2, 4, 12, 9, dtype=torch.float32)
    with FastMode():
        found = F.conv2d(x, Wrapped(weight, requires_grad=False))
        folded = F.conv2d(F.interpolate(x, scale_factor=2.0), Wrapped(weight, requires_grad=False), padding=1)
    assert_same(found, 2 * F.conv2d(x, weight), 1e-5)
    assert_same(folded, 2 * F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1), 1e-5)


def test_a_prediction_and_another_handle_leave_alone_what_is_kept(kept: Callable[[], int]) -> None:
    """Interleaved in one thread and in another one: each begins with nothing, and finds its own again."""
    weight, calls = draw(4, 4), list[int]()

    def ask() -> None:
        weights.derived(weight, "kind", lambda: (calls.append(1), weight + 1)[1])

    def other() -> None:
        with Kept().in_use():
            assert kept() == 0
            ask()
            weights.end_call()

    ask()
    with apart():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        other()
        ask()
    assert kept() == 1
    ask()
    assert len(calls) == 4


def geometry(weight: Tensor, rows: int, columns: int) -> packed.Geometry:
    source = (1, weight.shape[1], rows, columns)
    return packed.Geometry(tuple(weight.shape), weight.dtype, source, (1, 1), (0, 0), (1, 1))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Weights are kept, as on an accelerator, from none on: how many things there are."""
    monkeypatch.setattr(weights, "device_type", lambda device: "cuda")
    with Kept().in_use():
        yield lambda: sum(len(made.by_kind) for made in weights.kept().weights.values())


def test_pieces_of_one_size_share_what_was_made_for_them() -> None:
    """One in the order that another size asks for may make a convolution many times slower."""
    weight, calls, made = draw(64, 64, 3, 3, dtype=torch.float32), list[int](), dict[packed.Geometry, Tensor]()
    for rows in (20, 20, 20, 7):
        packed.prepared(weight, "kind", lambda: (calls.append(1), weight)[1], geometry(weight, rows, 34), made)
    assert len(calls) == 2
    assert len(made) == 1


@pytest.mark.parametrize("taps", [(3, 3), (3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_outweighs_the_picture_is_left_as_it_is(taps: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, x = draw(40, 48, *taps, dtype=dtype), draw(2, 48, *(1 for _ in taps), dtype=dtype)
    ones, padding = (1,) * len(taps), (1,) * len(taps)
    shape = packed.Geometry(tuple(weight.shape), dtype, tuple(x.shape), ones, padding, ones)
    assert shape.is_light
    assert not replace(shape, source=(2, 48, *(9 for _ in taps))).is_light
    convolution = F.conv2d if len(taps) == 2 else F.conv3d
    made = packed.prepared(weight, "kind", lambda: weight, shape, {})
    assert made is weight
    found = packed.convolve(x, made, None, ones, padding, ones)
    # One rounding of a sum that torch may add up in another order.
    assert_same(found, convolution(x, weight, padding=padding), 1e-2 if dtype == torch.bfloat16 else 1e-5)
