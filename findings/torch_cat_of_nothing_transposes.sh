#!/usr/bin/env bash
# torch 2.13.0 (source: PyPI, 2026-11-28): `torch.cat` of a video that lies channels last and of an empty part of it
# gives channels first: all of it is transposed. A part of one frame keeps channels last. VAEs with a causal cache do
# this at each convolution of a clip that has no cache (`torch.cat((cache, x), dim=2)` with a cache of no frames), and
# the next convolution turns it back.
# Seen: "no frames: channels first; one frame: channels last". Exits with 1 when the first is channels last.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/program.py" <<'PY'
import torch

last = torch.channels_last_3d
video = torch.randn(1, 8, 3, 4, 5).contiguous(memory_format=last)
joined = {name: torch.cat((video[:, :, :count], video), 2) for name, count in (("no frames", 0), ("one frame", 1))}
found = {
    name: "channels last" if each.is_contiguous(memory_format=last) else "channels first" for name, each in joined.items()
}
print("; ".join(f"{name}: {layout}" for name, layout in found.items()))
raise SystemExit(not (joined["no frames"].is_contiguous() and found["one frame"] == "channels last"))
PY
"$folder/venv/bin/python" "$folder/program.py" 2>/dev/null
