#!/usr/bin/env bash
# triton 3.6.0 (source: PyPI, 2026-11-28): the first kernel of every process reads all of triton's own shared library,
# some hundred megabytes, and hashes it, also where the compiled kernel is in the cache on disk. The name of a cache entry
# holds a digest of that library, not its version. So a process that launches one cached kernel waits some tenths of a
# second for it (0.36 s on a host with H200s), and far longer where the packages lie on a network drive.
# One small kernel, compiled for a GPU of compute capability 9.0 (none is needed for it), twice in fresh processes.
# Seen: the second process compiles nothing and reads as much as the library is large, or more. Exits with 1 when it
# reads less, or when the kernel is not taken from the cache.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check triton==3.6.0
cat >"$folder/program.py" <<'PY'
import sys
import time
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(source, target, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(target + places, 2 * tl.load(source + places))


def read() -> int:
    """Bytes that this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


library = sum(path.stat().st_size for path in (Path(triton.__file__).parent / "_C").glob("libtriton*"))
source = ASTSource(double, {"source": "*fp32", "target": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16})
kept = len(list(Path(sys.argv[1]).rglob("*.cubin")))
before, started = read(), time.perf_counter()
triton.compile(source, target=GPUTarget("cuda", 90, 32))
seconds, megabytes = time.perf_counter() - started, (read() - before) / 1e6
made = len(list(Path(sys.argv[1]).rglob("*.cubin"))) - kept
print(f"compiled {made}, read {megabytes:.0f} MB of a library of {library / 1e6:.0f} MB, {seconds:.2f} s")
sys.exit(not (made == (kept == 0) and (kept == 0 or megabytes >= library / 1e6 >= 100)))
PY
for _ in 1 2; do TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/program.py" "$folder/cache"; done
