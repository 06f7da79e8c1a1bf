"""Compile Triton kernels for a device of compute capability 9.0, which takes no device.

Run by a test, since Triton decides at its import whether it interprets or compiles.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from halovae.kernels.gpu import (
    gluon_patches,
    triton_attention,
    triton_chain,
    triton_copy,
    triton_norms,
    triton_shuffled,
    triton_tokens,
)

PICTURE, WIDE = "*bf16", "*fp32"


def compiled(
    kernel: Any, constants: dict[str, Any], warps: int, stages: int = 3, kind: Any = ASTSource, **types: str
) -> Any:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = signature.keys() - types.keys() - constants.keys()
    assert not missing, f"{kernel.__name__}: {missing}"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = kind(fn=kernel, signature=signature, constexprs=places)
    options = {"num_warps": warps} | ({"num_stages": stages} if kind is ASTSource else {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def chains() -> None:
    names = "count", "each", "frames", "height", "width", "small", "length", "video_step", "frame_step", "row_step"
    numbers = dict.fromkeys(names, "i32") | {"eps": "fp32"}
    for shift, other, norm, factor, term, first in (
        (0, False, 0, 3, 3, None),
        (2, True, 0, 0, 0, None),
        (2, False, 1, 2, 1, 0),
        (0, False, 2, 1, 2, 1),
    ):
        kinds = {"shift": shift, "factor": factor, "term": term}
        types = {name: "fp32" if kind == 1 else WIDE for name, kind in kinds.items() if kind}
        if other:
            types["other"] = PICTURE
        if first is not None:
            types |= {"by": PICTURE, "more": PICTURE}
        absent = {name: None for name in ("shift", "other", "factor", "term", "by", "more") if name not in types}
        constants = {"C": 96, "PADDED": 128, "ROWS": 32, "NORM": norm, "OTHER": other, "SILU": True}
        constants |= {"SHIFT": shift, "FACTOR": factor, "TERM": term} | absent
        constants |= {"BY": "by" in types, "MORE": "more" in types, "FIRST": first or 0}
        constants |= {"TIME": 2, "DOWN": 3, "ACROSS": 3, "ROOM": norm == 2}
        compiled(triton_chain._chain, constants, 4, x=PICTURE, out=PICTURE, **numbers, **types)


def statistics() -> None:
    for whole in (True, False):
        constants = {"C": 96, "TILE": 128, "ROWS": 32, "SHIFT": True, "WHOLE": whole}
        types = {"x": PICTURE, "shift": WIDE, "out": WIDE, "count": "i32", "length": "i32"}
        compiled(triton_norms._moments, constants, 4, **types)
    types = {"parts": WIDE, "out": WIDE, "count": "i32", "eps": "fp32"}
    shape = {"CELLS": 96, "EACH": 3, "BLOCK": 1024}
    bare = {"weight": None, "bias": None, "CHANNELS": 0, "WEIGHT": False, "BIAS": False}
    compiled(triton_norms._merge, shape | bare, 4, **types)
    constants = shape | {"CHANNELS": 3, "WEIGHT": True, "BIAS": True}
    compiled(triton_norms._merge, constants, 4, weight=PICTURE, bias=PICTURE, **types)


def tokens() -> None:
    numbers = {"count": "i32", "eps": "fp32"}
    flags = {"OTHER": True, "SCALE": True, "TOTAL": True, "NORMED": True, "WEIGHT": True}
    types = {"x": WIDE, "other": PICTURE, "scale": WIDE, "total": WIDE, "normed": PICTURE, "weight": WIDE}
    compiled(triton_tokens._add_and_norm, {"C": 2048, "PADDED": 2048, "ROWS": 2} | flags, 8, **types, **numbers)
    flags = {"OTHER": False, "SCALE": False, "TOTAL": False, "NORMED": True, "WEIGHT": False}
    absent = dict.fromkeys(("other", "scale", "total", "weight"))
    constants = {"C": 64, "PADDED": 64, "ROWS": 64} | flags | absent
    compiled(triton_tokens._add_and_norm, constants, 4, x=PICTURE, normed=PICTURE, **numbers)
    angles = {"cosines": PICTURE, "sines": PICTURE, "places": "i32", "heads": "i32"} | numbers
    flags = {"NORMED": True, "WEIGHT": False, "weight": None}
    shape = {"C": 64, "R": 48, "PADDED": 64, "ROWS": 64}
    compiled(triton_tokens._rotate, shape | flags, 4, x=PICTURE, out=PICTURE, **angles)
    types = {"x": PICTURE, "gates": PICTURE, "out": PICTURE, "stride": "i32"}
    compiled(triton_tokens._gate, {"C": 8192, "BLOCK": 4096}, 4, **types)


def attention() -> None:
    types = {"scores": WIDE, "out": PICTURE, "length": "i32", "scale": "fp32"}
    compiled(triton_attention._softmax, {"BLOCK": 4096}, 8, **types)


def patches() -> None:
    patch, most, rest = gluon_patches.layouts()
    operands = zip(("wide", "narrow", "most", "rest"), gluon_patches.blocks(), (patch, patch, most, rest), strict=True)
    types = {name: f"tensordesc<bf16{block},{layout!r}>" for name, block, layout in operands}
    types |= dict.fromkeys(("length", "rows", "cols", "across"), "i32") | {"bias": PICTURE, "out": PICTURE}
    constants = {"C": 96, "KT": 3, "TOP": 1, "LEFT": 1, "BIAS": True, "STAGES": 2, "num_warps": 8}
    for taps, up in ((3, 1), (2, 2)):
        more = {"KH": taps, "KW": taps, "UP": up}
        found = compiled(gluon_patches._convolve, constants | more, 8, kind=GluonASTSource, **types)
        assert "wgmma.mma_async" in found.asm["ptx"]


def shuffles() -> None:
    numbers = dict.fromkeys((f"{name}{place}" for name in "nab" for place in range(4)), "i32")
    numbers |= dict.fromkeys((f"{name}{place}" for name in "ij" for place in range(3)), "i32")
    constants = {"P1": 2, "P2": 2, "INSIDE": 1, "OUTSIDE": 8, "PIXELS": 8, "BLOCK": 128}
    compiled(triton_copy._shuffle, constants, 4, source=PICTURE, out=PICTURE, channels="i32", **numbers)


def borders() -> None:
    sizes = "frames", "height", "width", "video_step", "frame_step", "row_step", "t0", "t1", "y0", "y1", "x0", "x1"
    types = dict.fromkeys(sizes, "i32") | dict.fromkeys(("before", "around", "beside"), "fp32") | {"videos": PICTURE}
    for modes in ((0, 2, 2), (1, 0, 1)):
        constants = dict(zip(("TIME", "DOWN", "ACROSS"), modes, strict=True)) | {"C": 96, "ELEMENTS": 2048}
        compiled(triton_copy._fill, constants, 4, **types)


def sums_of_shuffled() -> None:
    numbers = dict.fromkeys(("frames", "height", "width", "channels"), "i32")
    each = "batch", "row", "deep", "down", "length", "back"
    numbers |= dict.fromkeys((f"{name}{place}" for name in each for place in (0, 1)), "i32")
    blocks = dict(zip("PQR", (2, 2, 2), strict=True)) | {"COL": 1024}
    one = blocks | {"C": 128, "STEP": 128, "GROUP": 1, "SHIFT": True, "BEFORE": False}
    other = blocks | {"C": 512, "STEP": 512, "GROUP": 4, "SHIFT": False, "BEFORE": True}
    for both in (True, False):
        first, second = (one, other) if both else (other, other)
        constants = {"BLOCK": 512, "COLS": 2, "BOTH": both, "shift1": None} | ({} if both else {"shift0": None})
        constants |= {f"{name}0": value for name, value in first.items()}
        constants |= {f"{name}1": value for name, value in second.items()}
        types = {"x0": PICTURE, "x1": PICTURE, "out": PICTURE} | ({"shift0": WIDE} if both else {})
        compiled(triton_shuffled._sum, constants, 4, **types, **numbers)


if __name__ == "__main__":
    shuffles()
    borders()
    sums_of_shuffled()
    patches()
    chains()
    tokens()
    statistics()
    attention()
