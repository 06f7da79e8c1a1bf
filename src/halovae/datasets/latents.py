"""What `halovae encode-dataset` has written, for trainers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from halovae.base.errors import InputError
from halovae.base.files import read_json
from halovae.datasets.formats import (
    LATENTS,
    MUSUBI,
    PACKED,
    parsed,
    parsed_file,
    places_in,
    read_error,
    read_place,
    scale,
)
from halovae.media.latents_file import PARAMETERS, SUFFIX

MANIFEST = "manifest.json"


class Sample(TypedDict, total=False):
    """One item of `Latents`."""

    key: str
    """Of the item: its path in the folder or the manifest."""
    latents: Tensor
    """(channels, frames, height, width), or (channels, height, width) of an image."""
    parameters: Tensor
    """Where these were stored: mean and logarithm of the variance, one behind the other along the channels."""
    caption: str
    fps: str
    done: dict[str, Any]
    """What was done to the clip: the size of its source, the crop in its pixels, and the numbers of its frames."""


class Latents(Dataset[Sample]):
    """The latents of a folder that `halovae encode-dataset` has written, of any format, also while it is at work.

    Args:
        folder: what `-o` was.
        scaled: give latents as pipelines give them to a transformer: shifted and scaled by the VAE's config. Else they
            are the VAE's own.

    Raises:
        InputError: the folder has no manifest.

    Examples:
        >>> dataset = halovae.datasets.Latents("latents", scaled=True)
        >>> dataset[0]["latents"].shape
    """

    def __init__(self, folder: Path | str, *, scaled: bool = False) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise InputError(f"{folder} has no {MANIFEST}: give a folder that halovae encode-dataset has written")
        self.manifest = read_json(self.folder / MANIFEST)
        self._format: str = self.manifest["format"]
        self._scaled = scaled
        # How the numbers are on disk.
        self._is_scaled = self._format == "musubi" and MUSUBI[self.manifest["model_class"]][2]
        self._places: list[tuple[Path, Any]] = sorted(self._found(), key=lambda place: str(place[0]))

    def _found(self) -> Iterator[tuple[Path, Any]]:
        if self._format in PACKED:
            for shard in sorted(self.folder.glob(f"{LATENTS}-*{PACKED[self._format]}")):
                for _, place in places_in(shard):
                    yield shard, place
            return
        files = self.folder.glob(f"*{SUFFIX}") if self._format == "musubi" else (self.folder / LATENTS).rglob(f"*{SUFFIX}")
        for path in files:
            if not path.name.startswith("."):
                yield path, None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        path, place = self._places[index]
        try:
            tensors, metadata = parsed_file(path) if place is None else parsed(read_place(path, place))
            ((name, stored),) = tensors.items()
        except Exception as error:  # Of safetensors, tarfile and pyarrow.
            raise read_error(path, error) from error
        stored = stored.unsqueeze(0) if self._format == "musubi" else stored
        latents = stored.chunk(2, dim=1)[0] if name == PARAMETERS else stored
        if self._scaled != self._is_scaled:
            latents = scale(latents, self.manifest["scaling"], undo=self._is_scaled)
        found = Sample(key=metadata.get("key", path.stem), latents=_alone(latents), caption=metadata.get("caption", ""))
        if name == PARAMETERS:
            found["parameters"] = _alone(stored)
        if "fps" in metadata:
            found["fps"], found["done"] = metadata["fps"], json.loads(metadata["done"])
        return found


def _alone(latents: Tensor) -> Tensor:
    """Without the batch of one. A VAE of images has the frames of a clip as its batch: they follow the channels."""
    if latents.shape[0] == 1:
        return latents[0]
    return latents.transpose(0, 1)
