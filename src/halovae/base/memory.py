"""How much memory a call took at its peak, how much is free, and whether an error says that it was too little."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

from halovae.base.errors import HalovaeError, TooLittleMemoryError
from halovae.base.private_torch import allocations, profile_memory

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_SHORTAGE = "out of memory", "can't allocate memory"
"""What backends say that have no error class for it."""


class PeakMemory:
    """The most memory in use since it was made: the accelerator's, or this process's resident memory on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = self._reset()
        self._before = self.read() or 0

    def read(self) -> int | None:
        """Bytes, or None where the system can't tell."""
        if not self._known:
            return None
        if self._device.type != "cpu":
            return _counted(self._device, "allocated_bytes", "peak")
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    @property
    def growth(self) -> int:
        """Bytes by which the peak is above what was in use at first; 0 where the system can't tell."""
        return max(0, (self.read() or 0) - self._before)

    def _reset(self) -> bool:
        if self._device.type != "cpu":
            module = torch.get_device_module(self._device)
            if not hasattr(module, "reset_peak_memory_stats"):
                return False
            module.reset_peak_memory_stats(self._device)
            return True
        try:
            _CLEAR.write_text("5")  # asks Linux to forget the highest resident size
        except OSError:
            return False
        return True


def _counted(device: torch.device, what: str, when: str) -> int:
    """What the device's allocator counts: "current" or "peak"."""
    module = torch.get_device_module(device)
    # The usual way sorts all that is counted, and takes a tenth of a millisecond for each answer.
    if hasattr(module, "memory_stats_as_nested_dict"):
        counts = module.memory_stats_as_nested_dict(device)
        return counts[what]["all"][when] if counts else 0
    return module.memory_stats(device).get(f"{what}.all.{when}", 0)


def allocated_by(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch allocates for a call and holds at once, at the most: results, and workspaces of libraries.

    The resident memory would not tell, since the C library reuses what has been freed.
    """
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
        before = _counted(device, "allocated_bytes", "current")
        call()
        return _counted(device, "allocated_bytes", "peak") - before
    profile_memory()
    try:
        call()
    finally:
        changes = allocations()
    return max(accumulate(changes), default=0)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a call may take, or None where the system can't tell."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if not hasattr(module, "mem_get_info"):
            return None
        # What the allocator keeps for later is free too.
        reserved, allocated = (_counted(device, f"{what}_bytes", "current") for what in ("reserved", "allocated"))
        return module.mem_get_info(device)[0] + reserved - allocated
    if not _MEMINFO.exists():
        return None
    lines = _MEMINFO.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def drop_frames(error: BaseException) -> None:
    """Let go of what the frames hold in which an exception was raised. Its traceback can be read as before."""
    known = set[int]()
    following: BaseException | None = error
    while following is not None and id(following) not in known:
        known.add(id(following))
        traceback.clear_frames(following.__traceback__)
        following = following.__cause__ or following.__context__


def is_shortage(error: BaseException) -> bool:
    """Whether an exception on this rank says that there is not enough memory."""
    if isinstance(error, HalovaeError):  # Of another rank's error only the words are here.
        return isinstance(error, TooLittleMemoryError)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORTAGE)
