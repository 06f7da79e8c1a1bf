"""`parallelize`: one call, and a VAE's encode and decode run on all ranks of a group."""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halovae import timeline
from halovae.agreement import Glance, one_call, together
from halovae.comm import Comm, Group, SoloComm, Traffic, connect
from halovae.config import HALVES, Axis, CallReport, Gather, Options, checked_halves
from halovae.engines import make_engine
from halovae.errors import InputError
from halovae.memory import PeakMemory
from halovae.randomness import rewound_by_failure
from halovae.state import undone_by_failure
from halovae.target import Target, in_words
from halovae.tile.settings import described
from halovae.trees import is_picture


def parallelize(
    vae: Any,
    group: Group | None = None,
    *,
    mode: str = "exact",
    axis: Axis = "auto",
    size: int | None = None,
    gather: Gather = "all",
    verify: bool = True,
    tiles: str = "own",
    timeout: float = 60.0,
    halves: Sequence[str] = HALVES,
    frames_per_call: int | str = "auto",
    graphs: bool = False,
) -> Handle:
    """Run a VAE's `encode` and `decode` on all ranks of a group. Called on every rank of it, with equal weights.

    Afterwards `vae.encode` and `vae.decode` have the same signatures, return types and values as before; every rank
    calls them with the same whole input.

    Args:
        vae: a diffusers autoencoder, any module with encode / decode or encoder / decoder, or a pipeline with a `.vae`.
        group: the ranks to use; default: the world. In a world of one the VAE runs as one shard.
        mode: "exact": spatial shards with halo exchange; the un-tiled result, up to rounding. "tile": diffusers' own
            tiles, spread over the ranks; the result of the VAE's own tiled encode and decode, bit for bit. "auto":
            exact where the link between the ranks is fast enough for it to be predicted the faster of the two, else
            tile; `handle.last.choice` and the log of "halovae" say which and why. Where memory runs out, all ranks
            make the call again in a way that takes less: exact with fewer frames per call, then on idle ranks too, then
            tiles, then smaller ones.
        axis: what to cut: "height", "width", (rows, columns), or "auto" (the smallest largest shard, by preference
            of one axis).
        size: use the first `size` ranks only; the others wait and share the result.
        gather: who holds the whole output: "all" ranks, the "first" (the others then hold their shard), or nobody
            ("shard"; `handle.last.extents` says which part; exact mode only). A mapping says it for each half, as in
            {"encode": "all", "decode": "first"}.
        verify: compare a small probe with the un-parallel VAE at the first use of each half (exact mode).
        tiles: "own": the sizes that the VAE is set to; "fit": smaller ones where some rank would have no tile to run.
        timeout: seconds without a sign of life after which a rank counts as stopped. A rank that is slow gives signs.
        halves: which to run on all ranks, "encode", "decode" or both. The other one stays as it is.
        frames_per_call: latent frames that a VAE which walks through time takes in one call of its network (exact
            mode): more mean fewer and larger messages and kernels, and more memory. "auto": as many as fill an
            accelerator; on a CPU as few as the VAE itself takes. 1: always as the VAE itself.
        graphs: record the second of two calls of the same kind, and replay that from the third on: on an accelerator
            most of the time of a shard is Python's, and this leaves it out (exact mode where each rank has a shard,
            CUDA graphs or what other accelerators have like them; elsewhere nothing changes). It keeps the memory of
            one call of each half, and what hooks and other Python code do in a call they do no more.

    Returns:
        A handle: `.last` reports the last call, `.restore()` undoes it; it is a context manager too.

    Raises:
        InputError: an option or the VAE can't be used; nothing was changed.
        DisagreementError: ranks differ in their options or weights.
        RankFailedError: another rank failed, died or stopped; from calls too, on all ranks. While all of them live, the
            next call works again.

    Example:
        >>> pipe = WanImageToVideoPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to("cuda")
        >>> halovae.parallelize(pipe)
        >>> video = pipe(image=image, prompt=prompt).frames[0]
    """
    comm = connect(group)
    try:
        with together(comm) as said:
            options = Options(
                mode=mode, axis=axis, size=size, gather=gather, verify=verify, tiles=tiles, timeout=timeout,
                frames_per_call=frames_per_call, graphs=graphs,
            )  # fmt: skip
            options.check_ranks(comm.size)
            target = Target(vae, checked_halves(halves))
            name = f"{target.name} ({', '.join(target.originals)})"
            said.update({"options": options, "VAE": name, "weights": target.digest()})
        comm.patience = options.timeout
        return Handle(target, comm, options)
    except BaseException:
        comm.close()
        raise


