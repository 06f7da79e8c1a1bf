"""Ray for one run: a local one that is started and ended with it, or a cluster that is there."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from halovae.app.launch import cores
from halovae.base.errors import InputError
from halovae.base.files import first_line

_QUIET = {
    "RAY_AUTH_MODE": "token",  # As by default, but without a word.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
_LEAST_STORE = 2**27
"""Bytes of the store that processes share clips by."""


@contextmanager
def cluster(address: str | None, devices: int, accelerators: int, largest: int) -> Iterator[None]:
    """Within it, Ray can be used.

    Args:
        address: of the cluster; None: start one here.
        devices: that clips are encoded on.
        accelerators: how many of them are accelerators.
        largest: bytes of the pixels of the largest unit.

    Raises:
        InputError: there is no cluster at this address.
    """
    os.environ |= {name: value for name, value in _QUIET.items() if name not in os.environ}
    common: dict[str, Any] = {
        "log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR, "include_dashboard": False,
    }  # fmt: skip
    folder = None
    if address is None:
        # Two units for each device and reader, and what they become.
        workers = readers(devices, accelerators)
        store = max(_LEAST_STORE, 3 * largest * (devices + workers))
        folder = tempfile.mkdtemp(prefix="halovae-ray-")
        common |= {
            "num_cpus": devices + workers + 1, "num_gpus": accelerators, "object_store_memory": store,
            "_temp_dir": folder,
        }  # fmt: skip
    else:
        common |= {"address": address}
        common.pop("include_dashboard")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        try:
            ray.init(**common)
        except Exception as error:  # Ray's own kinds, and those of the network.
            where = "a local Ray can't be started" if address is None else f"--ray-address {address} can't be reached"
            raise InputError(f"{where}: {first_line(error)}") from error
        _quiet_data()
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def readers(devices: int, accelerators: int) -> int:
    """Processes that read and write on this machine: on a CPU the devices need its cores themselves."""
    return max(1, cores() - accelerators if accelerators else cores() // 2)


def _quiet_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
