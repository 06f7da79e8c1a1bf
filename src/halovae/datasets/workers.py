"""The work on units, step by step, each in a process of its own: look, read, encode on a device, write. Without Ray."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from halovae.base.errors import HalovaeError, RankFailedError
from halovae.base.files import first_line
from halovae.base.options import UNTIMED
from halovae.datasets.buckets import look, take
from halovae.datasets.formats import BEGUN, told
from halovae.datasets.items import Item
from halovae.datasets.units import Job, Unit

Row = dict[str, Any]
DONE, THERE, FAILED, MEMORY, STOP = "done", "there", "failed", "memory", "stop"
"""What became of an item: encoded; found finished; set aside; too large for its devices; or nothing, since the run
can't go on."""
_ENDS = 2
"""Processes that may end while they are at an item: Ray would start one after the other, without end."""
_ENCODER_ENDS = 5
"""While they encode clips together. Then these go one by one, and may have other last bits than together: so it takes
more than the few kills from outside that one run may see."""


class DeadlyError(HalovaeError):
    """Processes have ended while they were at it."""


@contextmanager
def begun(folder: Path, name: str, most: int = _ENDS) -> Iterator[None]:
    """Within it, a file tells who comes next if this process ends.

    Args:
        folder: of such files, the same for all machines.
        name: of what is begun.
        most: so many processes may have ended at it.

    Raises:
        DeadlyError: as many processes as may have ended at it before.
    """
    mark = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
    ends = 0
    with suppress(OSError), mark.open("ab") as file:  # A disk is no fault of the item.
        ends = file.tell()
        file.write(b".")
    try:
        if ends >= most:
            raise DeadlyError(f"it has ended {ends} processes that were at it")
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def look_at(row: Row, fps: str | None, marks: Path) -> Row:
    """What the header of an item says, or why it can't be read."""
    item: Item = pickle.loads(row["item"])
    found: dict[str, Any] = {"key": item.key}
    try:
        with begun(marks, item.key):
            found |= vars(look(item, None if fps is None else Fraction(fps)))
    except Exception as error:  # Whatever a broken file makes of a decoder.
        found["why"] = reason_of(error)
    return {"seen": json.dumps(found)}


def read_unit(row: Row, job: Job) -> Row:
    """Decode the clips of a unit; one that fails leaves a gap."""
    unit: Unit = pickle.loads(row["unit"])
    fps = None if job.fps is None else Fraction(job.fps)
    size, told_of, why = unit.bucket, list[Any](), list[str | None]()
    pixels = np.zeros((len(unit.items), size.frames, size.height, size.width, 3), np.uint8)
    for place, item, wanted in zip(pixels, unit.items, unit.wanted, strict=True):
        taken, fault = None, None
        # A worker that did this before may have died after it: what is written is not made again.
        if wanted and not job.layout.place(item, size).exists():
            try:
                with begun(job.layout.root / BEGUN, item.key):
                    taken = told(take(item, size, fps, place))
            except Exception as error:  # As in `look_at`.
                fault = reason_of(error)
        told_of.append(taken)
        why.append(fault)
    if not any(told_of):
        pixels = pixels[:0]
    return {"unit": row["unit"], "read": json.dumps({"told": told_of, "why": why}), "pixels": pixels}


