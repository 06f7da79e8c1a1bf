"""Files appear whole or not at all: written beside their place, then renamed.

What is still being written is known by name, so that a process that has no time to unwind can remove it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from halovae.base.errors import InputError

DEMO = "demo"
"""The name of the shipped VAE in `--model` and in metadata."""
_OF_A_VAE = ("model_index.json", "config.json", "vae/config.json")
_partial: set[Path] = set()
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` at the end, removed after any exception.

    The temporary name keeps the suffix, because writers choose the format by it.

    Raises:
        InputError: the folder can't be written, or the disk is full.
    """
    draft = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    _partial.add(draft)
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        raise InputError(f"can't write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            draft.unlink()
        _partial.discard(draft)


def remove_partial() -> None:
    """Remove every file that `atomic` is still writing. For a process about to exit without unwinding."""
    for draft in tuple(_partial):
        with suppress(OSError):
            draft.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: it can't be read, or holds no object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"can't read {path}: {first_line(error)}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object")
    return cast("dict[str, Any]", document)


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse an output path before any work is done for it.

    Args:
        suffixes: what its name may end with, in lower case.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(f"output {path}: the name must end with {' or '.join(suffixes)}")
    if path.is_dir():
        raise InputError(f"output {path} is a folder: give the name of a file in it")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        if path.parent.exists():
            raise InputError(f"output folder {path.parent} is a file: give another folder")
        raise InputError(f"output folder {path.parent} does not exist: create it first")
    try:
        # Creating a file is the only test that network mounts, quotas and read-only systems all answer truly.
        tempfile.TemporaryFile(dir=path.parent, prefix=".halovae-").close()
    except OSError as error:
        raise InputError(f"can't write to folder {path.parent}: {reason(error)}") from error


def check_new_folder(folder: Path) -> None:
    """Refuse a place for a new folder before any work is done for it."""
    if folder.exists():
        raise InputError(f"{folder} is there already: give the name of a new folder")
    _check_parent(folder)


def check_input(path: Path) -> None:
    """Refuse what is no readable, non-empty file."""
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder: give a file")
        with path.open("rb") as file:
            if not file.read(1):
                raise InputError(f"{path} is empty")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"can't read {path}: {reason(error)}") from error


def check_model(model: str) -> None:
    """Refuse what can't be a model, before any library is imported for it."""
    path = Path(model).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"--model {model} is a file: give the folder of a diffusers VAE or pipeline")
    if not path.exists() and not _HUB_ID.fullmatch(model):
        raise InputError(f"--model {model}: no such folder, and no hub id of the form owner/name")


def check_vae(model: str) -> None:
    """As `check_model`; and refuse a folder in which is no VAE."""
    check_model(model)
    folder = Path(model).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in _OF_A_VAE):
        raise no_vae(model)


def no_vae(model: str) -> InputError:
    """What a model is refused by that has none of the files that describe a VAE."""
    return InputError(f"{model} has no VAE: neither {' nor '.join(_OF_A_VAE)} is there")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a report. NaN and infinity must have been replaced: JSON has neither.

    Raises:
        InputError: the folder can't be written, or the disk is full.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def reason(error: OSError) -> str:
    """The operating system's words for an error, without number and path."""
    return os.strerror(error.errno).lower() if error.errno and error.errno > 0 else first_line(error)


def first_line(error: BaseException) -> str:
    """An exception's message cut to one line, for a foreign error inside one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
