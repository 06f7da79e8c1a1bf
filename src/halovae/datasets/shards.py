"""Files of several items: packed from the items' own files, and read back one by one."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from halovae.base.errors import InputError
from halovae.base.files import atomic
from halovae.datasets.buckets import Bucket
from halovae.datasets.formats import PACKED, PARTS, Storage, parsed, sample_name
from halovae.datasets.items import Item
from halovae.media import latents_file
from halovae.media.latents_file import content_of

_KEY = "HALOVAE.key"
"""Of a member's header in a .tar file."""


class Shards:
    """Which items are still to come into each shard. As soon as there are none, it is packed.

    Args:
        layout: of a packed format; of another one there are no shards.
        size: items of a shard, those that fail counted too.
        items: all of the dataset, in order.
        clips: those that have a bucket.
        there: keys of those that are finished.
        packed: numbers of the shards that are there.
        pack: what to do with a shard that nothing more will come into: its number, and its items.
    """

    def __init__(
        self, layout: Storage, size: int, items: Sequence[Item], clips: Sequence[tuple[Item, Bucket]],
        there: set[str], packed: set[int], pack: Callable[[int, Sequence[tuple[Item, Bucket]]], None],
    ) -> None:  # fmt: skip
        self._pack = pack
        self._left: dict[int, set[str]] = {}
        self._clips: dict[int, list[tuple[Item, Bucket]]] = {}
        if layout.format not in PACKED:
            return
        self._number = {item.key: number // size for number, item in enumerate(items)}
        for item, bucket in clips:
            number = self._number[item.key]
            self._clips.setdefault(number, []).append((item, bucket))
            self._left.setdefault(number, set()).update({item.key} - there)
        has_parts = (layout.root / PARTS).exists()
        for number, left in self._left.items():
            if not left and (has_parts or number not in packed):
                self._pack(number, self._clips[number])

    def note(self, keys: Iterable[str]) -> None:
        """Items that nothing more will come of."""
        for key in keys if self._left else ():
            number = self._number[key]
            self._left[number].discard(key)
            if not self._left[number]:
                self._pack(number, self._clips[number])


def pack(layout: Storage, number: int, items: Sequence[tuple[Item, Bucket]]) -> None:
    """Put the parts of a shard that are there into it, behind nothing that it had: whole or not at all.

    Raises:
        OSError: the disk is full, or can't be written.
    """
    shard = layout.shard(number)
    contents = dict(_read_shard(shard)) if shard.exists() else {}
    places = [(item.key, layout.place(item, bucket)) for item, bucket in items]
    contents |= {key: place.read_bytes() for key, place in places if place.exists()}
    ordered = [(key, contents[key]) for key, _ in places if key in contents]
    if ordered:
        try:
            with atomic(shard) as draft:
                (_write_tar if layout.format == "webdataset" else _write_parquet)(draft, ordered)
        except InputError as error:
            raise OSError(str(error)) from error
    for _, place in places:
        with suppress(FileNotFoundError):
            place.unlink()


def keys_in(shard: Path) -> list[str]:
    """The items of a shard."""
    if shard.suffix == PACKED["parquet"]:
        from pyarrow import parquet

        return parquet.read_table(shard, columns=["key"])["key"].to_pylist()
    return [key for key, _ in _members(shard)]


def _members(shard: Path) -> list[tuple[str, tuple[int, int]]]:
    """Key, begin and length of each item in a .tar file."""
    found: list[tuple[str, tuple[int, int]]] = []
    with tarfile.open(shard, "r:") as file:
        for member in file:
            if member.name.endswith(latents_file.SUFFIX):
                found.append((member.pax_headers[_KEY], (member.offset_data, member.size)))
    return found


def _read_shard(shard: Path) -> Iterator[tuple[str, bytes]]:
    for key, place in places_in(shard):
        yield key, read_place(shard, place)


def places_in(shard: Path) -> list[tuple[str, Any]]:
    """The items of a shard, and where each is in it."""
    if shard.suffix == PACKED["parquet"]:
        return [(key, number) for number, key in enumerate(keys_in(shard))]
    return _members(shard)


def read_place(shard: Path, place: Any) -> bytes:
    """The content of the file that an item of a shard was."""
    if shard.suffix == PACKED["parquet"]:
        from pyarrow import parquet

        with parquet.ParquetFile(shard) as file:
            row = file.read_row_group(place).to_pylist()[0]
        latents = torch.frombuffer(bytearray(row["latents"]), dtype=getattr(torch, row["dtype"])).view(row["shape"])
        return content_of({row["tensor"]: latents}, json.loads(row["metadata"]))
    begin, size = place
    with shard.open("rb") as file:
        file.seek(begin)
        return file.read(size)


def _write_tar(draft: Path, items: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as file:
        for key, content in items:
            _, metadata = parsed(content)
            parts = {
                "safetensors": content,
                "txt": metadata.get("caption", "").encode(),
                "json": json.dumps(metadata, sort_keys=True).encode(),
            }
            for kind, part in parts.items():
                member = tarfile.TarInfo(f"{sample_name(key)}.{kind}")
                member.size, member.pax_headers = len(part), {_KEY: key}
                file.addfile(member, io.BytesIO(part))


def _write_parquet(draft: Path, items: Sequence[tuple[str, bytes]]) -> None:
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, list[Any]] = {}
    for key, content in items:
        tensors, metadata = parsed(content)
        ((name, latents),) = tensors.items()
        row = {
            "key": key, "tensor": name, "latents": latents.reshape(-1).view(torch.uint8).numpy().tobytes(),
            "shape": list(latents.shape), "dtype": str(latents.dtype).removeprefix("torch."),
            "caption": metadata.get("caption", ""), "metadata": json.dumps(metadata),
        }  # fmt: skip
        for column, value in row.items():
            columns.setdefault(column, []).append(value)
    # A row group for each: a trainer reads items in any order.
    parquet.write_table(pyarrow.table(columns), draft, row_group_size=1)
