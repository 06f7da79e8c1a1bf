"""Every image and video autoencoder of diffusers, tiny and randomly initialised, as one table.

A row keeps each structural feature of the real checkpoint (attention, shortcuts, patch size, causal caches,
norms, temporal compression); only channels and layer counts are small. Parameters are re-drawn: none is idle.

    family = FAMILIES["wan21"]
    vae = family.build().to(torch.float64)
    moments = run_encode(vae, family.sample(torch.float64))
    video = run_decode(family, vae, family.latent(torch.float64))
"""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import families_image as image
import families_video as video
import torch

SHARED = "HALOVAE_TESTS_SHARED"
"""Environment: a folder for what the processes of one run of the tests compute for each other."""

EXACT = 1e-12
"""Tolerance relative to the largest value, in float64: only the order of summation may differ."""
FLOAT32 = 1e-6
"""Tolerance where the model itself drops to float32: its last bit is 6e-8, and later layers amplify it."""


@dataclass(frozen=True)
class Family:
    """One autoencoder at a size that a test can afford: about a second a call, in float64, on one thread."""

    name: str
    model: str
    """Name of the class in diffusers."""
    config: Mapping[str, Any]
    sample_shape: tuple[int, ...]
    """Input of encode: (batch, channels, [frames,] height, width)."""
    latent_shape: tuple[int, ...]
    """Input of decode: at least 4 rows and 6 columns."""
    ratio: tuple[int, int]
    """Compression in space and in time."""
    _: KW_ONLY
    setup: Callable[[Any], None] | None = None
    """Sets what no config does."""
    decode_kwargs: Callable[[torch.Tensor], dict[str, Any]] = lambda latent: {}
    """Further arguments of decode, made anew for each call: a generator is used up by one."""
    encode: bool = True
    decode: bool = True
    exact_encode: bool = True
    exact_decode: bool = True
    float32: Literal["", "encode", "decode", "both"] = ""
    """The half that drops to float32 inside; the note starts with the lines of diffusers that do it."""
    note: str = ""

    @property
    def encode_tolerance(self) -> float:
        return FLOAT32 if self.float32 in ("encode", "both") else EXACT

    @property
    def decode_tolerance(self) -> float:
        return FLOAT32 if self.float32 in ("decode", "both") else EXACT

    @property
    def tolerance(self) -> float:
        """Of both halves together."""
        return max(self.encode_tolerance, self.decode_tolerance)

    def build(self, seed: int = 0) -> Any:
        """The model in float32, in eval mode, without gradients. The global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = getattr(diffusers, self.model)(**self.config)
            randomize(vae)
        if self.setup is not None:
            self.setup(vae)
        return vae.eval().requires_grad_(False)

    def sample(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return _draw(self.sample_shape, dtype, seed=1)

    def latent(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return _draw(self.latent_shape, dtype, seed=2)


def randomize(vae: torch.nn.Module) -> None:
    """Re-draw every parameter, so that no zero-initialised layer is silent and no attention is uniform.

    Weights keep the variance of their input, biases are small, scales (of norms, layers, noise) are near 1.
    """
    for name, parameter in vae.named_parameters():
        noise = torch.randn(parameter.shape)
        if parameter.squeeze().ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * noise + (0 if name.endswith("bias") else 1)
    for name, buffer in vae.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.data = 0.1 * torch.randn(buffer.shape) + (1 if name.endswith("var") else 0)


def run_encode(vae: Any, sample: torch.Tensor) -> torch.Tensor:
    """The tensor in whatever encode returns: a distribution's moments, else the latents."""
    with torch.no_grad():
        output = vae.encode(sample)
    value = output[0]
    return value if torch.is_tensor(value) else value.parameters


