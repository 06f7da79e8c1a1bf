"""Random generators that a call may draw from, as one thing to save and rewind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from halovae.base.trees import walk
from halovae.comm import default_generator


class Generators:
    """The default generators and those passed as arguments, with the states they are in now."""

    def __init__(self, device: torch.device, *values: Any) -> None:
        found = [default_generator(torch.device("cpu"))]
        if not _is_capturing(device):  # A graph's numbers are drawn when it is replayed; its generator tells nothing.
            found.append(default_generator(device))
        found += [value for value in walk(values) if isinstance(value, torch.Generator)]
        self._states = [(generator, generator.get_state()) for generator in {id(g): g for g in found}.values()]

    def have_drawn(self) -> bool:
        """Whether a number has been drawn from one of them since."""
        return any(not torch.equal(generator.get_state(), state) for generator, state in self._states)

    def rewind(self) -> None:
        """Bring all of them back to the states they were in."""
        for generator, state in self._states:
            generator.set_state(state)

    def seed(self, seed: int) -> None:
        """Start all of them from one seed."""
        for generator, _ in self._states:
            generator.manual_seed(seed)


def _is_capturing(device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return False
    asked: Any = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return asked is not None and asked()


@contextmanager
def rewound_by_failure(device: torch.device, *values: Any) -> Iterator[None]:
    """After an exception in it, generators are as before it, so that the same call can be made again."""
    generators = Generators(device, *values)
    try:
        yield
    except BaseException:
        generators.rewind()
        raise


@contextmanager
def frozen_generators(device: torch.device) -> Iterator[None]:
    """Within it, random numbers start from seed 0; afterwards the generators are as they were."""
    generators = Generators(device)
    generators.seed(0)
    try:
        yield
    finally:
        generators.rewind()