class Device:
    """A device with the VAE on it, alone or as a rank of a group.

    With two threads that call `encode`, one brings its clips to the device while those of the other are encoded.
    """

    def __init__(self, job: Job, rank: int = 0, ranks: int = 1, address: tuple[str, int] = ("", 0)) -> None:
        import torch

        from halovae import comm
        from halovae.api.parallelize import optimize, parallelize
        from halovae.media import models, vae_limits

        torch.set_num_threads(job.threads)
        self._marks = job.layout.root / BEGUN
        if ranks > 1:
            # The only accelerator that this process sees is its own.
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR=address[0],
                MASTER_PORT=str(address[1]),
            )  # fmt: skip
            comm.init_from_env(job.device)
        self._device = comm.default_device() if job.device != "cpu" else torch.device("cpu")
        self._dtype = getattr(torch, job.dtype)
        self._vae: Any = models.load(models.find(job.layout.model), dtype=self._dtype, device=self._device)
        self._limits = vae_limits.limits_of(self._vae)
        self._taken = vae_limits.parameters_of if job.layout.store == "parameters" else vae_limits.latent_of
        if ranks > 1:
            self._handle = parallelize(
                self._vae, gather={"encode": "first", "decode": "first"}, halves=("encode",), options=UNTIMED
            )
        else:
            self._handle = optimize(self._vae)
        self._beside = torch.Stream(self._device) if self._device.type != "cpu" else None
        # Of each thread, for libraries that don't ask torch.
        self._one_by_one = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(job.threads,))

    def encode(self, pixels: np.ndarray[Any, Any], name: str = "") -> dict[str, Any]:
        """Encode clips together.

        Args:
            pixels: (clips, frames, height, width, 3).
            name: of these clips, for `begun`; empty: what ends this process is not kept from the next one.

        Returns:
            "latents", (clips, bytes) of numbers of "dtype" in "shape", and the "seconds" that it took; or what it is
            that went wrong, and "why".
        """
        import torch

        from halovae.base.memory import is_shortage

        try:
            return self._one_by_one.submit(self._in_turn, self._bring(pixels), name).result()
        except Exception as error:
            # The system ends processes when memory is short.
            short = is_shortage(error) or isinstance(error, DeadlyError)
            if short and self._device.type != "cpu":
                torch.accelerator.empty_cache()
            stop = isinstance(error, HalovaeError) and not isinstance(error, RankFailedError)
            return {"kind": MEMORY if short else STOP if stop else FAILED, "why": reason_of(error)}

    def _bring(self, pixels: np.ndarray[Any, Any]) -> list[Any]:
        import torch

        if self._beside is None:
            return self._tensors(pixels)
        before = torch.accelerator.current_stream()
        torch.accelerator.set_stream(self._beside)
        try:
            return self._tensors(pixels)
        finally:
            self._beside.synchronize()
            torch.accelerator.set_stream(before)

    def _tensors(self, pixels: np.ndarray[Any, Any]) -> list[Any]:
        from halovae.media import codec

        return [codec.to_tensor(clip, self._dtype, self._device) for clip in pixels]

    def _in_turn(self, clips: list[Any], name: str) -> dict[str, Any]:
        with begun(self._marks, name, _ENCODER_ENDS) if name else nullcontext():
            return self._encode(clips)

    def _encode(self, clips: list[Any]) -> dict[str, Any]:
        import torch

        from halovae.media import codec

        started = time.perf_counter()
        with torch.inference_mode():
            found = [one.cpu() for one in codec.encode_clips(self._vae, self._limits, clips, self._taken)]
        latents = np.stack([one.contiguous().reshape(-1).view(torch.uint8).numpy() for one in found])
        shape, dtype = list(found[0].shape), str(found[0].dtype).removeprefix("torch.")
        return {"latents": latents, "shape": shape, "dtype": dtype, "seconds": time.perf_counter() - started}


def write_unit(row: Row, job: Job) -> Row:
    """Write the items of a unit, each to a file of its own."""
    import torch

    unit: Unit = pickle.loads(row["unit"])
    read, made = json.loads(row["read"]), json.loads(row["made"])
    results: list[dict[str, Any]] = []
    for number, (item, wanted) in enumerate(zip(unit.items, unit.wanted, strict=True)):
        if not wanted:
            continue
        taken, result = read["told"][number], {"key": item.key, "what": THERE, "why": read["why"][number] or ""}
        if result["why"]:
            result["what"] = FAILED
        elif taken is not None and "why" in made:
            result |= {"what": made["kind"], "why": made["why"]}
        elif taken is not None:
            stored = torch.from_numpy(np.array(row["latents"][number])).view(getattr(torch, made["dtype"]))
            result |= _written(job, unit, item, taken, stored.view(made["shape"]))
        results.append(result)
    done = [result for result in results if result["what"] == DONE]
    told_of = {"results": results, "frames": len(done) * unit.bucket.frames, "seconds": made.get("seconds", 0.0)}
    return {"unit": row["unit"], "told": json.dumps(told_of)}


def _written(job: Job, unit: Unit, item: Item, taken: Mapping[str, Any], latents: Any) -> dict[str, Any]:
    try:
        job.layout.write(item, unit.bucket, taken, latents)
    except HalovaeError as error:
        return {"what": FAILED, "why": reason_of(error)}
    except OSError as error:
        return {"what": STOP, "why": reason_of(error)}
    return {"what": DONE}


def pack_shard(job: Job, number: int, items: Sequence[Any]) -> str:
    """Why a shard can't be written; nothing if it was."""
    from halovae.datasets.shards import pack

    try:
        pack(job.layout, number, items)
    except OSError as error:
        return reason_of(error)
    return ""


def reason_of(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, (HalovaeError, OSError)) else f"{type(error).__name__}: {text}"
