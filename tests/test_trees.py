"""Tensors in containers and objects of any kind: all are found, and copies are of the same kind."""

from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution

from halovae.base.errors import InputError
from halovae.base.trees import hidden_tensors, map_tensors, tensors_in

T = torch.arange(4.0).view(2, 2)


@dataclasses.dataclass(frozen=True)
class Frozen:
    sample: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    sample: Any
    scale: float = 2.0


class Slots:
    __slots__ = ("__hidden", "empty")

    def __init__(self, value: Any) -> None:
        self.__hidden = value


class Strict(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("it can't be changed")

    def __iter__(self) -> Any:
        return iter(())


class Named(list[Any]):
    pass


Pair = collections.namedtuple("Pair", "first second")


def of_several() -> dict[str, Any]:
    named = Named([T])
    named.more = [T + 1]  # type: ignore[attr-defined]
    return {
        "frozen dataclass": Frozen(T),
        "frozen dataclass with slots": FrozenSlots(T),
        "slots": Slots({"deep": [T]}),
        "strict dict": Strict(sample=T),
        "list with attributes": named,
        "named tuple": Pair(T, 1),
        "tuple of a torch function": torch.max(T, 0),
        "deque": collections.deque([T, 1], maxlen=2),
        "defaultdict": collections.defaultdict(list, sample=T),
        "OrderedDict": collections.OrderedDict(sample=T, other=2),
        "mapping proxy": types.MappingProxyType({"sample": T}),
        "namespace": types.SimpleNamespace(sample=T),
        "sets": {frozenset([T])},
        "chain of maps": collections.ChainMap({"sample": T}),
        "output class": DecoderOutput(sample=T),  # type: ignore[arg-type]
        "distribution": DiagonalGaussianDistribution(torch.zeros(1, 4, 2, 2)),
        "torch distribution": torch.distributions.Normal(T, T + 1),
    }


@pytest.mark.parametrize("name", of_several())
def test_every_kind_of_container(name: str) -> None:
    value = of_several()[name]
    before = tensors_in(value)
    copy = map_tensors(lambda t: t + 1, value)
    assert type(copy) is type(value)
    assert all(torch.equal(new, old + 1) for new, old in zip(tensors_in(copy), before, strict=True))
    assert before
    assert all(a is b for a, b in zip(tensors_in(value), before, strict=True)), "the original is as it was"
    assert list(hidden_tensors(copy)) == []


def test_details_are_kept() -> None:
    values = of_several()
    copies = map_tensors(lambda t: t + 1, values)
    assert copies["deque"].maxlen == 2
    assert copies["defaultdict"]["new"] == []
    assert list(copies["OrderedDict"]) == ["sample", "other"]
    assert copies["output class"].sample is copies["output class"]["sample"]
    assert not hasattr(copies["slots"], "empty")
    assert map_tensors(lambda t: t + 1, plain := {"a": [1, {2}], "b": Frozen(3)}) is plain


def test_what_is_in_two_places_or_holds_itself_is_replaced_once() -> None:
    holder = types.SimpleNamespace(one=T, two=[T])
    holder.me = holder
    copy = map_tensors(lambda t: t + 1, [holder, holder.two])
    assert copy[0].me is copy[0]
    assert copy[0].one is copy[0].two[0] is copy[1][0]
    assert len(tensors_in(copy)) == 1


def test_an_object_that_can_not_be_copied_is_named() -> None:
    class Once(types.SimpleNamespace):
        def __new__(cls, *args: Any, **kwargs: Any) -> Once:
            if not kwargs:
                raise TypeError("made once")
            return super().__new__(cls)

        def __reduce__(self) -> Any:
            raise TypeError("one is enough")

    with pytest.raises(InputError, match="a tensor is in a Once, of which no copy can be made: one is enough"):
        map_tensors(lambda t: t + 1, [Once(sample=T)])


def test_tensors_out_of_reach_are_seen() -> None:
    inside = T + 1

    def generate() -> Any:
        yield inside

    def later() -> Any:
        return inside

    for value, holder in (
        (generate(), "generator"), (later, "function"), ({inside: 1}, "dict"), (iter([inside]), "list_iterator"),
    ):  # fmt: skip
        found, *others = hidden_tensors([value, 1])
        assert found[0] == holder
        assert found[1] is inside
        assert others == []
