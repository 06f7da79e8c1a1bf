"""Ray for one run: a local one that is started and ended with it, or a cluster that is there."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch

from halovae.app.launch import cores
from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.base.memory import free_bytes

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # What fails is told by what it returns.
    # Each of its processes would measure itself all the time.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # As this process: by Ray's own 15, devices would wait for their readers wherever anything else runs.
    "RAY_worker_niceness": "0",
}
_ANSWER = 10.0
"""Seconds that a cluster gets to answer."""
_LEAST_STORE = 2**27
_SHARE = 0.3
"""Of the free memory, for the store at the most."""


@contextmanager
def cluster(address: str | None, devices: int, accelerators: int, largest: int) -> Iterator[None]:
    """Within it, Ray can be used. What this process is connected to already is used, and stays as it is.

    Args:
        address: of the cluster; None: start one here.
        devices: that clips are encoded on.
        accelerators: how many of them are accelerators.
        largest: bytes of the pixels of the largest unit.

    Raises:
        InputError: there is no cluster at this address.
    """
    data = _data_context()
    if ray.is_initialized():
        yield
        return
    os.environ |= {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
    folder = None
    if address is None:
        data.override_object_store_memory_limit_fraction = 0.9  # Nobody else puts anything into this store.
        workers = readers(devices, accelerators)
        folder = tempfile.mkdtemp(prefix="halovae-ray-")
        # Ray lets only those in who know a word, which it would keep in the user's home.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options |= {
            "num_cpus": devices + workers + 1, "num_gpus": accelerators, "include_dashboard": False,
            "object_store_memory": store_bytes(devices + workers, largest), "_temp_dir": folder,
        }  # fmt: skip
    else:
        _check_address(address)
    try:
        try:
            with _no_words(), _signals_stay():
                ray.init(address, **options)
        except Exception as error:  # Ray's own kinds, and those of the network.
            where = "a local Ray can't be started" if address is None else f"--ray-address {address} can't be reached"
            raise InputError(f"{where}: {first_line(error)}") from error
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def store_bytes(processes: int, largest: int) -> int:
    """Of the store that processes share clips by, three units of `largest` bytes for each device and reader: one in
    work, one before it and one behind it. Ray does not start where it leaves too little memory; what does not fit into
    it goes to a disk for a while."""
    free = free_bytes(torch.device("cpu"))
    return max(_LEAST_STORE, min(3 * largest * processes, int(_SHARE * (free or sys.maxsize))))


def _check_address(address: str) -> None:
    """Refuse an address where nobody answers: Ray would go on asking.

    Raises:
        InputError: it is none, or nobody does.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal():
        raise InputError(f"--ray-address {address}: give auto, or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray-address {address} can't be reached: {first_line(error)}") from error


@contextmanager
def _no_words() -> Iterator[None]:
    """Within it, nothing is shown of what Ray's native code writes to standard error, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _signals_stay() -> Iterator[None]:
    """Around what takes SIGTERM for itself."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def readers(devices: int, accelerators: int) -> int:
    """Processes that read and write on this machine: on a CPU the devices need its cores themselves."""
    return max(1, cores() - accelerators if accelerators else cores() // 2)


def _data_context() -> Any:
    from ray.data import DataContext

    context: Any = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # A large clip on a slow device takes its time.
    # Ray keeps half of the store in equal parts for all steps, also for those whose results are small: too little is
    # left for the clips that have to be read at once, and devices wait.
    context.op_resource_reservation_ratio = 0.1
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return context
