"""Make the weights of the demonstration transformers, which ship with `halovae.pipelines.demo`.

    python training/demo_weights.py

They are set by construction, so that one transformer copies the given image to every frame, one makes clouds of noise,
and one takes noise away. The file holds, of each tensor that is set, the places and the values that are not zero.

Each token is a patch of 2 x 2 latents. Its hidden state is used as slots: the given latents, the result, whether the
token's frame is the given one, and two large constants. Layer norms divide by the deviation of the whole state, which
the constants dominate: they act as one known factor, and what is between them stays linear.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from halovae.pipelines.demo import HEADS, WEIGHTS, WIDTH, untrained_pipeline
from halovae.pipelines.generation_settings import TASKS

_PICTURES = 6
_AXIS = 8
_LARGE = 100.0
"""The constant that dominates a layer norm: its square is large against the latents' squares."""
_SHARP = 9.0
"""Scale of queries and keys: the right patch then outweighs the next best, and all others, by e^10 or more."""
_BLUNT = 2.4
"""The same for a mean of neighbours: a few patches, and a few frames, count."""
_SMOOTH = 4.0
_GROWTH = 4.0
"""Over all noise levels what is rough shrinks by e to the power of `_SMOOTH`, and what is smooth grows by e to that of
`_GROWTH`: a mean of noise is small."""
_SOFT = 6.0
"""The same for differences within a patch."""
_PROMPT = 0.02
"""Size of what cross-attention adds."""


def still_map(vae: Any, pictures: int) -> tuple[Tensor, Tensor]:
    """How latents of a standing picture's later frames follow from the first one's.

    Args:
        vae: a causal video VAE with `latents_mean` and `latents_std`, in float32.
        pictures: how many random pictures to fit on.

    Returns:
        Matrix (channels, channels) and offset (channels,) on normalised latents: least squares over all positions.
    """
    clips = _random_pictures(pictures).unsqueeze(2).expand(-1, -1, 17, -1, -1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(clip.unsqueeze(0)).latent_dist.mode() for clip in clips])
    shape = (1, -1, 1, 1, 1)
    latents = (latents - torch.tensor(vae.config.latents_mean).view(shape)) / torch.tensor(vae.config.latents_std).view(
        shape
    )
    later = latents[:, :, 1:]
    first = latents[:, :, :1].expand_as(later)
    known, wanted = (t.movedim(1, -1).flatten(0, -2).double() for t in (first, later))
    known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
    found = torch.linalg.lstsq(known, wanted).solution.T.float()
    return found[:, :-1], found[:, -1]


