"""Which numbers a VAE takes for the levels of a picture. No attribute of a VAE tells, so its class does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Pixels:
    """(level / 255 - mean) / std, for red, green and blue."""

    mean: _Triple
    std: _Triple

    def from_signed(self, clip: Tensor) -> Tensor:
        """(3, frames, height, width) of -1 to 1, in these numbers."""
        return self._scaled(clip, lambda frame, mean, std: ((frame + 1) / 2 - mean) / std)

    def to_signed(self, clip: Tensor) -> Tensor:
        """(3, frames, height, width) in these numbers, of -1 to 1."""
        return self._scaled(clip, lambda frame, mean, std: (frame * std + mean) * 2 - 1)

    def _scaled(self, clip: Tensor, scale: Any) -> Tensor:
        if self == SIGNED:
            return clip
        # No numbers of less than 32 bits: they would be rounded at every step.
        dtype = torch.promote_types(clip.dtype, torch.float32)
        mean, std = (torch.tensor(v, dtype=dtype, device=clip.device)[:, None, None] for v in (self.mean, self.std))
        scaled = torch.empty_like(clip)
        for number in range(clip.shape[1]):  # Steps over the whole clip would take copies of it.
            scaled[:, number] = scale(clip[:, number].to(dtype), mean, std)
        return scaled


SIGNED = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""-1 to 1: what diffusers' image processors make."""
UNIT = Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""0 to 1."""
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PIXELS = {
    "AutoencoderKLMiniMaxH3": IMAGENET,
    "AutoencoderRAE": UNIT,
    **dict.fromkeys((
        "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKL", "AutoencoderKLAllegro",
        "AutoencoderKLCogVideoX", "AutoencoderKLCosmos", "AutoencoderKLFlux2", "AutoencoderKLHunyuanImage",
        "AutoencoderKLHunyuanImageRefiner", "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLKVAE", "AutoencoderKLKVAEVideo", "AutoencoderKLLTX2Video", "LTX2VideoDiffusionDecoderModel",
        "AutoencoderKLLTXVideo", "AutoencoderKLMagvit", "AutoencoderKLMochi", "AutoencoderKLQwenImage",
        "AutoencoderKLQwenImage21", "AutoencoderKLTemporalDecoder", "AutoencoderKLWan", "AutoencoderTiny",
        "AutoencoderVidTok", "ConsistencyDecoderVAE", "Kandinsky6SRVAE", "VQModel",
    ), SIGNED),
}  # fmt: skip
"""By the class's documentation and by the processors of the pipelines that use it."""


def pixels_of(vae: nn.Module) -> Pixels | None:
    """What a VAE's class takes; None where nobody has looked it up."""
    found = next((PIXELS[cls.__name__] for cls in type(vae).__mro__ if cls.__name__ in PIXELS), None)
    config: Any = getattr(vae, "config", {})
    if found is not None and config.get("lookup_from_codebook"):
        return UNIT  # A quantiser whose indices are tokens of a language of pictures; its pipelines don't normalise.
    return found
