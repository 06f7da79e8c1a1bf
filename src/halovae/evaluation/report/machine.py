"""Where and with what a report was made."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("halovae", "torch", "diffusers", "av")


def machine() -> dict[str, str]:
    """Names and values, for people."""
    import torch

    from halovae.base.verdicts import processor

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    facts = {
        "Date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "System": platform.platform(),
        "Processor": f"{processor()}, {os.cpu_count()} cores",
        "Accelerator": "none" if accelerator is None else f"{torch.accelerator.device_count()} {accelerator.type}",
        "Python": platform.python_version(),
    }
    return facts | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
