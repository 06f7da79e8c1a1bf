"""Links and devices of known speed, so that a prediction hangs on the work to do and not on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from halovae import comm
from halovae.api import auto
from halovae.comm import bandwidth as links
from halovae.predict.rates import GivenSpeed

BANDWIDTH = 1e9
"""Bytes per second, of the link."""


@contextmanager
def given_speeds(latency: float, measured: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within it, `mode="auto"` predicts with this link, and with a device that takes as long as its arithmetic does.

    Exact mode is the faster one on a quick link then: tiles overlap, so they are more work. `measured` makes another
    device.
    """
    key, before = comm.connect().key, auto.MeasuredSpeed
    links._measured[key] = links.LinkSpeed(latency=latency, bandwidth=BANDWIDTH)
    auto.MeasuredSpeed = measured or (lambda *kind: GivenSpeed(flops=1e9, bandwidth=1e9))
    try:
        yield
    finally:
        auto.MeasuredSpeed = before
        del links._measured[key]
