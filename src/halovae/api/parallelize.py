"""`parallelize`: one call, and a VAE's encode and decode run on all ranks of a group."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, Union

import torch
from torch import nn

from halovae.api.caller import current_mode
from halovae.api.handle import Handle
from halovae.base.errors import InputError
from halovae.base.options import (
    HALVES,
    AllOptions,
    Axis,
    Gather,
    Half,
    Mode,
    Options,
    Tiles,
    checked_halves,
)
from halovae.calls.dtypes import HalfDtypes
from halovae.calls.target import Target, substitutes
from halovae.comm import Group, SoloComm, connect
from halovae.comm.agreement import together

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Unpack

T = TypeVar("T")
LOG = logging.getLogger("halovae")


class HasVae(Protocol):
    """A pipeline: what has a VAE."""

    @property
    def vae(self) -> nn.Module: ...


Vae = Union[nn.Module, "DiffusionPipeline", HasVae]
Dtype = torch.dtype | Mapping[Half, torch.dtype]


class _Old(TypedDict, total=False):
    """Names that were arguments, and are fields of `Options` now."""

    frames_per_call: int | Literal["auto"]
    graphs: bool | Literal["auto"]
    tiles: Tiles
    timeout: float


def parallelize(
    vae: Vae,
    group: Group | None = None,
    *,
    mode: Mode | None = None,
    untiled: bool = False,
    axis: Axis = "auto",
    size: int | None = None,
    gather: Gather = "all",
    dtype: Dtype | None = None,
    halves: Sequence[Half] = HALVES,
    verify: bool = True,
    options: Options | None = None,
    **old: Unpack[_Old],
) -> Handle:
    """Run a VAE's `encode` and `decode` on all ranks of a group. Called on every rank of it, with equal weights.

    Afterwards `vae.encode` and `vae.decode` have the same signatures, return types and values as before; every rank
    calls them with the same whole input. A VAE that is parallelized already is run by the new options from now on: what
    ran these halves before is given up, as by its handle's `restore()`.

    Args:
        vae: a diffusers autoencoder, any module with encode / decode or encoder / decoder, or a pipeline with a `.vae`.
        group: the ranks to use; default: the world. In a world of one the VAE runs as one shard.
        mode: "exact": spatial shards with halo exchange; the un-tiled result, up to rounding. "tile": diffusers' own
            tiles, spread over the ranks; the result of the VAE's own tiled encode and decode, bit for bit on CPUs, and
            on accelerators where `handle.last.same_bits` says so. "auto": exact, and tile where exact mode refuses the
            VAE; `handle.last.choice` and the log of "halovae" say which and why. Where memory runs out, all ranks make
            the call again in a way that takes less: exact with fewer frames per call, then on idle ranks too, then
            tiles, then smaller ones. None: "exact"; "tile" for a VAE whose class switches tiling on as it is made, for
            as long as it is on: its tiles are its own result, and "exact" is refused for it. Where `enable_tiling()`
            was called on another VAE, exact mode gives the un-tiled result all the same, and the log of "halovae" warns
            of that once. `handle.last.reference` says which of the two a result is.
        untiled: give the un-tiled result (exact mode) of a VAE whose class switches tiling on, too.
        axis: what to cut: "height", "width", (rows, columns), or "auto" (the smallest largest shard, by preference
            of one axis).
        size: use the first `size` ranks only; the others wait and share the result.
        gather: who holds the whole output: "all" ranks, the "first" (the others then hold their shard, or nothing in
            tile mode and where the first one works alone), or nobody ("shard"; `handle.last.extents` says which part;
            exact mode only). A mapping says it for each half, as in {"encode": "all", "decode": "first"}.
        dtype: the number format to compute in, or one for each half, as in {"encode": torch.float32}: float32,
            bfloat16, float16 or float64. A half gives what a VAE of that dtype gives; its floating-point inputs are
            cast. Weights are cast where they are and kept once; `restore()` casts them back, but what fewer bits have
            rounded stays rounded. So load the VAE in the widest format. None: the weights and inputs stay as they are.
        halves: which to run on all ranks, "encode", "decode" or both. The other one stays as it is.
        verify: compare a small probe with the un-parallel VAE at the first use of each half (exact mode).
        options: rare choices.
        old: fields of `Options` by name, as they were given before; each with a DeprecationWarning.

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
            chosen = AllOptions(
                **_rare(options, old, "parallelize"),
                mode=mode, untiled=untiled, axis=axis, size=size, gather=gather, verify=verify,
            )  # fmt: skip
            chosen.check_ranks(comm.size)
            target = Target(vae, checked_halves(halves))
            dtypes = HalfDtypes(target.vae, dtype, target.originals)
            name = f"{target.name} ({', '.join(target.originals)})"
            said.update({"options": chosen, "VAE": name, "mode": current_mode(chosen, target), "dtype": dtypes})
            said["weights"] = target.digest()
        comm.set_patience(chosen.timeout)
        return Handle(target, comm, chosen, dtypes)
    except BaseException:
        comm.close()
        raise


def optimize(
    vae: Vae,
    *,
    untiled: bool = False,
    dtype: Dtype | None = None,
    options: Options | None = None,
    **old: Unpack[_Old],
) -> Handle:
    """Run a VAE's `encode` and `decode` faster on this process alone: the same numbers, up to rounding.

    As `parallelize` in a world of one, whatever process group there is: the un-tiled result, as in exact mode. A VAE
    that comes tiled gives the result of its tiles, on CPUs bit for bit and no faster.

    Args:
        vae: a diffusers autoencoder, any module with encode / decode or encoder / decoder, or a pipeline with a `.vae`.
        untiled: as for `parallelize`.
        dtype: likewise.
        options: likewise; `tiles` and `timeout` have no meaning here.
        old: likewise.

    Returns:
        A handle: `.last` reports the last call, `.restore()` undoes it; it is a context manager too.

    Raises:
        InputError: an option or the VAE can't be used; nothing was changed.

    Examples:
        >>> halovae.optimize(pipe)
        >>> image = pipe(prompt).images[0]
    """
    chosen, target = AllOptions(**_rare(options, old, "optimize"), untiled=untiled), Target(vae)
    return Handle(target, SoloComm(), chosen, HalfDtypes(target.vae, dtype, target.originals))


def _rare(options: Options | None, old: Mapping[str, Any], function: str) -> dict[str, Any]:
    """Fields of `Options`, also as they were given before there were any."""
    if options is not None and not isinstance(options, Options):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"options is {options!r}: give halovae.Options(...)")
    rare = vars(options or Options())
    for name in old:
        if name not in rare:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        warnings.warn(
            f"{function}({name}=...) will go: give options=halovae.Options({name}=...)",
            DeprecationWarning,
            stacklevel=3,
        )
    return {**rare, **old}


def restore(vae: Vae) -> None:
    """Give a VAE its own encode and decode back, whatever `parallelize` and `optimize` have put there.

    As `restore()` of their handles, for who has kept none. Does nothing where nothing was put.

    Args:
        vae: the VAE, or a pipeline with a `.vae`.

    Raises:
        InputError: there is no VAE.
    """
    for half, substitute in substitutes(vae).items():
        substitute.holder.release(half)


def summary(vae: Vae) -> str:
    """How the halves of a VAE run now, and what the last call did, in lines of text.

    Args:
        vae: the VAE, or a pipeline with a `.vae`.

    Raises:
        InputError: there is no VAE.
    """
    holders = dict.fromkeys(substitute.holder for substitute in substitutes(vae).values())
    return "\n".join(map(str, holders)) or f"{Target(vae).name}: encode and decode are its own"
