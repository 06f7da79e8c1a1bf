"""Numbers as people read them."""

from __future__ import annotations

import math

from halovae.evaluation import ClipComparison, Gate
from halovae.evaluation.scores import decibel


def clip_figures(found: ClipComparison) -> list[tuple[str, str, str]]:
    """The numbers of a clip over all frames, the most important first: name, number, and what it means."""
    worst = found.frames[found.worst]
    figures = [
        ("PSNR", decibel(found.psnr), f"worst frame {worst.frame}: {decibel(worst.psnr)}"),
        ("SSIM", fixed(found.ssim), "structure kept, 1 is all"),
        ("MS-SSIM", fixed(found.ms_ssim), "the same over five scales"),
        ("Largest difference", level(found.largest), _of_levels(found.largest)),
        ("Mean difference", level(found.mean), _of_levels(found.mean)),
        ("Pixels off", f"{found.share_off:.2%}", "by more than 1% of the range"),
        ("Drift", _signed(found.drift), "levels gained from first frame to last"),
        ("Flicker", level(found.flicker), "levels the difference changes per frame"),
        ("Colour shift", _shift(found.colour_shift), "levels of red, green and blue"),
        ("Seam energy", _seam(found), "difference at the borders over elsewhere"),
    ]
    return [figure for figure in figures if figure[1]]


def level(value: float | None) -> str:
    """Levels with three digits; nothing for what is not known."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}".replace("e-0", "e-")


def drawn_words(gain: float, largest: float) -> str:
    """What the picture of the difference shows."""
    if gain == 1:
        return "The difference is drawn as it is: white is 255 levels, which is the most that there can be."
    words = (
        f"The difference is drawn {group(gain)} times as large, so that it can be seen: white is {level(255 / gain)} "
    )
    words += "of one level" if gain > 255 else "levels"
    words += f", and the largest is {level(largest)} {'of one level' if largest < 1 else 'levels'}, of 255."
    if largest < 0.5:
        words += " 8-bit pixels can't show that: only a value that lies half-way between two levels may be rounded "
        words += "the other way."
    return words


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.3f}"


def fixed(value: float | None) -> str:
    """Four digits; nothing for what is not known."""
    return "" if value is None else f"{value:.4f}"


def ratio(value: float) -> str:
    """A PSNR whose unit stands elsewhere."""
    return "identical" if math.isinf(value) else f"{value:.2f}"


def group(value: float) -> str:
    """5000000 as "5 000 000", with spaces that don't break."""
    return f"{value:,.0f}".replace(",", "\u202f")


def limit(gate: Gate) -> str:
    return f"{'≥' if gate.is_minimum else '≤'} {gate.limit:g}{gate.unit}"


def value(gate: Gate) -> str:
    return "identical" if math.isinf(gate.found) and gate.is_minimum else f"{gate.found:.4g}{gate.unit}"


def _of_levels(value: float) -> str:
    return "of one level, of 255" if 0 < value < 1 else "levels, of 255"


def _signed(value: float | None) -> str:
    if value is None:
        return ""
    text = level(value)
    return text.replace("-", "\u2212", 1) if value <= 0 else f"+{text}"


def _shift(shift: tuple[float, float, float]) -> str:
    if max(map(abs, shift)) < 0.005:
        return "0" if not any(shift) else "below 0.01"
    return " ".join(f"{value:+.2f}" for value in shift).replace("-", "\u2212")


def _seam(found: ClipComparison) -> str:
    if found.seam is None:
        return ""
    return "only there" if math.isinf(found.seam) else f"{found.seam:.2f}"
