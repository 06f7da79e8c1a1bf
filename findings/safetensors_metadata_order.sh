#!/usr/bin/env bash
# safetensors 0.8.0 on numpy 2.4.6 (source: PyPI, 2026-11-28): `save` with several entries of metadata gives other bytes
# in each process, and for two calls in one process as well. Tensors are sorted; the metadata stands in the order of a
# hash table that is seeded anew. A digest of a file of latents or weights tells nothing, then, and a cache by content
# keeps the same thing again and again, unless the header is written in an order of one's own.
# One tensor of three zeros, eight entries of metadata, one save in each of eight processes.
# Seen: several digests, one for each process; with one entry, a single one. Exits with 1 when eight entries give
# one digest, or one entry gives several.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat >"$folder/program.py" <<'PY'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

metadata = {f"key{number}": "value" for number in range(int(sys.argv[1]))}
print(hashlib.sha256(save({"latents": np.zeros(3, np.float32)}, metadata=metadata)).hexdigest())
PY
digests() { for _ in 1 2 3 4 5 6 7 8; do "$folder/venv/bin/python" "$folder/program.py" "$1"; done | sort -u | wc -l; }
several=$(digests 8)
one=$(digests 1)
echo "eight entries: $several digests of eight files; one entry: $one"
[ "$several" -gt 1 ] && [ "$one" -eq 1 ]
