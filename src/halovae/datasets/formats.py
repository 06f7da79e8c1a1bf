"""Latents of a dataset on disk: what the file of each item is called, and what is in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as from_bytes
from torch import Tensor

from halovae.base.errors import InputError
from halovae.base.files import atomic
from halovae.datasets.buckets import Bucket, Taken
from halovae.datasets.items import Item
from halovae.media import latents_file
from halovae.media.latents_file import KEY, PARAMETERS, LatentsInfo, content_of

PACKED = {"webdataset": ".tar", "parquet": ".parquet"}
"""Formats of several items a file, and the files' suffix."""
PARTS = ".parts"
"""The folder of items that wait for the others of their shard."""
BEGUN = ".begun"
"""The folder of what processes are at."""
LATENTS = "latents"
"""The folder of items, or how the names of shards begin."""
MUSUBI = {
    "AutoencoderKLWan": ("wan", "wan", True),
    "AutoencoderKLQwenImage": ("qi", "qwen_image", True),
    "AutoencoderKLHunyuanVideo": ("hv", "hunyuan_video", False),
}
"""By class: what musubi-tuner calls the model in names of files and in metadata, and whether it caches latents as the
transformer takes them, scaled."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How items are kept: what workers have to know of it."""

    folder: str
    format: str
    store: str
    dtype: str
    """Of the stored numbers, as torch calls it."""
    model: str
    model_class: str
    scaling: Mapping[str, Any]

    @property
    def root(self) -> Path:
        return Path(self.folder)

    def place(self, item: Item, bucket: Bucket) -> Path:
        """The file of an item, until it is packed."""
        if self.format == "musubi":
            short, _, _ = MUSUBI[self.model_class]
            stem = Path(item.key).stem
            if bucket.frames > 1:
                stem += f"_{item.range.start:05d}-{bucket.frames:03d}"
            return self.root / f"{stem}_{bucket.width:04d}x{bucket.height:04d}_{short}{latents_file.SUFFIX}"
        folder = PARTS if self.format in PACKED else LATENTS
        return self.root / folder / f"{item.key}{latents_file.SUFFIX}"

    def shard(self, number: int) -> Path:
        return self.root / f"{LATENTS}-{number:06d}{PACKED[self.format]}"

    def write(self, item: Item, bucket: Bucket, taken: Mapping[str, Any], latents: Tensor) -> None:
        """Write the file of one item, whole or not at all.

        Args:
            item: which.
            bucket: its size.
            taken: of `told`.
            latents: as a VAE gives them: latents or parameters, whichever are stored.

        Raises:
            InputError: there are values that are not finite.
            OSError: the disk is full, or can't be written.
        """
        place = self.place(item, bucket)
        latents = latents.to(getattr(torch, self.dtype))
        latents_file.check_values(Path(item.key), latents)
        about = {"key": item.key, "caption": item.caption, "source": item.path, "fps": str(taken["fps"])}
        about["done"] = json.dumps(taken["done"])
        if self.format == "musubi":
            content = self._musubi(bucket, latents, about)
        else:
            info = LatentsInfo(
                model=self.model, model_class=self.model_class, scaling=self.scaling, fps=Fraction(taken["fps"]),
                times=tuple(taken["times"]), frames=bucket.frames, height=bucket.height, width=bucket.width,
                padded_frames=bucket.frames, padded_height=bucket.height, padded_width=bucket.width,
            ).to_metadata()  # fmt: skip
            content = content_of({PARAMETERS if self.store == "parameters" else KEY: latents}, info | about)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic(place) as draft:
                draft.write_bytes(content)
        except InputError as error:  # A disk is no fault of the item.
            raise OSError(str(error)) from error

    def _musubi(self, bucket: Bucket, latents: Tensor, about: Mapping[str, str]) -> bytes:
        _, name, scaled = MUSUBI[self.model_class]
        if scaled:
            latents = scale(latents, self.scaling)
        frames, height, width = latents.shape[-3:]
        metadata = {
            "architecture": name, "width": str(bucket.width), "height": str(bucket.height), "format_version": "1.0.1",
            **({"frame_count": str(bucket.frames)} if bucket.frames > 1 else {}),
        }  # fmt: skip
        return content_of({f"latents_{frames}x{height}x{width}_{self.dtype}": latents[0]}, {**metadata, **about})


def told(taken: Taken) -> dict[str, Any]:
    """What of a clip goes into its file besides its latents, for JSON."""
    return {"fps": str(taken.fps), "times": list(taken.times), "done": taken.done}


def scale(latents: Tensor, scaling: Mapping[str, Any], *, undo: bool = False) -> Tensor:
    """Latents as a pipeline gives them to its transformer, by what the VAE's config says; or back again."""
    mean, std = scaling.get("latents_mean"), scaling.get("latents_std")
    factor = float(scaling.get("scaling_factor") or 1.0)
    shape = 1, -1, *(1,) * (latents.ndim - 2)
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    if mean is not None and std is not None:
        shift, spread = (torch.tensor(values, dtype=wide.dtype).view(shape) for values in (mean, std))
    else:
        shift, spread = torch.tensor(float(scaling.get("shift_factor") or 0.0), dtype=wide.dtype), 1.0
    wide = wide * spread / factor + shift if undo else (wide - shift) * factor / spread
    return wide.to(latents.dtype)


def sample_name(key: str) -> str:
    """An item's name in a WebDataset, where a dot would end it."""
    return re.sub(r"[.]", "_", key)


def parsed(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return from_bytes(content), json.loads(content[8 : 8 + length]).get("__metadata__", {})


def parsed_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def check_format(format_: str, store: str, model_class: str) -> None:
    """
    Raises:
        InputError: the format does not go with what is to be stored.
    """
    if format_ == "musubi" and store != "mode":
        raise InputError("--format musubi holds latents only: leave --store out")
    if format_ == "musubi" and model_class not in MUSUBI:
        raise InputError(f"--format musubi is for {', '.join(MUSUBI)}, and this is {model_class}: use safetensors")


def check_names(layout: Storage, items: Sequence[tuple[Item, Bucket]]) -> None:
    """
    Raises:
        InputError: two items would be written to one place.
    """
    places: dict[str, str] = {}
    for item, bucket in items:
        name = sample_name(item.key) if layout.format == "webdataset" else str(layout.place(item, bucket))
        other = places.setdefault(name, item.key)
        if other != item.key:
            raise InputError(f"{other} and {item.key} have one name in --format {layout.format}: rename one of them")
