"""What the first kernels of a process wait for, done beside other work."""

from __future__ import annotations

import functools
import threading
from contextlib import suppress

import torch

from halovae.kernels.gpu import support


@functools.cache
def get_ready(device: torch.device) -> None:
    """Begin to make a device ready, once in a process, and return at once. Where it takes no kernels, do nothing."""
    if support.supports(device):
        threading.Thread(target=_get_ready, args=(device,), name="halovae ready", daemon=True).start()


def _get_ready(device: torch.device) -> None:
    with suppress(Exception), torch.no_grad():  # Whatever fails here fails where it is needed, or is not needed.
        # Before its first kernel Triton reads all of its own library, of some hundred megabytes, to name its cache.
        from triton.runtime.cache import triton_key  # pyright: ignore[reportMissingImports]
        from triton.runtime.driver import driver  # pyright: ignore[reportMissingImports]

        triton_key()
        # The convolutions of cuDNN are loaded by the first one.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            # On a new machine Triton first compiles a program in C that asks the device for things.
            driver.active.get_current_target()
            picture = torch.zeros(1, 8, 3, 4, 4, dtype=torch.bfloat16, device=device)
            torch.nn.functional.conv3d(picture, picture[:, :, :1, :1, :1])