def run_decode(family: Family, vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """The decoded tensor. The global random state, where some decoders draw noise, is seeded for the call."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = vae.decode(latent, **family.decode_kwargs(latent))
    return output if torch.is_tensor(output) else output.sample


def run_half(name: str, vae: Any, half: str, tensor: torch.Tensor) -> torch.Tensor:
    """What one half of a family's VAE gives."""
    return run_encode(vae, tensor) if half == "encode" else run_decode(FAMILIES[name], vae, tensor)


def run_half_in_float64(name: str, vae: Any, half: str) -> torch.Tensor:
    """The same, of the family's own noise in double precision."""
    family = FAMILIES[name]
    return run_half(name, vae, half, (family.sample if half == "encode" else family.latent)(torch.float64))


def plain(name: str, half: str) -> torch.Tensor:
    """What the VAE of `build` gives un-tiled and un-parallel in float64: computed once by all tests of a run together.

    Those that can run in tiles only have no such result.
    """
    kept = Path(os.environ[SHARED]) / f"{name}-{half}.pt"
    if not kept.exists():
        vae = _untiled(name)
        draft = kept.with_suffix(f".{os.getpid()}")
        torch.save(run_half_in_float64(name, vae, half), draft)
        draft.replace(kept)
    return torch.load(kept)


@functools.lru_cache(1)
def _untiled(name: str) -> Any:
    """For both halves, of which one follows the other."""
    vae = FAMILIES[name].build().to(torch.float64)
    vae.use_tiling = False
    return vae


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _generator(latent: torch.Tensor) -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(3)}


def _timestep(latent: torch.Tensor) -> dict[str, Any]:
    return {"temb": torch.full((latent.shape[0],), 0.05, dtype=latent.dtype)}


def _masked_image(latent: torch.Tensor) -> dict[str, Any]:
    picture = _draw((2, 3, 40, 56), latent.dtype, seed=4)
    return {"image": picture, "mask": (picture[:, :1] > 0).to(latent.dtype)}


def _tiles(height: int, width: int, overlap: int) -> Callable[[Any], None]:
    """Allegro runs in tiles of one fixed size only; a tile as large as the sample is the un-tiled result."""

    def setup(vae: Any) -> None:
        vae.use_tiling = True
        vae.kernel, vae.stride = (8, height, width), (8, height - overlap, width - overlap)

    return setup


_SANA = "attention_processor.py:5277 (linear attention), normalization.py:555 (RMSNorm)"
_LTX = "normalization.py:555 (RMSNorm)"
_WAN = "autoencoder_kl_wan.py:225 (upsampling)"
_VIDTOK = "autoencoder_vidtok.py:192, 394, 414 (resampling)"