def optimize(vae: Any, *, frames_per_call: int | str = "auto", graphs: bool = False) -> Handle:
    """Run a VAE's `encode` and `decode` faster on this process alone: the same numbers, up to rounding.

    As `parallelize` in a world of one, whatever process group there is. The un-tiled result, as in exact mode.

    Args:
        vae: a diffusers autoencoder, any module with encode / decode or encoder / decoder, or a pipeline with a `.vae`.
        frames_per_call: as for `parallelize`.
        graphs: likewise.

    Returns:
        A handle: `.last` reports the last call, `.restore()` undoes it; it is a context manager too.

    Raises:
        InputError: the option or the VAE can't be used; nothing was changed.

    Example:
        >>> halovae.optimize(pipe)
        >>> image = pipe(prompt).images[0]
    """
    return Handle(Target(vae), SoloComm(), Options(frames_per_call=frames_per_call, graphs=graphs))


class Handle:
    """A parallelized or optimized VAE. Made by `parallelize` and `optimize`.

    Attributes:
        last: what the last call did on this rank, or None before the first.
    """

    def __init__(self, target: Target, comm: Comm, options: Options) -> None:
        self.last: CallReport | None = None
        self._target, self._comm, self._options = target, comm, options
        self._lock = threading.RLock()
        self._engine = make_engine(comm, target, options)
        self._calls = 0
        self._running = self._restored = False
        for half, original in target.originals.items():
            target.replace(half, functools.wraps(original)(functools.partial(self._call, half)))

    def restore(self) -> None:
        """Give the VAE its own encode and decode back. Waits for a running call; a second time does nothing."""
        with self._lock:
            if not self._restored:
                self._restored = True
                self._target.restore()
                self._engine.free()
                self._comm.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        options = self._options
        rows = [
            ("vae", self._target.name),
            ("halves", ", ".join(self._target.originals)),
            ("rank", f"{self._comm.rank} of {self._comm.size}, {options.size or self._comm.size} at work"),
            ("mode", f"{options.mode}, {options.cut}, gather {options.gather}"),
            ("last", str(self.last or "no call yet")),
        ]
        return "\n".join(["halovae.Handle", *(f"  {name:<7}{value}" for name, value in rows)])

    def _call(self, half: str, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            # A half that calls a half is in shards already; who kept the method beyond `restore` gets the VAE's own.
            if self._running or self._restored:
                return self._target.originals[half](*args, **kwargs)
            self._running, started = True, time.perf_counter()
            try:
                while True:
                    try:
                        return self._attempt(half, args, kwargs, started)
                    except BaseException as error:
                        if not self._engine.retreat(half, args, kwargs, error):
                            raise
                    gc.collect()  # What the attempt held: its frames are in a cycle with its exception.
            finally:
                self._running = False

    def _attempt(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], started: float) -> Any:
        begun, vae = time.perf_counter(), self._target.vae
        device = next((value.device for value in (*args, *kwargs.values()) if is_picture(value)), torch.device("cpu"))
        undone = rewound_by_failure(device, *args, *kwargs.values())
        with undone_by_failure(vae), undone, one_call(self._comm):
            self._comm.traffic = Traffic()
            picture = self._agree_on_call(half, args, kwargs)
            with torch.no_grad():
                return self._run(half, picture, args, kwargs, started, begun)

    def _check(self, half: str, pictures: list[Tensor]) -> None:
        if not pictures:
            raise InputError(f"{half} got no picture: pass a tensor (batch, channels, [frames,] height, width)")
        if 0 in pictures[0].shape:
            raise InputError(f"{half} got an empty tensor of shape {tuple(pictures[0].shape)}")
        self._target.check_no_gradients(pictures)

    def _run(
        self, half: str, picture: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], started: float, begun: float
    ) -> Any:  # fmt: skip
        memory, agreed = PeakMemory(picture.device), time.perf_counter()
        timeline.note("agree", begun, agreed)
        ran = self._engine.run(half, picture, args, kwargs)
        timeline.note(half, started)
        traffic, peak = self._comm.traffic, memory.read()
        self.last = CallReport(
            half=half,
            mode=ran.mode,
            seconds=time.perf_counter() - started,
            phases={"retreat": begun - started, "agree": agreed - begun, **ran.phases},
            messages=traffic.messages,
            bytes=traffic.bytes,
            wait_seconds=traffic.wait_seconds,
            peak_memory=None if peak is None else peak + ran.recorded,
            **ran.report,
        )
        return ran.result

    def _agree_on_call(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Check that the call can be run, and is the same, on every rank; returns the picture to cut."""
        self._calls += 1
        with together(self._comm) as said:
            pictures = [value for value in (*args, *kwargs.values()) if is_picture(value)]
            self._check(half, pictures)
            shapes = [_described(value) for value in args] + [f"{k}={_described(v)}" for k, v in sorted(kwargs.items())]
            said.update({"call": f"{half} number {self._calls}", "arguments": ", ".join(shapes)})
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            said.update({f"the values of tensor {i}": Glance.at(tensor) for i, tensor in enumerate(tensors)})
            if self._options.mode != "exact":
                said["tile settings"] = described(self._target.vae)
        return pictures[0]


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device.type}"
    return in_words(value)
