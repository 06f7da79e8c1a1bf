"""`parallelize`: one call, and a VAE's encode and decode run on all ranks of a group."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halovae.api.advice import advised
from halovae.api.engines import Engine, make_engine
from halovae.base import timeline
from halovae.base.compiled import as_written, is_compiled, never_compiled
from halovae.base.errors import InputError, NotExactError
from halovae.base.forks import owned_here
from halovae.base.memory import PeakMemory
from halovae.base.options import HALVES, Axis, CallReport, Gather, Options, checked_halves
from halovae.base.trees import pictures_in, tensors_in
from halovae.calls.randomness import rewound_by_failure
from halovae.calls.state import undone_by_failure
from halovae.calls.target import Target, in_words, substitutes
from halovae.comm import Comm, Group, SoloComm, Traffic, connect
from halovae.comm.agreement import Glance, Tally, one_call, together
from halovae.kernels import autocast
from halovae.kernels.kept import Kept
from halovae.tiles.tile_settings import described

LOG = logging.getLogger("halovae")


def parallelize(
    vae: Any,
    group: Group | None = None,
    *,
    mode: str | None = None,
    axis: Axis = "auto",
    size: int | None = None,
    gather: Gather = "all",
    verify: bool = True,
    tiles: str = "own",
    timeout: float = 60.0,
    halves: Sequence[str] = HALVES,
    frames_per_call: int | str = "auto",
    graphs: bool | str = "auto",
) -> Handle:
    """Run a VAE's `encode` and `decode` on all ranks of a group. Called on every rank of it, with equal weights.

    Afterwards `vae.encode` and `vae.decode` have the same signatures, return types and values as before; every rank
    calls them with the same whole input. A VAE that is parallelized already is run by the new options from now on: what
    ran these halves before is given up, as by its handle's `restore()`.

    Args:
        vae: a diffusers autoencoder, any module with encode / decode or encoder / decoder, or a pipeline with a `.vae`.
        group: the ranks to use; default: the world. In a world of one the VAE runs as one shard.
        mode: "exact": spatial shards with halo exchange; the un-tiled result, up to rounding. "tile": diffusers' own
            tiles, spread over the ranks; the result of the VAE's own tiled encode and decode, bit for bit. "auto":
            exact where the link between the ranks is fast enough for it to be predicted the faster of the two, else
            tile; `handle.last.choice` and the log of "halovae" say which and why. Where memory runs out, all ranks
            make the call again in a way that takes less: exact with fewer frames per call, then on idle ranks too, then
            tiles, then smaller ones. None: "exact"; "tile" for a VAE whose class switches tiling on as it is made, for
            as long as it is on: its tiles are its own result. Where `enable_tiling()` was called on another VAE, exact
            mode gives the un-tiled result all the same, and the log of "halovae" warns of that once.
            `handle.last.reference` says which of the two a result is.
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
            one call of each half. "auto": where the replay turns out faster, the memory kept is at most a quarter of
            what is free, and no hooks hang on the VAE, since these do nothing in a replay. True: always.

    Returns:
        A handle: `.last` reports the last call, `.restore()` undoes it; it is a context manager too.

    Raises:
        InputError: an option or the VAE can't be used, or torchrun has started several processes that have joined no
            process group; nothing was changed.
        DisagreementError: ranks differ in their options or weights.
        RankFailedError: another rank failed, died or stopped; from calls too, on all ranks. While all of them live, the
            next call works again.

    Examples:
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
            said.update({"options": options, "VAE": name, "mode": _mode(options, target), "weights": target.digest()})
        comm.patience = options.timeout
        return Handle(target, comm, options)
    except BaseException:
        comm.close()
        raise


def optimize(vae: Any, *, frames_per_call: int | str = "auto", graphs: bool | str = "auto") -> Handle:
    """Run a VAE's `encode` and `decode` faster on this process alone: the same numbers, up to rounding.

    As `parallelize` in a world of one, whatever process group there is: the un-tiled result, as in exact mode. A VAE
    that comes tiled gives the result of its tiles, bit for bit and no faster.

    Args:
        vae: a diffusers autoencoder, any module with encode / decode or encoder / decoder, or a pipeline with a `.vae`.
        frames_per_call: as for `parallelize`.
        graphs: likewise.

    Returns:
        A handle: `.last` reports the last call, `.restore()` undoes it; it is a context manager too.

    Raises:
        InputError: the option or the VAE can't be used; nothing was changed.

    Examples:
        >>> halovae.optimize(pipe)
        >>> image = pipe(prompt).images[0]
    """
    return Handle(Target(vae), SoloComm(), Options(frames_per_call=frames_per_call, graphs=graphs))


def restore(vae: Any) -> None:
    """Give a VAE its own encode and decode back, whatever `parallelize` and `optimize` have put there.

    As `restore()` of their handles, for who has kept none. Does nothing where nothing was put.

    Args:
        vae: the VAE, or a pipeline with a `.vae`.

    Raises:
        InputError: there is no VAE.
    """
    for half, substitute in substitutes(vae).items():
        substitute.holder.release(half)


def summary(vae: Any) -> str:
    """How the halves of a VAE run now, and what the last call did, in lines of text.

    Args:
        vae: the VAE, or a pipeline with a `.vae`.

    Raises:
        InputError: there is no VAE.
    """
    holders = dict.fromkeys(substitute.holder for substitute in substitutes(vae).values())
    return "\n".join(map(str, holders)) or f"{Target(vae).name}: encode and decode are its own"


def _mode(options: Options, target: Target) -> str:
    """The mode of a call that is made now. A VAE that comes tiled is followed where that is switched off and on."""
    return options.mode or ("tile" if target.comes_tiled else "exact")


