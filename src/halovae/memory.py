"""How much memory a call took at its peak."""

from __future__ import annotations

from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The most memory in use since it was made: the accelerator's, or this process's resident memory on a CPU.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = self._reset()

    def read(self) -> int | None:
        """Bytes, or None where the system can't tell."""
        if not self._known:
            return None
        if self._device.type != "cpu":
            return torch.get_device_module(self._device).max_memory_allocated(self._device)
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

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
