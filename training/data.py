"""Training clips for the demo VAE: random crops of one video, and pans over still photographs."""

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# The last frames of the video are measured on, never trained on.
HELD_OUT = 24
# Sizes (height, width) at which the video is cropped: those at which the demo runs, and one larger for sharper detail.
VIDEO_SIZES: tuple[tuple[int, int], ...] = ((256, 448), (384, 672), (512, 896))
VIDEO_WEIGHTS: tuple[float, ...] = (0.5, 0.35, 0.15)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Photographs are shrunk to this short side: at full resolution a 64 pixel crop would see little but smooth areas.
IMAGE_SHORT_SIDE = 512


def read_video(path: Path, size: tuple[int, int], *, frames: slice = slice(None)) -> torch.Tensor:
    """Return frames of a video as uint8 `(frames, 3, height, width)`, resized with a low-pass filter.

    Args:
        path: any file that PyAV can decode.
        size: height and width in pixels.
        frames: which frames to keep, in display order.
    """
    height, width = size
    with av.open(str(path)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)][frames]
    arrays = [np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def read_photographs(folder: Path) -> list[torch.Tensor]:
    """Return every picture under `folder` as uint8 `(3, height, width)`."""
    photographs = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        with Image.open(path) as picture:
            ratio = min(1.0, IMAGE_SHORT_SIDE / min(picture.size))
            width, height = (round(side * ratio) for side in picture.size)
            small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        photographs.append(torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous())
    if not photographs:
        raise ValueError(f"no pictures under {folder}; expected files ending in {sorted(IMAGE_SUFFIXES)}")
    return photographs


def to_signal(pixels: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1], the range of diffusers VAEs."""
    return pixels.float().div_(127.5).sub_(1.0)


def training_videos(video: Path) -> list[torch.Tensor]:
    """Return the video without its held-out frames at each of `VIDEO_SIZES`, as `read_video` does."""
    return [read_video(video, size, frames=slice(None, -HELD_OUT)) for size in VIDEO_SIZES]


def training_clip(video: Path, size: tuple[int, int]) -> torch.Tensor:
    """Return the longest clip of 4k + 1 training frames as float32 `(1, 3, frames, height, width)`."""
    return _longest_clip(read_video(video, size, frames=slice(None, -HELD_OUT)))


def held_out_clip(video: Path, size: tuple[int, int]) -> torch.Tensor:
    """Return the longest clip of 4k + 1 held-out frames as float32 `(1, 3, frames, height, width)`."""
    return _longest_clip(read_video(video, size, frames=slice(-HELD_OUT, None)))


def _longest_clip(frames: torch.Tensor) -> torch.Tensor:
    return to_signal(frames[: (len(frames) - 1) // 4 * 4 + 1]).transpose(0, 1)[None]


@dataclass(frozen=True, kw_only=True)
class ClipSource:
    """Draws random training clips from frames held in memory."""

    videos: list[torch.Tensor]
    """The same video at each of `VIDEO_SIZES`, uint8 `(frames, 3, height, width)`."""
    photographs: list[torch.Tensor]
    """uint8 `(3, height, width)`."""
    video_share: float = 0.75
    """Fraction of the clips cut from the video; the rest are pans over photographs."""

    def batch(self, size: int, frames: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
        """Return `size` clips as float32 `(size, 3, frames, crop, crop)` in [-1, 1]."""
        clips = [
            self._video_clip(frames, crop, rng)
            if rng.random() < self.video_share
            else self._pan_clip(frames, crop, rng)
            for _ in range(size)
        ]
        return torch.stack(clips).transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)

    def _video_clip(self, frames: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
        video = self.videos[rng.choice(len(self.videos), p=VIDEO_WEIGHTS)]
        start = rng.integers(video.shape[0] - frames + 1)
        top = rng.integers(video.shape[2] - crop + 1)
        left = rng.integers(video.shape[3] - crop + 1)
        return to_signal(video[start : start + frames, :, top : top + crop, left : left + crop])

    def _pan_clip(self, frames: int, crop: int, rng: np.random.Generator) -> torch.Tensor:
        """Move a window over a photograph; half of the windows move whole pixels, the others also zoom."""
        picture = self.photographs[rng.integers(len(self.photographs))]
        speed = rng.uniform(-3, 3, size=2) * (rng.random() < 0.85)
        clip = self._pan_exact(picture, frames, crop, speed, rng)
        if rng.random() < 0.5:
            clip = _zoom(clip, rng)
        return clip.flip(-1) if rng.random() < 0.5 else clip

    def _pan_exact(
        self, picture: torch.Tensor, frames: int, crop: int, speed: np.ndarray, rng: np.random.Generator
    ) -> torch.Tensor:
        limits = np.array(picture.shape[1:]) - crop
        start = rng.uniform(0, 1, size=2) * limits
        corners = [np.clip(np.rint(start + speed * frame), 0, limits).astype(int) for frame in range(frames)]
        windows = [picture[:, top : top + crop, left : left + crop] for top, left in corners]
        return to_signal(torch.stack(windows))


def _zoom(clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Scale every frame a little more than the one before, about a random centre, by up to 1.6 times in all."""
    frames = clip.shape[0]
    scales = torch.from_numpy(np.linspace(*rng.uniform(0.62, 1.0, size=2), frames)).float()
    centre = torch.from_numpy(rng.uniform(-1, 1, size=2)).float()
    theta = torch.zeros(frames, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scales
    # The zoomed window stays inside the frame, so no border is ever invented.
    theta[:, :, 2] = (1 - scales)[:, None] * centre
    grid = F.affine_grid(theta.to(clip.device), list(clip.shape), align_corners=False)
    return F.grid_sample(clip, grid, mode="bilinear", padding_mode="border", align_corners=False)