class Handle:
    """A parallelized or optimized VAE. Made by `parallelize` and `optimize`.

    Attributes:
        last: what the last call did on this rank, or None before the first.
    """

    def __init__(self, target: Target, comm: Comm, options: Options) -> None:
        self.last: CallReport | None = None
        self._target, self._comm, self._options = target, comm, options
        self._lock = threading.RLock()
        self._mode = _mode(options, target)
        self._engine = self._make_engine()
        self._kept = Kept()
        self._calls = 0
        self._halves = set(target.originals)
        self._running = self._warned = self._said_compiled = False
        for half in target.originals:
            target.replace(half, never_compiled(functools.partial(self._call, half)), self)
        self._warn_of_tiles(self._mode)
        owned_here(self, Handle._disown)

    def restore(self) -> None:
        """Give the VAE its own encode and decode back. Waits for a running call; a second time does nothing."""
        for half in self._target.originals:
            self.release(half)

    def release(self, half: str) -> None:
        """Give the VAE its own encode or decode back, as `restore` does with both."""
        with self._lock:
            if half not in self._halves:
                return
            self._halves.remove(half)
            self._target.restore(half)
            if not self._halves:
                self._engine.free()
                self._kept = Kept()
                self._comm.close()

    def _disown(self) -> None:
        """In a forked child: a thread that is not there may have been in a call."""
        self._lock, self._running = threading.RLock(), False

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __reduce__(self) -> Any:
        raise InputError(
            "a handle can't be copied or saved: it belongs to this process and its group; copy or save the VAE, "
            "whose copy has its own encode and decode, and call parallelize on that"
        )

    def __repr__(self) -> str:
        options = replace(self._options, mode=self._mode)
        halves = [half for half in self._target.originals if half in self._halves]
        rows = [
            ("vae", self._target.name),
            ("halves", ", ".join(halves) or "none: restored"),
            ("rank", f"{self._comm.rank} of {self._comm.size}, {options.size or self._comm.size} at work"),
            ("mode", f"{options.mode}, {options.cut}, gather {options.gather}"),
            ("last", str(self.last or "no call yet")),
        ]
        return "\n".join(["halovae.Handle", *(f"  {name:<7}{value}" for name, value in rows)])

    def _call(self, half: str, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            # A half that calls a half is in shards already; who kept the method beyond `restore` gets the VAE's own.
            if self._running or half not in self._halves:
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
        device = next((picture.device for picture in pictures_in((args, kwargs))), torch.device("cpu"))
        undone = rewound_by_failure(device, *args, *kwargs.values())
        eagerly, ours = self._eagerly(half), self._kept.in_use()
        with eagerly, ours, undone_by_failure(vae, args, kwargs), undone, one_call(self._comm):
            self._comm.traffic = Traffic()
            picture = self._agree_on_call(half, args, kwargs)
            with torch.no_grad():
                return self._run(half, picture, args, kwargs, started, begun)

    def _eagerly(self, half: str) -> AbstractContextManager[None]:
        """Within it, parts of the VAE that are compiled run as they are written; said once."""
        if not is_compiled(self._target.vae, self._target.originals[half]):
            return nullcontext()
        if not self._said_compiled:
            self._said_compiled = True
            LOG.warning(
                "%s of %s is compiled, in whole or in part: halovae runs it as it is written, by its own kernels",
                half, self._target.name,
            )  # fmt: skip
        return as_written()

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
        try:
            ran = self._engine.run(half, picture, args, kwargs)
        except NotExactError as error:
            ranks = self._options.size or self._comm.size
            raise advised(error, self._target, half, ranks, args, kwargs) from error
        self._warn_of_tiles(ran.mode)
        timeline.note(half, started)
        traffic, peak = self._comm.traffic, memory.read()
        self.last = CallReport(
            half=half,
            mode=ran.mode,
            reference="tiles" if ran.mode == "tile" else "un-tiled",
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
            pictures = pictures_in((args, kwargs))
            self._check(half, pictures)
            shapes = [_described(value) for value in args] + [f"{k}={_described(v)}" for k, v in sorted(kwargs.items())]
            said["autocast"] = dict(autocast.state()) or "off"
            said.update({"call": f"{half} number {self._calls}", "arguments": ", ".join(shapes)})
            tensors = enumerate(tensors_in((args, kwargs)))
            said.update({f"the values of tensor {i}": Glance.at(tensor) for i, tensor in tensors})
            said["mode"] = self._follow()
            said["what was settled"] = Tally(self._engine.settled(), self._engine.forget)
            if self._mode != "exact":
                said["tile settings"] = described(self._target.vae)
        return pictures[0]

    def _make_engine(self) -> Engine:
        return make_engine(self._comm, self._target, replace(self._options, mode=self._mode))

    def _follow(self) -> str:
        """The mode of the call that is agreed on, which runs by the engine of that mode."""
        mode = _mode(self._options, self._target)
        if mode != self._mode:
            self._engine.free()
            self._mode = mode
            self._engine = self._make_engine()
        return mode

    def _warn_of_tiles(self, mode: str) -> None:
        """Once, and on the first rank: a VAE that is set to tile does not."""
        target = self._target
        if self._warned or mode != "exact" or self._comm.rank > 0 or not getattr(target.vae, "use_tiling", False):
            return
        self._warned = True
        why = "comes tiled, and its tiles are its own result" if target.comes_tiled else "has tiling switched on"
        LOG.warning(
            "%s %s, but exact mode gives the un-tiled result, which differs: parallelize(vae, mode='tile') gives that "
            "of its tiles, and after disable_tiling() the VAE itself gives the un-tiled one",
            target.name,
            why,
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device.type}"
    inside = tensors_in(value)
    return f"{in_words(value)} of {', '.join(map(_described, inside))}" if inside else in_words(value)
