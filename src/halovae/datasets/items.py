"""The clips of a dataset: files of a folder or a pattern, rows of a manifest, or samples in WebDataset shards."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from halovae.base.errors import InputError
from halovae.base.files import first_line, reason
from halovae.media import FrameRange

IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif"))
VIDEOS = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".y4m"))
SHARDS = frozenset((".tar",))
_MANIFESTS = (".jsonl", ".csv", ".parquet")
_PATHS, _CAPTIONS = ("path", "video_path", "image_path", "file_name"), ("caption", "text")
"""Names that a manifest's columns may have; the first that is there counts."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One clip or image."""

    key: str
    """Its name in the dataset, and of what is made of it: a path with "/" that never leaves its folder."""
    path: str
    """The file, or the shard that it is in."""
    caption: str = ""
    frames: str = ""
    """Which of its frames, as "A:B"; all where it is empty."""
    member: tuple[int, int] | None = None
    """In a shard: where it begins, and its bytes."""

    @property
    def range(self) -> FrameRange:
        return FrameRange.parse(self.frames) if self.frames else FrameRange()

    @property
    def state(self) -> str:
        """Changes when its file does."""
        try:
            stat = Path(self.path).stat()
            file = [stat.st_size, stat.st_mtime_ns]
        except OSError:
            file = []
        return json.dumps([self.path, self.member, self.frames, *file])

    @contextmanager
    def file(self) -> Iterator[Path]:
        """The clip as a file of its own."""
        if self.member is None:
            yield Path(self.path)
            return
        begin, size = self.member
        with tempfile.NamedTemporaryFile(suffix=PurePosixPath(self.key).suffix) as copy:
            with open(self.path, "rb") as shard:
                shard.seek(begin)
                copy.write(shard.read(size))
            copy.flush()
            yield Path(copy.name)


def find_items(source: str) -> list[Item]:
    """What a dataset consists of, in an order that depends on names only.

    Args:
        source: a folder, which is searched with all that is in it; a pattern such as "clips/*.mp4"; a manifest, a
            .jsonl, .csv or .parquet file with a row for each clip; or a .tar file. Folders and patterns may hold .tar
            files, too: the shards of a WebDataset.

    Raises:
        InputError: nothing is there, a manifest can't be read, or two clips have one name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _of_files(path, (p for p in path.rglob("*") if not _is_hidden(p.relative_to(path))))
    elif path.is_file():
        rows = _ROWS.get(path.suffix.lower())
        found = _of_rows(path, rows(path)) if rows else _of_files(path.parent, [path])
    elif glob.has_magic(source):
        names = [Path(name) for name in glob.glob(str(path), recursive=True)]
        found = _of_files(_common(names), names) if names else []
    else:
        raise InputError(f"{source} does not exist: give a folder, a pattern, or a {', '.join(_MANIFESTS)} file")
    if not found:
        raise InputError(f"{source} holds no clips: videos, images, or .tar files of a WebDataset")
    found.sort(key=lambda item: item.key)
    for one, other in zip(found[:-1], found[1:], strict=True):
        if one.key == other.key:
            raise InputError(f"{source} has {one.key} twice: give each clip, or each range of its frames, once")
    return found


def digest(items: Sequence[Item]) -> str:
    """Names a list of items by their keys."""
    return hashlib.sha256("\n".join(item.key for item in items).encode()).hexdigest()[:32]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _common(paths: list[Path]) -> Path:
    return Path(os.path.commonpath([path.parent.absolute() for path in paths]))


def _of_files(root: Path, paths: Any) -> list[Item]:
    found: list[Item] = []
    root = root.absolute()
    for path in sorted(Path(p).absolute() for p in paths):
        suffix = path.suffix.lower()
        if suffix in SHARDS:
            found += _of_shard(root, path)
        elif suffix in IMAGES | VIDEOS and path.is_file():
            beside = path.with_suffix(".txt")
            caption = _text(beside) if beside.is_file() else ""
            found.append(Item(key=path.relative_to(root).as_posix(), path=str(path), caption=caption))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"can't read the caption {path}: {first_line(error)}") from error


def _of_shard(root: Path, path: Path) -> list[Item]:
    """Members of one name up to its first dot belong to one sample."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, name = os.path.split(member.name)
                stem, _, kind = name.partition(".")
                if member.isfile() and kind:
                    samples.setdefault(os.path.join(folder, stem), {})[kind.lower()] = member.offset_data, member.size
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} is no whole .tar file: {first_line(error)}") from error
    found: list[Item] = []
    with path.open("rb") as file:

        def text(place: tuple[int, int] | None) -> str:
            if place is None:
                return ""
            file.seek(place[0])
            return file.read(place[1]).decode("utf-8", "replace").strip()

        prefix = path.relative_to(root).with_suffix("").as_posix()
        for name, parts in samples.items():
            caption = text(parts.get("txt")) or _caption_in(text(parts.get("json")))
            for kind, place in parts.items():
                if f".{kind.rpartition('.')[2]}" in IMAGES | VIDEOS:
                    key = _inside(f"{prefix}/{name}.{kind}")
                    found.append(Item(key=key, path=str(path), caption=caption, member=place))
    return found


def _caption_in(text: str) -> str:
    try:
        row = json.loads(text) if text else {}
    except ValueError:
        return ""
    return _first(row, _CAPTIONS) if isinstance(row, dict) else ""


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


def _inside(key: str) -> str:
    """A name that stays in the folder that it is put into."""
    parts = [part for part in PurePosixPath(os.path.normpath(key)).parts if part not in ("/", "..", ".")]
    return "/".join(part.lstrip(".") or "_" for part in parts)


def _of_rows(manifest: Path, rows: list[dict[str, Any]]) -> list[Item]:
    root, found = manifest.parent.absolute(), list[Item]()
    for number, row in enumerate(rows, 1):
        where = f"{manifest}, row {number}"
        name = _first(row, _PATHS)
        if not name:
            raise InputError(f"{where} names no file: it needs a column {' or '.join(_PATHS)}")
        path = Path(os.path.normpath(root / Path(name).expanduser()))
        frames = row.get("frames")
        if isinstance(frames, (list, tuple)):
            frames = ":".join(map(str, frames))
        item = Item(
            key=_inside(str(path.relative_to(root) if path.is_relative_to(root) else path)), path=str(path),
            caption=_first(row, _CAPTIONS), frames=str(frames or ""),
        )  # fmt: skip
        try:
            wanted = item.range
        except InputError as error:
            raise InputError(f"{where}: {str(error).replace('--frames', 'frames')}") from None
        if item.frames:  # Several ranges of one clip are several items.
            stem, suffix = os.path.splitext(item.key)
            key = f"{stem}_{wanted.start}-{'end' if wanted.stop is None else wanted.stop}{suffix}"
            item = replace(item, key=key)
        found.append(item)
    return found


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number} is no JSON: {first_line(error)}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is no JSON object")
            rows.append(row)
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"can't read {path}: {first_line(error)}") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except OSError as error:
        raise InputError(f"can't read {path}: {reason(error)}") from error
    except ArrowException as error:
        raise InputError(f"can't read {path}: {first_line(error)}") from error


_ROWS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows,
}  # fmt: skip
