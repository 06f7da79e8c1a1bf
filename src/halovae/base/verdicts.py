"""Verdicts of trials that hold in other processes too, kept on disk: what was found out once is not asked again.

Each is a small file of its own, named by a digest of everything that it depends on, so that a change of anything is
another name. Files appear whole or not at all; one that can't be read counts as none. Nothing here fails: where nothing
can be kept, trials are made in each process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SWITCH = "HALOVAE_CACHE"
"""Environment variable: with "off" nothing is read or kept."""

_MOST = 4096
"""Files at the most, of a few hundred bytes each; beyond that those that were not asked for longest go."""
_LEFT_BEHIND = 3600
"""Seconds after which a file that is still being written is of a process that has ended."""


def folder() -> Path | None:
    """Where verdicts are kept; None: nowhere."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "halovae" / "answers"
    except RuntimeError:  # Nobody's process, which has no home.
        return None


def name_of(device: torch.device, *words: object) -> str | None:
    """The name of a verdict: of the question in words that are the same in every process, and of where it is asked."""
    return None if folder() is None else digest(device, *words)


def digest(device: torch.device, *words: object) -> str:
    """Of words, and of what is run and where, in hexadecimal digits."""
    return hashlib.sha256("\n".join([*_program(), *_place(device), *map(str, words)]).encode()).hexdigest()


def read(name: str | None) -> Any:
    """The verdict of that name, or None."""
    path = _path(name)
    if path is None:
        return None
    try:
        document = json.loads(path.read_bytes())
        answer = document["answer"] if document["name"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):
        os.utime(path)  # Asked for now.
    return answer


def write(name: str | None, answer: Any) -> None:
    """Keep a verdict: numbers, words, lists and dicts of these."""
    path = _path(name)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make_room(path.parent)
        number, draft = tempfile.mkstemp(".part", dir=path.parent)
        try:
            with os.fdopen(number, "w") as file:
                json.dump({"name": name, "answer": answer}, file)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise


def usage() -> tuple[int, int]:
    """How many verdicts are kept, and the bytes that they take."""
    sizes: list[int] = []
    for entry in _entries(folder()):
        with suppress(FileNotFoundError):
            sizes.append(entry.stat().st_size)
    return len(sizes), sum(sizes)


def clear() -> None:
    """Forget all verdicts.

    Raises:
        OSError: a file can't be removed.
    """
    for entry in _entries(folder()):
        Path(entry.path).unlink(missing_ok=True)


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _path(name: str | None) -> Path | None:
    place = folder()
    return None if place is None or name is None else place / f"{name}.json"


def _entries(place: Path | None) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError):
        yield from os.scandir(place) if place is not None else ()


def _make_room(place: Path) -> None:
    drafts, whole = list[os.DirEntry[str]](), list[os.DirEntry[str]]()
    for entry in _entries(place):
        (drafts if entry.name.endswith(".part") else whole).append(entry)
    with suppress(FileNotFoundError):  # Another process makes room, too.
        gone = [entry for entry in drafts if entry.stat().st_mtime < time.time() - _LEFT_BEHIND]
        if len(whole) >= _MOST:
            # A good part at once, so that not each new one looks through all.
            gone += sorted(whole, key=lambda entry: entry.stat().st_mtime)[: _MOST // 4]
        for entry in gone:
            os.unlink(entry.path)


@functools.cache
def _program() -> tuple[str, ...]:
    """What is run: halovae's own code by its content, since it may be a checkout at work, and versions."""
    source = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        code.update(f"{path.relative_to(source)}\n".encode() + path.read_bytes())
    versions: list[str] = []
    for package in ("diffusers", "triton"):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return code.hexdigest(), platform.python_version(), torch.__config__.show(), torch.__version__, *versions


def _place(device: torch.device) -> tuple[str, ...]:
    """Where it runs, and what torch is set to that chooses other kernels."""
    accelerator = ""
    if device.type not in ("cpu", "meta"):
        accelerator = str(torch.get_device_module(device).get_device_name(device))
    switches = torch.get_float32_matmul_precision(), torch.get_default_dtype(), torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled
    return device.type, accelerator, _processor_once(), platform.system(), str((*switches, *strict))


_processor_once = functools.cache(processor)
