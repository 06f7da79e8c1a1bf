"""Numbers for people: aligned columns that need no colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halovae.app.session import Half, Loaded, Session
from halovae.base import verdicts
from halovae.base.errors import counted
from halovae.media.vae_limits import Fit

Row = tuple[str, ...]


def table(rows: Sequence[Row]) -> str:
    """Rows of words as columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(word.rjust(width) if column else word.ljust(width) for column, (word, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def peak_of(found: dict[str, Any]) -> int | None:
    """Bytes, the most that any half took on any rank, from a run's document; None where the system can't tell."""
    return max((half["peak_memory"] or 0 for rank in found["per_rank"] for half in rank.values()), default=0) or None


def columns(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is to be said of them."""
    return "\n".join(f"{name:<12}{words}" for name, words in rows)


def described(session: Session, loaded: Loaded, half: Half) -> str:
    """One line on what ran where."""
    ranks = session.group.size
    cut = ", " * bool(half.cut(ranks)) + half.cut(ranks)
    chosen = f"\nauto: {half.choice}" if half.choice else ""
    model = f"{loaded.source.model} ({loaded.source.class_name}), {session.dtype_words}"
    return f"{model}, {place_of(session)}{cut}{chosen}"


def place_of(session: Session) -> str:
    """How many ranks, and on what."""
    ranks, each = session.group.size, " each" * (session.group.size > 1)
    threads = f", {counted(session.threads, 'thread')}{each}" if session.device.type == "cpu" else ""
    return f"{counted(ranks, 'rank')} on {session.device.type}{threads}"


def clip_line(fit: Fit, fps: Any) -> str:
    return f"{counted(fit.frames, 'frame')} of {fit.width}x{fit.height}, {float(fps):.4g} per second"


def document(session: Session, loaded: Loaded, fit: Fit, halves: dict[str, Half]) -> dict[str, Any]:
    """What every report holds. Called on every rank: each tells what it did."""
    ranks = session.group.all_gather_object({name: half.to_dict() for name, half in halves.items()})
    return {
        "model": loaded.source.model,
        "model_class": loaded.source.class_name,
        "ranks": session.group.size,
        "device": session.device.type,
        "dtype": session.dtype_words,
        "threads_per_rank": session.threads,
        "sizes": {name: getattr(fit, name) for name in Fit.__dataclass_fields__},
        "seconds": dict(session.seconds),
        "per_rank": ranks,
    }


def seconds_table(halves: dict[str, Half]) -> str:
    """Of each half; also what this rank sent, of which there is nothing to say in a world of one."""
    lines: list[str] = []
    for name, half in halves.items():
        sent = f"{half.messages} messages, {half.bytes / 2**20:.1f} MiB sent, {half.wait_seconds:.2f} s in exchanges"
        lines.append(f"{name:<8}{half.seconds:>8.2f} s  {sent if half.messages else ''}".rstrip() + "\n")
    return "".join(lines)


def kept_verdicts() -> str:
    """What trials have left on this machine's disk, and where, in words."""
    folder, (count, size) = verdicts.folder(), verdicts.usage()
    if folder is None:
        return f"off: {verdicts.SWITCH} says so, or this user has no home"
    return f"{counted(count, 'answer')}, {size / 1024:.1f} KiB in {folder}"
