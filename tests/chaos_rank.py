"""One run of the chaos test, as seen by one rank: a call with a fault in it, and a call after it."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from families import FAMILIES, run_decode, run_encode
from tiles import CUTS, run_alone
from torch import Tensor

import halovae

PATIENCE = 2.0
"""Seconds without a sign of life after which a rank counts as stopped."""
STOPPED = 6.0
"""Seconds that a stopped rank stays so."""


EXACT = ("kl", "tiny", "vq", "kvae", "flux2", "wan21", "magvit", "temporal_decoder")
TILE = ("kl", "tiny", "wan21")
"""Families that are quick to run."""

# What is imported here, before the ranks part, is not imported again by each of them, nor looked through for garbage.
for _name in EXACT:
    getattr(diffusers, FAMILIES[_name].model)
gc.freeze()
faulthandler.register(signal.SIGUSR1)  # How `chaos.py` asks a rank that hangs where it is.
diffusers.logging.set_verbosity_error()


class Boom(Exception):
    """What no other code raises."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What happens in one run."""

    family: str
    mode: str
    half: str
    rows: int
    """Latent rows of the picture (exact mode)."""
    cols: int
    axis: Any
    size: int | None
    gather: str
    verify: bool
    warm: bool
    """Whether a call without a fault goes before."""
    fault: str
    victim: int
    place: str
    """"module" or "exchange": what is counted until the fault."""
    moment: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank saw."""

    first: str
    """"right", "wrong", or the name of the exception."""
    blamed: int | None
    """The rank that a `RankFailedError` names."""
    cause: bool
    """Whether this rank's own exception is, or comes from, the fault."""
    fired_at: float | None
    """When this rank did what the fault says, in seconds since the epoch."""
    ended_at: float
    second: str
    leaks: str
    details: str


@torch.no_grad()
def run(rank: int, spec: Spec) -> Outcome:
    """Called on every rank."""
    vae, picture, expected = _prepared(spec.family, spec.mode, spec.half, spec.rows, spec.cols)
    before = _held()
    handle = halovae.parallelize(
        vae, mode=spec.mode, axis=spec.axis, size=spec.size, gather=spec.gather, verify=spec.verify, timeout=PATIENCE
    )
    if spec.warm:
        _outcome(spec, handle, vae, picture, expected)
    fault = _Fault(spec, vae, handle) if rank == spec.victim else None
    first, error = _outcome(spec, handle, vae, fault.input(picture) if fault else picture, expected)
    ended_at = time.time()
    if fault:
        fault.disarm()
    if spec.fault == "stop":
        time.sleep(max(0.0, STOPPED + 2 - (time.time() - ended_at)))
    second, problem = _outcome(spec, handle, vae, picture, expected)
    handle.restore()
    seen = {
        "first": first, "second": second, "blamed": getattr(error, "rank", None), "cause": _comes_from_fault(error),
        "fired_at": fault.fired_at if fault else None, "ended_at": ended_at, "details": f"{error} / {problem}",
    }  # fmt: skip
    del handle, fault, error, problem  # They hold what has been used.
    return Outcome(**seen, leaks=_leaks(before))


@functools.lru_cache(maxsize=8)
def _prepared(family: str, mode: str, half: str, rows: int, cols: int) -> tuple[Any, Tensor, Tensor]:
    """A VAE, a picture for one of its halves, and what the VAE alone makes of it."""
    if mode == "tile":
        cut = CUTS[family]
        vae = cut.build()
        picture = cut.picture(half)
        expected = run_alone(cut, vae, half, picture)
        return vae, picture, expected
    row = FAMILIES[family]
    vae = row.build().to(torch.float64)
    ratio = row.ratio[0] if half == "encode" else 1
    shape = (*(row.sample_shape if half == "encode" else row.latent_shape)[:-2], rows * ratio, cols * ratio)
    picture = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    return vae, picture, run_encode(vae, picture) if half == "encode" else run_decode(row, vae, picture)


def _outcome(spec: Spec, handle: Any, vae: Any, picture: Tensor, expected: Tensor) -> tuple[str, Exception | None]:
    row = FAMILIES[spec.family]
    try:
        found = run_encode(vae, picture) if spec.half == "encode" else run_decode(row, vae, picture)
    except Exception as error:
        return type(error).__name__, error
    if spec.mode == "exact" and handle.last.extents["height"][1] != expected.shape[-2] and not found.numel():
        return "right", None  # A spare rank, or one of "first" or "shard", whose part is checked below.
    if found.shape != expected.shape:
        if spec.mode == "tile" and not found.numel():
            return "right", None
        (top, bottom), (left, right) = handle.last.extents["height"], handle.last.extents["width"]
        expected = expected[..., top:bottom, left:right]
    if found.shape != expected.shape:
        return "wrong", None
    gap = float((found - expected).abs().max() / expected.abs().max()) if found.numel() else 0.0
    tolerance = row.encode_tolerance if spec.half == "encode" else row.decode_tolerance
    return ("right" if gap <= (tolerance if spec.mode == "exact" else 0.0) else f"wrong by {gap:.1e}"), None


class _Fault:
    """Waits for its moment in the network's modules or the exchanges of this rank."""

    def __init__(self, spec: Spec, vae: Any, handle: Any) -> None:
        self.fired_at: float | None = None
        self._spec, self._comm, self._count = spec, handle._comm, 0
        self._hooks: list[Any] = []
        if spec.fault in ("none", "shape", "dtype", "value"):
            return
        if spec.place == "module":
            self._hooks = [module.register_forward_pre_hook(lambda *_: self._step()) for module in vae.modules()]
        else:
            self._comm.post = self._counted(self._comm.post)

    def input(self, picture: Tensor) -> Tensor:
        """The picture that this rank passes."""
        if self._spec.fault == "shape":
            return picture[..., :-2, :]
        if self._spec.fault == "dtype":
            return picture.to(torch.bfloat16)
        return torch.randn_like(picture) if self._spec.fault == "value" else picture

    def disarm(self) -> None:
        for hook in self._hooks:
            hook.remove()
        vars(self._comm).pop("post", None)

    def _counted(self, post: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._step()
            return post(*args, **kwargs)

        return counted

    def _step(self) -> None:
        self._count += 1
        if self._count == self._spec.moment:
            self.fired_at = time.time()
            getattr(self, f"_{self._spec.fault}")()

    def _raise(self) -> None:
        raise Boom("the weather is bad")

    def _memory(self) -> None:
        raise torch.OutOfMemoryError("Boom: out of memory")

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _exit(self) -> None:
        os._exit(3)

    def _slow(self) -> None:
        time.sleep(PATIENCE + 1)

    def _stop(self) -> None:
        subprocess.Popen(["sh", "-c", f"sleep {STOPPED}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)


def _comes_from_fault(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Boom) or "Boom" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _held() -> tuple[int, int]:
    """Threads and open files of this process."""
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def _leaks(before: tuple[int, int]) -> str:
    """What is held more than before; sockets are closed by threads of the backend, a little later."""
    for _ in range(40):
        now = _held()
        if now <= before:
            return ""
        time.sleep(0.05)
    return f"{before} threads and files became {now}"
