"""A pipeline's video as it is decoded: its frames go on while later ones are made, and it is never whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from halovae.base.replaced import replaced
from halovae.base.trees import map_tensors
from halovae.media.vae_limits import sample_of

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
