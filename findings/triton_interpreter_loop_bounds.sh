#!/usr/bin/env bash
# Triton 3.6.0, interpreted (TRITON_INTERPRET=1) beside numpy 2.4.6 (source: PyPI, 2026-11-27): a loop whose bound is a
# kernel argument fails, although the same kernel compiles and runs on a GPU. The interpreter makes a number of the bound
# by int() of an array with one element, which numpy allowed with a warning up to 2.3 and refuses from 2.4 on.
# Seen: InterpreterError("TypeError('only 0-dimensional arrays can be converted to Python scalars')"); with numpy 2.3.5
# the same program prints 10.0. Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
install torch==2.13.0 triton==3.6.0 numpy==2.4.6
cat >"$folder/program.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(values, out, count):
    total = 0.0
    for place in range(0, count):
        total += tl.load(values + place)
    tl.store(out, total)


out = torch.zeros(1)
add_up[(1,)](torch.arange(5, dtype=torch.float32), out, 5)
print(out.item())
PY
run() { TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/program.py" 2>&1 | tail -n 1; }
newer=$(run || true)
install numpy==2.3.5
older=$(run)
printf 'numpy 2.4.6: %s\nnumpy 2.3.5: %s\n' "$newer" "$older"
[[ $newer == *"only 0-dimensional arrays can be converted"* && $older == 10.0 ]]
