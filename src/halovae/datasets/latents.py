"""What `halovae encode-dataset` has written, for trainers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from halovae.base.errors import InputError
from halovae.base.files import first_line, read_json
from halovae.datasets.formats import (
    LATENTS,
    MUSUBI,
    PACKED,
    metadata_of,
    parsed,
    parsed_file,
    scale,
)
from halovae.datasets.shards import places_in, read_place
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
        self._places = sorted(self._found(), key=lambda found: found[0])
        self.keys = {key: number for number, (key, _, _) in enumerate(self._places)}
        """Number of each item, by its key."""

    def _found(self) -> Iterator[tuple[str, Path, Any]]:
        """Key, file and place in it of each item."""
        if self._format in PACKED:
            for shard in self.folder.glob(f"{LATENTS}-*{PACKED[self._format]}"):
                for key, place in places_in(shard):
                    yield key, shard, place
            return
        root = self.folder / LATENTS
        for path in self.folder.glob(f"*{SUFFIX}") if self._format == "musubi" else root.rglob(f"*{SUFFIX}"):
            if path.name.startswith("."):  # Still being written.
                continue
            if self._format == "musubi":
                yield metadata_of(path).get("key", path.stem), path, None
            else:
                yield path.relative_to(root).as_posix().removesuffix(SUFFIX), path, None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        stored, latents, metadata = self.read(index, scaled=self._scaled)
        key, _, _ = self._places[index]
        found = Sample(key=key, latents=_alone(latents), caption=metadata.get("caption", ""))
        if stored is not latents and self.manifest["store"] == PARAMETERS:
            found["parameters"] = _alone(stored)
        if "fps" in metadata:
            found["fps"], found["done"] = metadata["fps"], json.loads(metadata["done"])
        return found

    def read(self, index: int, *, scaled: bool = False) -> tuple[Tensor, Tensor, dict[str, str]]:
        """What is stored, the latents with the batch that the VAE gave, and the metadata of an item.

        Raises:
            InputError: its file is damaged.
        """
        _, path, place = self._places[index]
        try:
            tensors, metadata = parsed_file(path) if place is None else parsed(read_place(path, place))
            (stored,) = tensors.values()
        except Exception as error:  # Of safetensors, tarfile and pyarrow.
            raise InputError(f"{path} holds no latents that can be read: {first_line(error)}") from error
        stored = stored.unsqueeze(0) if self._format == "musubi" else stored
        latents = stored.chunk(2, dim=1)[0] if self.manifest["store"] == PARAMETERS else stored
        if scaled != self._is_scaled:
            latents = scale(latents, self.manifest["scaling"], undo=self._is_scaled)
        return stored, latents, metadata


def _alone(latents: Tensor) -> Tensor:
    """Without the batch of one. A VAE of images has the frames of a clip as its batch: they follow the channels."""
    if latents.shape[0] == 1:
        return latents[0]
    return latents.transpose(0, 1)
