"""What the kernels make of weights: anew when they change, for each order in memory, and not too much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from shards import assert_same, draw
from torch import Tensor

from halovae.kernels import packed, weights
from halovae.kernels.mode import FastMode


@pytest.mark.parametrize("change", ["in place", "behind torch's back", "replaced"])
def test_a_changed_weight_is_noticed(change: str) -> None:
    weight = torch.nn.Parameter(draw(6, 4, 3, 3, dtype=torch.float32), requires_grad=False)
    x = draw(2, 4, 12, 9, dtype=torch.float32)

    def both() -> tuple[Tensor, Tensor]:
        with FastMode():
            found = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1), F.conv2d(x, weight)
        return found[0], found[1]

    before = both()
    if change == "in place":
        weight.mul_(3)
    elif change == "behind torch's back":
        weight.data.mul_(3)
    else:
        weight.data = weight.data * 3
    for old, new in zip(before, both(), strict=True):
        assert_same(new, 3 * old, 1e-5)


def geometry(weight: Tensor, rows: int, columns: int) -> packed.Geometry:
    source = (1, weight.shape[1], rows, columns)
    return packed.Geometry(tuple(weight.shape), weight.dtype, source, (1, 1), (0, 0), (1, 1))


def prepare(weight: Tensor, rows: int, columns: int, calls: list[int]) -> Tensor:
    """As a convolution of one piece, which notes its rows where it makes a weight."""
    made: dict[bytes | None, Tensor] = {}
    return packed.prepared(
        weight, "kind", lambda: (calls.append(rows), weight)[1], geometry(weight, rows, columns), made
    )


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Room for weights alone, from none on."""
    weights.forget()
    yield weights.make_room
    weights.forget()


def test_weights_are_packed_once_for_all_sizes_that_ask_for_the_same_order(room: Callable[[int], None]) -> None:
    weight, calls = draw(64, 64, 3, 3, dtype=torch.float32), list[int]()
    room(1 << 20)
    for rows in (20, 30, 20, 41, 30):
        prepare(weight, rows, 34, calls)
    orders = {packed.order_of(geometry(weight, rows, 34), torch.get_num_threads()) for rows in (20, 30, 41)}
    assert len(calls) == len(orders)


def test_a_weight_in_another_order_is_not_taken(room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe's tiny picture may ask for an order that makes a real one many times slower."""
    weight, calls = draw(64, 64, 3, 3, dtype=torch.float32), list[int]()
    room(1 << 20)
    monkeypatch.setattr(packed, "order_of", lambda geometry, threads: bytes(geometry.source[2] < 5))
    for rows in (4, 20, 3, 30):
        prepare(weight, rows, 34, calls)
    assert calls == [4, 20]


def test_what_is_kept_of_weights_takes_no_more_than_the_largest_picture(room: Callable[[int], None]) -> None:
    some = [draw(64, 64, 3, 3, dtype=torch.float32) for _ in range(4)]
    for picture_bytes in (0, some[0].nbytes, 3 * some[0].nbytes, 2 * some[0].nbytes):
        room(picture_bytes)
        for weight in some:
            prepare(weight, 20, 34, [])
    assert weights.kept_bytes() == 3 * some[0].nbytes
    calls: list[int] = []
    for weight in some:
        prepare(weight, 20, 34, calls)
    assert len(calls) == 1


def test_pieces_of_one_picture_share_what_was_made_for_them(room: Callable[[int], None]) -> None:
    weight, calls, made = draw(64, 64, 3, 3, dtype=torch.float32), list[int](), dict[bytes | None, Tensor]()
    for _ in range(3):
        packed.prepared(weight, "kind", lambda: (calls.append(1), weight)[1], geometry(weight, 20, 34), made)
    assert calls == [1]


@pytest.mark.parametrize("taps", [(3, 3), (3, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_outweighs_the_picture_is_left_as_it_is(
    room: Callable[[int], None], taps: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Unless there is room to keep it packed."""
    weight, x = draw(40, 48, *taps, dtype=dtype), draw(2, 48, *(1 for _ in taps), dtype=dtype)
    ones, padding = (1,) * len(taps), (1,) * len(taps)
    shape = packed.Geometry(tuple(weight.shape), dtype, tuple(x.shape), ones, padding, ones)
    assert shape.is_light
    assert not replace(shape, source=(2, 48, *(9 for _ in taps))).is_light
    convolution = F.conv2d if len(taps) == 2 else F.conv3d
    for size, packs in ((0, False), (weight.nbytes, True)):
        room(size)
        made = packed.prepared(weight, "kind", lambda: weight, shape, {})
        assert made.is_mkldnn == packs
        found = packed.convolve(x, made, None, ones, padding, ones)
        # One rounding of a sum that torch may add up in another order.
        assert_same(found, convolution(x, weight, padding=padding), 1e-2 if dtype == torch.bfloat16 else 1e-5)
