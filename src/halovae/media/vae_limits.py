"""What a VAE takes, learnt by asking it, and how a clip is padded to that and cropped back.

A VAE in diffusers may drop trailing frames, or rows and columns off its compression ratio, without a word. No attribute
tells the valid sizes of every VAE, so its own code is run on a twin without weights (on the meta device: shapes only,
no arithmetic), and sizes in and out are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halovae.base import verdicts
from halovae.base.errors import InputError, counted
from halovae.base.files import first_line
from halovae.calls.blueprint import code_words
from halovae.calls.dataflow import Remembered
from halovae.calls.target import runs_in_tiles_only, tile_grid
from halovae.media.models import skeleton

_SIZE = (128, 192)
"""Height and width of the trial's picture: multiples of every compression ratio in use, and large enough for every
padding. No square: one that comes back could be the only size that there is."""
_SEARCH = 32
"""How many frames to add at most in search of a valid count."""
_CHANNELS = (3, 4)
"""RGB, or RGB with alpha. Audio and protein autoencoders take neither."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One clip's sizes and those that go through the VAE. Padding is behind the last frame, below and to the right."""

    frames: int
    height: int
    width: int
    padded_frames: int
    padded_height: int
    padded_width: int

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each kind of padding."""
        lines: list[str] = []
        if self.padded_frames != self.frames:
            lines.append(
                f"{counted(self.frames, 'frame')} padded to {self.padded_frames} for the VAE, cropped back after it"
            )
        if (self.padded_height, self.padded_width) != (self.height, self.width):
            padded = f"{self.padded_width}x{self.padded_height}"
            lines.append(f"{self.width}x{self.height} padded to {padded} for the VAE, cropped back after it")
        return tuple(lines)

    def pad(self, clip: Tensor) -> Tensor:
        """(channels, frames, height, width) to the padded sizes, by repeating the edge and the last frame."""
        missing = (self.padded_frames - self.frames, self.padded_height - self.height, self.padded_width - self.width)
        if not any(missing):
            return clip
        amounts = (0, missing[2], 0, missing[1], 0, missing[0])
        return functional.pad(clip.unsqueeze(0), amounts, mode="replicate").squeeze(0)

    def crop(self, clip: Tensor) -> Tensor:
        """Undo `pad`."""
        self.check(*clip.shape[1:])
        return self.crop_piece(clip, 0)

    def crop_piece(self, piece: Tensor, start: int) -> Tensor:
        """What is left of some frames, the first of which has the number `start`."""
        return piece[:, : max(0, self.frames - start), : self.height, : self.width]

    def check(self, frames: int, height: int, width: int) -> None:
        """Refuse other sizes than the padded ones: the VAE has changed them."""
        got, padded = (frames, height, width), (self.padded_frames, self.padded_height, self.padded_width)
        if got != padded:
            raise InputError(f"the VAE gave back {_sizes(*got)} for {_sizes(*padded)}: it does not keep these sizes")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one VAE takes and gives."""

    name: str
    """Of its class."""
    has_frame_dim: bool
    """Whether it takes (batch, channels, frames, height, width), or else (batch, channels, height, width)."""
    per_frame: bool
    """Whether each frame goes through by itself."""
    channels: int
    latent_channels: int
    ratio: int
    """Pixels per latent, along height and width."""
    period: int = 0
    """Frames per latent frame, after the first; 0 where each frame goes by itself, or there is no such rule."""
    lead: int = 0
    """Copies of the first frame that encode gets before it, and that decode leaves out."""
    only_size: tuple[int, int] | None = None
    """Height and width, of a VAE that takes no others."""
    grid: tuple[tuple[int, int], ...] = ()
    """Of tiles that have to cover the clip, see `calls.target.tile_grid`."""
    frames_first: bool = False
    """Whether decode gives (batch, frames, channels, height, width)."""
    pixels: Pixels | None = None
    """The numbers that it takes and gives for a picture; None where they are not known."""
    padded_count: Callable[[int], int]
    """The smallest frame count from the given one on that goes through the VAE whole."""

    @property
    def time_dim(self) -> int:
        """The dimension of latents along which a clip goes."""
        return 0 if self.per_frame else 2

    def known_pixels(self) -> Pixels:
        """The numbers that the VAE takes and gives for a picture. They have to be known."""
        if self.pixels is None:
            raise InputError(
                f"it is not known which numbers {self.name} takes for a picture, -1 to 1 or others: use its encode and "
                f"decode from Python, with halovae.parallelize"
            )
        return self.pixels

    def fit(self, frames: int, height: int, width: int) -> Fit:
        """How a clip of these sizes goes through the VAE.

        Raises:
            InputError: no frame count near `frames` comes out whole, or the VAE takes one size only.
        """
        if self.only_size not in (None, (height, width)):
            tall, wide = self.only_size
            raise InputError(
                f"{self.name} takes {wide}x{tall} only, not {width}x{height}: use --height {tall} --width {wide}"
            )
        covered = [tile + max(0, -(-(size - tile) // step)) * step
                   for (tile, step), size in zip(self.grid, (frames, height, width), strict=False)]  # fmt: skip
        padded = covered or [
            self.padded_count(frames),
            *(-(-size // self.ratio) * self.ratio for size in (height, width)),
        ]
        return Fit(
            frames=frames, height=height, width=width,
            padded_frames=padded[0], padded_height=padded[1], padded_width=padded[2],
        )  # fmt: skip


def limits_of(vae: nn.Module) -> Limits:
    """Learn what `vae` takes. Its weights are not touched.

    Raises:
        InputError: it takes no RGB images or clips, or doesn't keep their size.
    """
    trial = _Trial(vae)
    known = trial.kept("limits", lambda: _facts(trial))
    ratio, latent_channels, per_frame = known.pop("ratio"), known.pop("latent_channels"), known.pop("per_frame")
    vars(trial).update(known)
    return Limits(
        name=trial.name,
        has_frame_dim=trial.has_frame_dim,
        per_frame=per_frame,
        channels=trial.channels,
        latent_channels=latent_channels,
        ratio=ratio,
        period=0 if per_frame else trial.period() or 0,
        lead=trial.lead,
        only_size=None if (trial.height, trial.width) == _SIZE else (trial.height, trial.width),
        grid=tile_grid(vae),
        frames_first=trial.frames_first,
        pixels=pixels_of(vae),
        padded_count=(lambda frames: frames) if per_frame else trial.padded_count,
    )


def _facts(trial: _Trial) -> dict[str, Any]:
    """What is found out by running the VAE's code, besides frame counts."""
    latent = trial.first()
    rows, columns = trial.height / latent.shape[-2], trial.width / latent.shape[-1]
    if rows != columns or rows != int(rows):
        sizes = f"latents of {tuple(latent.shape)} from {trial.width}x{trial.height} pixels"
        raise InputError(f"{trial.name} makes {sizes}: not to scale")
    return {
        "ratio": int(rows), "latent_channels": latent.shape[1],
        "per_frame": not trial.has_frame_dim or trial.is_for_images(),
        **{name: vars(trial)[name] for name in
           ("channels", "has_frame_dim", "frames_first", "height", "width", "lead")},
    }  # fmt: skip


class _Trial:
    """Runs a VAE's code on shapes. Each run has a fresh twin: a failed one may leave its caches filled."""

    def __init__(self, vae: nn.Module) -> None:
        self.name = type(vae).__name__
        self._vae, self._remembered = vae, Remembered()
        self.height, self.width = _SIZE
        self.channels = 0
        self.has_frame_dim = False
        self.lead = 0
        self.frames_first = False
        self._code = code_words(vae)
        self.padded_count = cache(
            lambda frames: int(self.kept(f"frames from {frames}", partial(self._padded_count, frames)))
        )
        self.period = cache(lambda: self.kept("period", self._period))
        self._returned = cache(self._returned)

    def kept(self, question: str, answer: Callable[[], Any]) -> Any:
        """The answer that another process has found for a VAE of this code and config, or this one now."""
        name = self._code and verdicts.name_of(torch.device("meta"), question, self._code)
        found = verdicts.read(name)
        if found is None:
            found = answer()
            verdicts.write(name, found)
        return found

    def first(self) -> Tensor:
        """A latent (on meta) of a picture that is kept. Finds out all but frame counts."""
        latent, sample = self._first()
        if sample.shape[-2:] != (self.height, self.width):
            # One that resizes every picture to its own size keeps pictures of this size.
            got = _sizes(1, *sample.shape[-2:])
            wanted = _sizes(1, self.height, self.width)
            self.height, self.width = sample.shape[-2:]
            latent, sample = self._first()
            if sample.shape[-2:] != (self.height, self.width):
                raise InputError(f"{self.name} gives back {got} for {wanted}: it resizes its input")
        if self.has_frame_dim:
            self.lead = self._lead()
        return latent

    def _first(self) -> tuple[Tensor, Tensor]:
        problems: list[str] = []
        # 25 frames satisfy every VAE that wants more than one.
        for frames in ((1,), (25,), ()):
            for channels in _CHANNELS:
                twin, latent = self._twin(), None
                try:
                    latent = self._encode(twin, (1, channels, *frames, self.height, self.width))
                    sample = self._decode(twin, latent)
                except Exception as error:  # Whatever a model's code raises on a shape that it can't take.
                    if latent is not None:  # The shape was right, so this says more.
                        problems.insert(0, f"can't decode what it encodes: {first_line(error)}")
                    elif isinstance(error, InputError):  # It was right here, too.
                        problems.insert(0, f"can't be used here: {error}")
                    else:
                        problems.append(f"takes neither RGB images nor RGB clips: {first_line(error)}")
                    continue
                self.channels, self.has_frame_dim = channels, bool(frames)
                self.frames_first = sample.ndim == 5 and sample.shape[1] not in _CHANNELS
                return latent, sample
        raise InputError(f"{self.name} {problems[0]}")

    def is_for_images(self) -> bool:
        """Whether it keeps one frame, and no other count that a clip might have."""
        return self._keeps(1) and self.period() is None and not any(map(self._keeps, range(2, _SEARCH)))

    def _lead(self) -> int:
        """See `Limits.lead`. A causal network can leave out nothing but the beginning."""
        vae: Any = self._vae
        ratio = vars(vae).get("temporal_compression_ratio")
        if not vae.config.get("is_causal") or not isinstance(ratio, int) or self._keeps(1 + 2 * ratio):
            return 0
        return ratio - 1 if self._returned(ratio - 1 + 1 + 2 * ratio) == 1 + 2 * ratio else 0

    def _padded_count(self, frames: int) -> int:
        """See `Limits.padded_count`."""
        period, last = self.period(), frames + _SEARCH - 1
        if not period and self._keeps(frames):
            return frames
        for count in range(frames, last + 1):
            if period and (count - 1) % period == 0 and self._keeps(count):
                return count
        smallest, count = None, last
        while count >= frames:
            back = self._returned(self.lead + count)
            smallest = count if back == count else smallest
            # Where frames at the end are dropped, what comes back is the next smaller count that is kept.
            count = back if 0 < back < count else count - 1
        if smallest is None:
            raise InputError(
                f"{self.name} keeps no frame count from {frames} to {last}: choose another with --frames A:B"
            )
        return smallest

    def _period(self) -> int | None:
        """k if 1, 1 + k, 1 + 2k, ... frames are likely to be valid."""
        for base in (8, 24):
            one, more = self._latent_frames(1), self._latent_frames(1 + base)
            if one and more and more > one and base % (more - one) == 0 and self._keeps(1 + base):
                return base // (more - one)
        return None

    def _keeps(self, frames: int) -> bool:
        return self._returned(self.lead + frames) == frames

    def _latent_frames(self, frames: int) -> int:
        try:
            return int(self._encode(self._twin(), self._clip(self.lead + frames)).shape[2])
        except Exception:  # As in `_first`.
            return 0

    def _returned(self, frames: int) -> int:
        twin = self._twin()
        try:
            return int(self._decode(twin, self._encode(twin, self._clip(frames))).shape[1 if self.frames_first else 2])
        except Exception:  # As in `_first`.
            return 0

    def _clip(self, frames: int) -> tuple[int, ...]:
        return 1, self.channels, frames, self.height, self.width

    def _encode(self, twin: Any, shape: tuple[int, ...]) -> Tensor:
        with torch.no_grad(), self._remembered:
            return latent_of(twin.encode(torch.empty(shape, device="meta")))

    def _decode(self, twin: Any, latent: Tensor) -> Tensor:
        with torch.no_grad(), self._remembered:
            return sample_of(twin.decode(latent, **decode_arguments(twin, latent)))

    def _twin(self) -> Any:
        vae: Any = self._vae
        twin = skeleton(type(vae), vae.config)
        if runs_in_tiles_only(vae):
            twin.use_tiling = True
        return twin


def latent_of(output: Any) -> Tensor:
    """The latent in what `encode` returned: the mode where it is a distribution."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    for name in ("latents", "latent"):
        if hasattr(output, name):
            return getattr(output, name)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]  # Quantised latents, before their indices.
    raise InputError(f"encode returned a {type(output).__name__}, which holds no latents that halovae knows")


def parameters_of(output: Any) -> Tensor:
    """Mean and logarithm of the variance, one behind the other along the channels, in what `encode` returned."""
    parameters = getattr(getattr(output, "latent_dist", None), "parameters", None)
    if not isinstance(parameters, Tensor):
        raise InputError(f"encode returned a {type(output).__name__}, which holds no parameters of a distribution")
    return parameters


def sample_of(output: Any) -> Tensor:
    """The picture in what `decode` returned."""
    return output if isinstance(output, Tensor) else output.sample


def decode_arguments(vae: Any, latent: Tensor) -> dict[str, Any]:
    """What `decode` needs besides the latent."""
    arguments: dict[str, Any] = {}
    if "num_frames" in inspect.signature(vae.decode).parameters:
        # A decoder that takes the frames of one clip as its batch.
        arguments["num_frames"] = latent.shape[0]
    if vae.config.get("timestep_conditioning"):
        # A decoder that can also denoise: 0 says that there is no noise.
        arguments["temb"] = torch.zeros(latent.shape[0], dtype=latent.dtype, device=latent.device)
    return arguments


def _sizes(frames: int, height: int, width: int) -> str:
    return f"{counted(frames, 'frame')} of {width}x{height}"


# ---- the numbers of a picture ----------------------------------------------------------------------------------------


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