# fmt: off
_TABLE = (
    Family("kl", "AutoencoderKL", image.KL,
           (2, 3, 40, 56), (2, 4, 5, 7), (8, 1)),
    Family("flux2", "AutoencoderKLFlux2", image.FLUX2,
           (2, 3, 40, 56), (2, 8, 5, 7), (8, 1)),
    Family("asymmetric", "AsymmetricAutoencoderKL", image.ASYMMETRIC,
           (2, 3, 40, 56), (2, 4, 5, 7), (8, 1)),
    Family("asymmetric_masked", "AsymmetricAutoencoderKL", image.ASYMMETRIC,
           (2, 3, 40, 56), (2, 4, 5, 7), (8, 1), decode_kwargs=_masked_image,
           note="inpainting: decode has two more spatial inputs, image and mask"),
    Family("vq", "VQModel", image.VQ,
           (2, 3, 20, 28), (2, 3, 5, 7), (4, 1), note="decode quantises"),
    Family("movq", "VQModel", image.MOVQ,
           (2, 3, 40, 56), (2, 4, 5, 7), (8, 1), note="decode quantises"),
    Family("tiny", "AutoencoderTiny", image.TINY,
           (2, 3, 40, 56), (2, 4, 5, 7), (8, 1)),
    Family("kvae", "AutoencoderKLKVAE", image.KVAE,
           (1, 3, 40, 56), (1, 4, 5, 7), (8, 1)),
    Family("hunyuan_image", "AutoencoderKLHunyuanImage", image.HUNYUAN_IMAGE,
           (1, 3, 40, 56), (1, 8, 5, 7), (8, 1)),
    Family("hunyuan_image_refiner", "AutoencoderKLHunyuanImageRefiner", video.HUNYUAN15,
           (1, 3, 3, 64, 96), (1, 4, 3, 4, 6), (16, 1), note="pipelines give it one frame"),
    Family("qwenimage", "AutoencoderKLQwenImage", video.WAN21,
           (1, 3, 9, 40, 56), (1, 4, 3, 5, 7), (8, 4), float32="decode",
           note="autoencoder_kl_qwenimage.py:130 (upsampling); pipelines give it one frame"),
    Family("qwenimage21", "AutoencoderKLQwenImage21", video.QWENIMAGE21,
           (1, 4, 1, 64, 96), (1, 4, 1, 4, 6), (16, 8), float32="decode",
           note="autoencoder_kl_qwenimage21.py:233 (upsampling); takes one frame only and is 2-D inside"),
    Family("dc", "AutoencoderDC", image.DC,
           (2, 3, 128, 192), (2, 8, 4, 6), (32, 1), float32="both",
           note=f"{_SANA}; linear attention where a map has more than 32 positions, else quadratic"),
    Family("dc_sana", "AutoencoderDC", image.DC_SANA,
           (2, 3, 128, 192), (2, 8, 4, 6), (32, 1), float32="both", note=_SANA),
    Family("consistency", "ConsistencyDecoderVAE", image.CONSISTENCY,
           (2, 3, 40, 56), (2, 4, 5, 7), (8, 1), decode_kwargs=_generator,
           note="decode is a UNet that takes away noise of the sample's size, in two steps"),
    Family("wan21", "AutoencoderKLWan", video.WAN21,
           (1, 3, 9, 40, 56), (1, 4, 3, 5, 7), (8, 4), float32="decode", note=_WAN),
    Family("wan22", "AutoencoderKLWan", video.WAN22,
           (1, 3, 9, 64, 96), (1, 4, 3, 4, 6), (16, 4), float32="decode", note=_WAN),
    Family("hunyuan_video", "AutoencoderKLHunyuanVideo", video.GROUPED,
           (1, 3, 9, 40, 56), (1, 4, 3, 5, 7), (8, 4)),
    Family("hunyuan_video_framewise", "AutoencoderKLHunyuanVideo", video.GROUPED,
           (1, 3, 21, 32, 48), (1, 4, 6, 4, 6), (8, 4),
           note="above 16 frames, by default: two calls that overlap in time, blended"),
    Family("hunyuan_video15", "AutoencoderKLHunyuanVideo15", video.HUNYUAN15,
           (1, 3, 5, 64, 96), (1, 4, 2, 4, 6), (16, 4)),
    Family("ltx", "AutoencoderKLLTXVideo", video.LTX,
           (1, 3, 9, 128, 192), (1, 8, 2, 4, 6), (32, 8), float32="both", note=_LTX),
    Family("ltx091", "AutoencoderKLLTXVideo", video.LTX091,
           (1, 3, 9, 128, 192), (1, 8, 2, 4, 6), (32, 8), float32="both", decode_kwargs=_timestep,
           note=f"{_LTX}; decode draws noise of each map's size from the global random state"),
    Family("ltx095", "AutoencoderKLLTXVideo", video.LTX095,
           (1, 3, 9, 128, 192), (1, 8, 2, 4, 6), (32, 8), float32="both", decode_kwargs=_timestep, note=_LTX),
    Family("ltx2", "AutoencoderKLLTX2Video", video.LTX2,
           (1, 3, 9, 128, 192), (1, 8, 2, 4, 6), (32, 8)),
    Family("ltx2_diffusion", "LTX2VideoDiffusionDecoderModel", video.LTX2_DIFFUSION,
           (1, 3, 3, 24, 36), (1, 8, 2, 6, 9), (4, 2), float32="decode", encode=False, decode_kwargs=_generator,
           note="ltx2_diffusion_decoder.py:139 (rotary embedding); neighbourhood attention; draws noise"),
    Family("cogvideox", "AutoencoderKLCogVideoX", video.GROUPED,
           (1, 3, 17, 32, 48), (1, 4, 5, 4, 6), (8, 4),
           note="two calls, of 9 and 8 frames; the cache between them is an argument"),
    Family("mochi", "AutoencoderKLMochi", video.MOCHI,
           (1, 3, 7, 32, 48), (1, 12, 2, 4, 6), (8, 6), float32="encode",
           note="autoencoder_kl_mochi.py:419 (Fourier features of the pixels)"),
    Family("magvit", "AutoencoderKLMagvit", video.GROUPED,
           (1, 3, 9, 40, 56), (1, 4, 3, 5, 7), (8, 4),
           note="three calls; the caches between them are attributes of the convolutions"),
    Family("allegro", "AutoencoderKLAllegro", video.GROUPED,
           (1, 3, 8, 40, 56), (1, 4, 2, 5, 7), (8, 4), setup=_tiles(40, 56, overlap=0),
           exact_encode=False, exact_decode=False,
           note="diffusers has no un-tiled path for it; decode gives (batch, frames, channels, height, width)"),
    Family("allegro_tiled", "AutoencoderKLAllegro", video.GROUPED,
           (1, 3, 8, 40, 56), (1, 4, 2, 5, 7), (8, 4), setup=_tiles(24, 24, overlap=8),
           float32="both", exact_encode=False, exact_decode=False,
           note="autoencoder_kl_allegro.py:1093-1105 (blending of 2 x 3 tiles)"),
    Family("cosmos", "AutoencoderKLCosmos", video.COSMOS,
           (1, 3, 9, 40, 56), (1, 4, 2, 5, 7), (8, 8)),
    Family("temporal_decoder", "AutoencoderKLTemporalDecoder", video.TEMPORAL_DECODER,
           (3, 3, 40, 56), (3, 4, 5, 7), (8, 1), decode_kwargs=lambda latent: {"num_frames": 3},
           note="the batch is time, which decode mixes"),
    Family("vidtok", "AutoencoderVidTok", video.VIDTOK,
           (1, 3, 12, 40, 56), (1, 4, 3, 5, 7), (8, 4), float32="decode",
           note=f"{_VIDTOK}; 3 of the 12 frames stand for copies of the first: decode returns 9"),
    Family("vidtok_noncausal", "AutoencoderVidTok", video.VIDTOK | {"is_causal": False},
           (1, 3, 16, 40, 56), (1, 4, 4, 5, 7), (8, 4), float32="decode", note=_VIDTOK),
    Family("vidtok_fsq", "AutoencoderVidTok", video.VIDTOK_FSQ,
           (1, 3, 12, 40, 56), (1, 6, 3, 5, 7), (8, 4), float32="both",
           note=f"{_VIDTOK}, 143 (encode quantises)"),
    Family("kvae_video", "AutoencoderKLKVAEVideo", video.KVAE_VIDEO,
           (1, 3, 25, 32, 48), (1, 4, 7, 4, 6), (8, 4),
           note="two calls, of 17 and 8 frames; a last call of one latent frame would decode to one frame"),
    Family("kandinsky6_sr", "Kandinsky6SRVAE", video.KANDINSKY6,
           (1, 3, 21, 64, 96), (1, 4, 6, 4, 6), (16, 4), float32="both",
           note="autoencoder_kandinsky6_sr.py:167 (RMSNorm); two calls, of 17 and 4 frames"),
    Family("minimax_h3", "AutoencoderKLMiniMaxH3", video.MINIMAX_H3,
           (1, 3, 22, 64, 96), (1, 4, 7, 4, 6), (16, 4), float32="decode", exact_decode=False,
           note="autoencoder_kl_minimax_h3.py:314, 393, 464; decode is a transformer over all positions"),
)
# fmt: on

_THERE = set(dir(diffusers))
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE if family.model in _THERE}
"""By name. Older versions of diffusers lack some of the classes."""

OUT_OF_SCOPE = {
    "AutoencoderRAE": "vision transformers on both sides, for one square size",
    "AutoencoderKLKVAEAudio": "audio",
    "AutoencoderKLLTX2Audio": "audio",
    "AutoencoderKLMiniMaxH3Audio": "audio",
    "AutoencoderOobleck": "audio",
    "AutoencoderSAME": "audio",
    "Cosmos3AVAEAudioTokenizer": "audio",
    "LongCatAudioDiTVae": "audio",
    "MMAudioVAE": "audio",
    "MMAudioVocoder": "audio",
    "MiniMaxMusic3Vocoder": "audio",
    "RFD4ProteinaAutoencoder": "proteins",
}
"""The other classes of diffusers.models.autoencoders, and why the table leaves them out."""
