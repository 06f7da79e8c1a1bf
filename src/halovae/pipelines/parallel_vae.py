"""A pipeline's VAE on all ranks: which halves, in which way, and who gets the picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from halovae.api.handle import Handle
from halovae.api.parallelize import parallelize
from halovae.base.errors import InputError
from halovae.base.options import HALVES, UNTIMED, CallReport, Gather, Half, Mode
from halovae.base.replaced import replaced, wrapped
from halovae.base.trees import map_tensors, tensors_in
from halovae.calls.dtypes import HalfDtypes
from halovae.calls.target import Target
from halovae.comm import Comm
from halovae.media.vae_limits import sample_of
from halovae.pipelines.generation_settings import Setup
from halovae.pipelines.load import torch_dtypes


@contextmanager
def parallel_vae(
    vae: Any, setup: Setup, comm: Comm, on_call: Callable[[str, CallReport], None]
) -> Iterator[dict[Half, Stream]]:  # fmt: skip
    """Within it, `vae` runs as `setup` asks. Called on every rank. Yields what encodes and decodes in pieces, of the
    halves that run on all ranks.

    What is encoded goes on to every rank's denoiser, so every rank gets it. What is decoded is needed by the rank that
    writes it, the first, alone: the others go on with a blank picture of that size, which takes no memory.

    Args:
        vae: of the pipeline, with its weights in place, and in the formats that `setup` asks for.
        on_call: gets "encode" or "decode" and the report of each parallel call.
    """
    _switch(vae, setup)
    wanted = {"encode": setup.vae_encode, "decode": setup.vae_decode}
    halves: list[Half] = [half for half in HALVES if wanted[half]]
    dtypes = torch_dtypes(setup)
    streams: dict[Half, Stream] = {}
    with ExitStack() as stack:
        if setup.vae_size != 1 and halves:
            gather: Gather = {"encode": "all", "decode": "first"}
            ways: dict[str, Any] = {"mode": setup.vae_mode, "axis": setup.vae_axis, "size": setup.vae_size}
            handle = stack.enter_context(parallelize(vae, gather=gather, halves=halves, options=UNTIMED, **ways))
            for half in halves:
                stack.enter_context(wrapped(vae, half, functools.partial(_reported, handle, on_call, half)))
                streams[half] = functools.partial(_stream, handle, HalfDtypes(vae, dtypes), on_call, half)
            if setup.vae_decode:
                stack.enter_context(wrapped(vae, "decode", functools.partial(_blank_but_first, comm)))
        if len(set(dtypes.values())) > 1:
            # Pipelines cast what a half gets to the one `dtype` of the VAE.
            for half in HALVES:
                stack.enter_context(wrapped(vae, half, functools.partial(_cast, HalfDtypes(vae, dtypes), half)))
        yield streams


def _stream(
    handle: Handle, dtypes: HalfDtypes, on_call: Callable[[str, CallReport], None], half: Half, given: Any,
    *args: Any, **kwargs: Any,
) -> Generator[Any]:  # fmt: skip
    args, kwargs = dtypes.given(half, args, kwargs)
    if isinstance(given, Iterator):
        given = (dtypes.given(half, (part,), {})[0][0] for part in cast("Iterator[Any]", given))
    else:
        [given], _ = dtypes.given(half, (given,), {})
    stream = handle.encode_stream if half == "encode" else handle.decode_stream
    with stream(given, *args, **kwargs) as pieces:
        yield from pieces
    if handle.last is not None:
        on_call(half, handle.last)


def mode_of(vae: Any, setup: Setup) -> Mode:
    """The mode that a VAE runs in. Refuses exact mode where it gives another result, and nobody has asked for that."""
    target = Target(vae)
    if setup.vae_untiled or setup.vae_mode in ("tile", "auto") or not target.comes_tiled:
        return setup.vae_mode or "exact"
    if setup.vae_mode == "exact":
        target.check_exact("--vae-mode exact", "add --vae-untiled")
    return "tile"


def _switch(vae: Any, setup: Setup) -> None:
    """The VAE's own switches, which hold with and without ranks. What one rank alone runs is in the same mode."""
    mode_of(vae, setup)  # checks it
    for wanted, name, flag in (
        (setup.vae_mode == "tile", "enable_tiling", f"--vae-mode {setup.vae_mode}"),
        (setup.vae_slicing, "enable_slicing", "--vae-use-slicing"),
    ):
        if not wanted:
            continue
        try:
            getattr(vae, name)()
        except (AttributeError, NotImplementedError) as error:
            raise InputError(f"{flag} can't be honoured: {type(vae).__name__} has no {name}(); leave it out") from error
    if (setup.vae_untiled or setup.vae_mode == "exact") and getattr(vae, "use_tiling", False):
        vae.use_tiling = False


def _cast(dtypes: HalfDtypes, half: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = dtypes.given(half, args, kwargs)
    return original(*args, **kwargs)


def _reported(
    handle: Handle, on_call: Callable[[str, CallReport], None], half: str, original: Callable[..., Any],
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    result = original(*args, **kwargs)
    if handle.last is not None:
        on_call(half, handle.last)
    return result


def _blank_but_first(comm: Comm, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    shapes = comm.all_gather_object([tuple(tensor.shape) for tensor in tensors_in(result)])[0]
    return result if comm.rank == 0 else map_tensors(lambda t: t.new_zeros(()).expand(shapes.pop(0)), result)


# ---- a video that goes on while later frames are decoded -------------------------------------------------------------


Stream = Callable[..., Generator[Any]]
"""Takes and gives what `Handle.decode_stream` does, or `Handle.encode_stream`."""
Show = Callable[[Tensor], Any]
"""What the pipeline makes of frames at last."""


class LateVideo(Tensor):
    """Stands for a video that is not decoded yet. Whoever computes with it has it decoded, whole."""

    make: Callable[[], Tensor]
    """Decodes it whole."""
    stream: Callable[[], Generator[Tensor]]
    """Decodes it in pieces."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = map_tensors(_made, (args, kwargs or {}))
        return func(*args, **kwargs)


def _made(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, LateVideo):
        return tensor
    video = tensor.make()
    tensor.make = lambda: video
    return video


@contextmanager
def in_pieces(
    pipeline: Any, stream: Stream | None, take: Callable[[Generator[Tensor], Show], None]
) -> Iterator[None]:  # fmt: skip
    """Within it, a video that the pipeline hands on from its VAE to its processor as it is goes to `take` instead, in
    pieces with what makes pictures of each, and the pipeline gives a black pixel. One that it does something else with
    is decoded whole, as ever; so is all where the VAE has no stream."""
    processor = getattr(pipeline, "video_processor", None)
    if stream is None or processor is None or not hasattr(processor, "postprocess_video"):
        yield
        return
    decode, show = pipeline.vae.decode, processor.postprocess_video

    @functools.wraps(decode)
    def decode_later(*args: Any, **kwargs: Any) -> Any:
        video = torch.empty(0).as_subclass(LateVideo)
        video.make = lambda: _sample(decode(*args, **kwargs))
        video.stream = functools.partial(stream, *args, **kwargs)
        return DecoderOutput(sample=video) if kwargs.get("return_dict", True) else (video,)

    @functools.wraps(show)
    def show_pieces(video: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(video, LateVideo):
            return show(video, *args, **kwargs)
        take(video.stream(), lambda piece: show(piece, *args, **kwargs))
        return np.zeros((1, 1, 1, 1, 3), np.float32)

    with replaced(pipeline.vae, "decode", decode_later), replaced(processor, "postprocess_video", show_pieces):
        yield


def _sample(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else sample_of(output)