def _random_pictures(count: int) -> Tensor:
    """(count, 3, 64, 96) of -1 to 1 with the spectrum of photographs: amplitude falls with frequency."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 64, 96, generator=generator)
    noise = 0.8 * noise.mean(1, keepdim=True) * math.sqrt(3) + 0.4 * noise
    down, across = torch.meshgrid(torch.fft.fftfreq(64) * 64, torch.fft.fftfreq(96) * 96, indexing="ij")
    falling = 1 / (down**2 + across**2).sqrt().clamp(min=1)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * falling).real
    return (smooth / smooth.std() * 0.5 + 0.2 * torch.randn(count, 3, 1, 1, generator=generator)).clamp(-1, 1)


def build_still_transformer(transformer: Any, matrix: Tensor, offset: Tensor) -> None:
    """Overwrite all weights of a one-block transformer that takes (noisy latents, 4 mask channels, given latents).

    Args:
        transformer: a WanTransformer3DModel with `HEADS` heads of `WIDTH`, patches of 1 x 2 x 2.
        matrix: of `still_map`.
        offset: of `still_map`.
    """
    patch = 4 * len(offset)
    slots = _Slots(patch, HEADS * WIDTH)
    with torch.no_grad():
        _embed(transformer, slots, len(offset), first=len(offset) + 4)
        # The mask's first channel tells which frames are given.
        transformer.patch_embedding.weight[slots.is_first, len(offset), 0, 0, 0] = 1
        slots.balanced(transformer.patch_embedding.weight)
        block = transformer.blocks[0]
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, (2, 5)] = 1  # the gates
        _copy_from_first_frame(block.attn1, slots)
        _add_prompt(block.attn2, slots, _PROMPT)
        _map_later_frames(block.ffn, slots, torch.block_diag(*[matrix] * 4), offset.repeat(4))
        _forget_time(transformer)
        _read_result(transformer, slots, torch.eye(patch))


def build_smoothing_transformer(transformer: Any, channels: int) -> None:
    """Overwrite all weights of a one-block transformer that takes noisy latents: the direction that it gives leads
    towards the mean of the latents around, and to more contrast.

    Args:
        transformer: a WanTransformer3DModel with `HEADS` heads of `WIDTH`, patches of 1 x 2 x 2.
        channels: of the latents.
    """
    slots = _Slots(4 * channels, HEADS * WIDTH)
    with torch.no_grad():
        _embed(transformer, slots, channels, first=0)
        block = transformer.blocks[0]
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, (2, 5)] = 1  # the gates
        _mean_of_neighbours(block.attn1, slots)
        _add_prompt(block.attn2, slots, _PROMPT)
        for layer in (block.ffn.net[0].proj, block.ffn.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        _forget_time(transformer)
        # The four latents of a patch become one.
        mean = torch.full((4, 4), 0.25).kron(torch.eye(channels))
        _read_result(transformer, slots, -(_SMOOTH + _GROWTH) * mean)
        transformer.proj_out.weight[:, slots.given] = slots.unit * _SMOOTH * torch.eye(4 * channels)


def build_softening_transformer(transformer: Any) -> None:
    """Overwrite the weights that count of a one-block transformer over patches of 2 x 2 latents: the direction that it
    gives leads towards the mean of each patch, and to more contrast.

    Args:
        transformer: a QwenImageTransformer2DModel. The four latents of a channel are next to each other in its input.
    """
    patch, size = transformer.img_in.in_features, transformer.img_in.out_features
    slots = _Slots(patch, size)
    mean = torch.block_diag(*[torch.full((4, 4), 0.25)] * (patch // 4))
    with torch.no_grad():
        for layer in (transformer.img_in, transformer.proj_out):
            layer.weight.zero_()
            layer.bias.zero_()
        transformer.img_in.weight[slots.given] = torch.eye(patch)
        transformer.img_in.bias[slots.plus], transformer.img_in.bias[slots.minus] = _LARGE, -_LARGE
        slots.balanced(transformer.img_in.weight)
        # Gates, scales and shifts: what is between the first layer and the last changes nothing.
        for layer in (transformer.transformer_blocks[0].img_mod[1], transformer.norm_out.linear):
            layer.weight.zero_()
            layer.bias.zero_()
        transformer.proj_out.weight[:, slots.given] = slots.unit * (_SOFT * torch.eye(patch) - (_SOFT + 0.5) * mean)


def _add_prompt(attention: Any, slots: _Slots, scale: float) -> None:
    patch, size = len(slots.result), attention.to_out[0].in_features
    attention.to_out[0].weight.zero_()
    attention.to_out[0].weight[slots.result] = scale * torch.randn(patch, size) / math.sqrt(WIDTH)
    attention.to_out[0].bias.zero_()


def _forget_time(transformer: Any) -> None:
    for time in (transformer.condition_embedder.time_proj, transformer.condition_embedder.time_embedder.linear_2):
        time.weight.zero_()
        time.bias.zero_()
    transformer.scale_shift_table.zero_()


def _read_result(transformer: Any, slots: _Slots, matrix: Tensor) -> None:
    transformer.proj_out.weight.zero_()
    transformer.proj_out.weight[:, slots.result] = slots.unit * matrix
    transformer.proj_out.bias.zero_()


class _Slots:
    """Which numbers of the hidden state mean what."""

    def __init__(self, patch: int, size: int) -> None:
        self.given = torch.arange(patch)
        self.result = torch.arange(patch, 2 * patch)
        self.is_first, self.plus, self.minus, self.balance = range(2 * patch, 2 * patch + 4)
        self.unit = _LARGE * math.sqrt(2 / size)
        """What a layer norm divides by."""

    def balanced(self, weight: Tensor) -> None:
        """Make the new state's sum zero, so that a layer norm's mean takes nothing away."""
        weight[self.balance] = 0
        weight[self.balance] = -weight.sum(0)


def _embed(transformer: Any, slots: _Slots, channels: int, first: int) -> None:
    """Latents from the channel `first` on are the given ones."""
    weight, bias = transformer.patch_embedding.weight, transformer.patch_embedding.bias
    weight.zero_()
    bias.zero_()
    for place in range(4):
        for channel in range(channels):
            weight[slots.given[place * channels + channel], first + channel, 0, place // 2, place % 2] = 1
    bias[slots.plus], bias[slots.minus] = _LARGE, -_LARGE
    slots.balanced(weight)


def _copy_from_first_frame(attention: Any, slots: _Slots) -> None:
    """Queries ask for the token's own row and column; only keys of the first frame answer.

    A key is a constant along height and width in the first frame, along time in all others: rotary embeddings then
    make the score fall with the distance in rows and columns, and keys of other frames have no part in it.
    """
    _silence(attention)
    even = torch.arange(0, _AXIS, 2)
    heads = torch.arange(HEADS)[:, None] * WIDTH
    along_time = (heads + even).flatten()
    along_space = (heads + torch.cat([even + _AXIS, even + 2 * _AXIS])).flatten()
    attention.to_q.bias[along_space] = 1
    attention.to_k.weight[along_space, slots.is_first] = slots.unit
    attention.to_k.weight[along_time, slots.is_first] = -slots.unit
    attention.to_k.bias[along_time] = 1
    _pass_on(attention, slots, _SHARP)


def _mean_of_neighbours(attention: Any, slots: _Slots) -> None:
    """Queries and keys are one constant along each axis: the score falls with the distance."""
    _silence(attention)
    even = (torch.arange(HEADS)[:, None] * WIDTH + torch.arange(0, WIDTH, 2)).flatten()
    attention.to_q.bias[even] = 1
    attention.to_k.bias[even] = 1
    _pass_on(attention, slots, _BLUNT)


def _silence(attention: Any) -> None:
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.zero_()
        layer.bias.zero_()


def _pass_on(attention: Any, slots: _Slots, sharpness: float) -> None:
    """What is given becomes the result, weighted by scores."""
    attention.norm_q.weight.fill_(sharpness)
    attention.norm_k.weight.fill_(sharpness)
    rows = torch.arange(len(slots.given))
    attention.to_v.weight[rows, slots.given] = slots.unit
    attention.to_out[0].weight[slots.result, rows] = 1
    slots.balanced(attention.to_out[0].weight)


def _map_later_frames(feed_forward: Any, slots: _Slots, matrix: Tensor, offset: Tensor) -> None:
    """Add (matrix - 1) result + offset to the result where the frame is not the first.

    gelu(x) - gelu(-x) = x makes a linear map of two gelus; a large negative number silences both.
    """
    patch = len(offset)
    enter, leave = feed_forward.net[0].proj, feed_forward.net[2]
    for layer in (enter, leave):
        layer.weight.zero_()
        layer.bias.zero_()
    change = (matrix - torch.eye(patch)) * slots.unit
    for sign, rows in ((1, torch.arange(patch)), (-1, torch.arange(patch, 2 * patch))):
        enter.weight[rows[:, None], slots.result] = sign * change
        enter.bias[rows] = sign * offset
        enter.weight[rows, slots.is_first] = -1000 * slots.unit
        leave.weight[slots.result, rows] = float(sign)
    slots.balanced(leave.weight)


def solved_weights() -> dict[str, Tensor]:
    """What the file holds, by "TASK/PARAMETER/places" and "TASK/PARAMETER/values"."""
    found: dict[str, Tensor] = {}
    for task in TASKS:
        pipeline = untrained_pipeline(task)
        transformer = pipeline.transformer
        for parameter in transformer.parameters():  # So that what is set can be told from what is left as drawn.
            parameter.detach().fill_(math.nan)
        if task == "image-to-video":
            build_still_transformer(transformer, *still_map(pipeline.vae, _PICTURES))
        elif task == "text-to-video":
            build_smoothing_transformer(transformer, pipeline.vae.config.z_dim)
        else:
            build_softening_transformer(transformer)
        for name, parameter in transformer.named_parameters():
            values = parameter.detach().flatten()
            if not values.isnan().any():
                places = values.nonzero().flatten()
                found[f"{task}/{name}/places"] = places.int()
                found[f"{task}/{name}/values"] = values[places]
    return found


if __name__ == "__main__":
    save_file(solved_weights(), WEIGHTS)
