"""The folder that a dataset is encoded into: what made it, who writes to it, and what is finished in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download

from halovae import __version__
from halovae.base.errors import InputError
from halovae.base.files import atomic, read_json, reason, write_json
from halovae.datasets.buckets import Bucket
from halovae.datasets.formats import BEGUN, LATENTS, PACKED, PARTS, Storage
from halovae.datasets.items import Item
from halovae.datasets.latents import MANIFEST
from halovae.datasets.shards import keys_in
from halovae.media.models import VaeSource

FAILED = "failed.jsonl"
_SEEN = "survey.jsonl"
_LOCK = ".lock"
_WEIGHTS = ("*.safetensors", "*.bin", "config.json")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An item that was set aside."""

    key: str
    path: str
    why: str

    @property
    def words(self) -> str:
        return self.why if self.path in self.why else f"{self.path}: {self.why}"


def fingerprint(source: VaeSource, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the bytes of the results depend on besides the clips: model, code and settings."""
    code = {"halovae": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
    return {"model": source.model, "model_class": source.class_name, "weights": _weights(source), **code, **settings}


def _weights(source: VaeSource) -> str:
    """Names a VAE's weights: by their bytes in a folder, by the commit on the hub."""
    folder = Path(source.location)
    if not folder.is_dir():
        name = "config.json" if source.subfolder is None else f"{source.subfolder}/config.json"
        parts = Path(hf_hub_download(source.location, name)).parts
        return parts[parts.index("snapshots") + 1]
    folder = folder / (source.subfolder or "")
    found = hashlib.sha256()
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        found.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(2**24):
                found.update(part)
    return found.hexdigest()[:32]


class Folder:
    """The output of a run.

    Args:
        layout: of the items in it.
        made_by: as `fingerprint` tells it.
    """

    def __init__(self, layout: Storage, made_by: Mapping[str, Any]) -> None:
        self.layout, self.root = layout, layout.root
        self._made_by = dict(made_by)
        self.faults: dict[str, Fault] = {}

    def check(self) -> None:
        """Refuse a folder that was made in another way, before any work is done for it.

        Raises:
            InputError: another fingerprint, other files, or no place for a folder.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"output {self.root} is a file: give a folder")
        if not self.root.parent.is_dir():
            raise InputError(f"output folder {self.root.parent} does not exist: create it first")
        path = self.root / MANIFEST
        if not path.exists():
            others = [each for each in self.root.iterdir() if each.name != _LOCK] if self.root.exists() else []
            if others:
                raise InputError(f"output {self.root} holds other files, such as {others[0].name}: give a new folder")
            return
        before = read_json(path).get("fingerprint", {})
        differing = [name for name in self._made_by if before.get(name) != self._made_by[name]]
        if differing:
            pairs = "; ".join(
                f"{name} {_short(before.get(name))}, now {_short(self._made_by[name])}" for name in differing
            )
            raise InputError(f"output {self.root} was made in another way ({pairs}): give a new folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it, no other run on this machine writes to the folder; what an earlier one has left half done is gone.

        Raises:
            InputError: another run does, or the folder can't be written.
        """
        try:
            self.root.mkdir(exist_ok=True)
            lock = (self.root / _LOCK).open("w")
        except OSError as error:
            raise InputError(f"can't write to {self.root}: {reason(error)}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another run is writing to {self.root}: wait for its end") from None
            for draft in self.root.rglob(".*.part.*"):
                with suppress(OSError):
                    draft.unlink()
            self.tell({})
            self.note_faults({})
            (self.root / BEGUN).mkdir(exist_ok=True)
            try:
                yield
            finally:  # After a kill they stay, and count in the next run: it may have been an item that ended all.
                shutil.rmtree(self.root / BEGUN, ignore_errors=True)

    @contextmanager
    def marks(self) -> Iterator[Path]:
        """A folder for `workers.begun` of a run that writes nothing.

        Raises:
            InputError: it can't be made.
        """
        beside = self.root if self.root.is_dir() else self.root.parent
        try:
            folder = TemporaryDirectory(prefix=BEGUN, dir=beside)
        except OSError as error:
            raise InputError(f"can't write to {beside}: {reason(error)}") from error
        with folder:
            yield Path(folder.name)

    def document(self) -> dict[str, Any]:
        """What the manifest says besides the counts."""
        layout = self.layout
        return {
            "format": layout.format, "store": layout.store, "dtype": layout.dtype, "model": layout.model,
            "model_class": layout.model_class, "scaling": dict(layout.scaling), "fingerprint": self._made_by,
        }  # fmt: skip

    def tell(self, counts: Mapping[str, Any]) -> None:
        """Write the manifest."""
        write_json(self.root / MANIFEST, {**self.document(), "counts": dict(counts)})

    def note_faults(self, faults: Mapping[str, Fault]) -> None:
        """Add to the items that were set aside in this run."""
        self.faults |= faults
        with atomic(self.root / FAILED) as draft:
            draft.write_text("".join(f"{json.dumps(vars(one))}\n" for one in self.faults.values()), encoding="utf-8")

    def finished(self, clips: Sequence[tuple[Item, Bucket]]) -> set[str]:
        """Keys of the items that need not be encoded."""
        found: set[str] = set()
        if self.layout.format in PACKED:
            for shard in self.root.glob(f"{LATENTS}-*{PACKED[self.layout.format]}"):
                found |= set(keys_in(shard))
        return found | {item.key for item, bucket in clips if self.layout.place(item, bucket).exists()}

    def packed(self) -> set[int]:
        """Numbers of the shards that are there."""
        names = self.root.glob(f"{LATENTS}-*{PACKED.get(self.layout.format, '.none')}")
        return {int(name.stem.rpartition("-")[2]) for name in names}

    def tidy(self) -> None:
        """Remove what is of no use to who reads the results."""
        parts = self.root / PARTS
        for folder in [*sorted(parts.rglob("*"), reverse=True), parts]:
            with suppress(OSError):
                folder.rmdir()

    def read_seen(self) -> dict[str, dict[str, Any]]:
        """What an earlier run has found out of the clips."""
        try:
            rows = [json.loads(line) for line in (self.root / _SEEN).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            return {}
        return {row["mark"]: row for row in rows}

    def write_seen(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with atomic(self.root / _SEEN) as draft:
            draft.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:32]}..."
