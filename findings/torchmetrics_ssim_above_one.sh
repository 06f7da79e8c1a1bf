#!/usr/bin/env bash
# torchmetrics 1.9.0 on torch 2.13.0 for CPUs (source: PyPI, 2026-11-27): SSIM in float32 is above 1 for some pictures,
# and below 1 for a picture and itself. Variances are differences of nearly equal numbers there (mean of squares less
# square of mean), which in bright flat parts keep no digit; no definition of SSIM allows more than 1. In float64 the
# same calls are right. Pictures are flat, 64 x 64, of levels up to 255 with data_range=255.
# Seen: levels 230 and 231: 1.00039 (float64: 0.99999); levels 228 and 229: 0.99752; 255 and itself: 0.99920 (float64:
# 1). Of levels 200 to 255, each beside the next lower one: up to 1.00093. Exits with 1 when none of the flat pairs is
# above 1.0001, none of the equal ones is below 0.9995, or float64 is not right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
cat >"$folder/program.py" <<'PY'
import sys

import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim


def score(first, second, dtype):
    pictures = (torch.full((1, 1, 64, 64), float(level), dtype=dtype) for level in (first, second))
    return ssim(*pictures, data_range=255.0).item()


for pair in ((230, 231), (228, 229), (255, 255)):
    print(*pair, f"float32 {score(*pair, torch.float32):.5f}, float64 {score(*pair, torch.float64):.5f}")
levels = range(200, 256)
above = max(score(level, level - 1, torch.float32) for level in levels)
equal = min(score(level, level, torch.float32) for level in levels)
right = all(0.9999 < score(level, level - 1, torch.float64) < 1 for level in levels)
print(f"of levels 200 to 255: highest of neighbours {above:.5f}, lowest of equals {equal:.5f}, float64 right: {right}")
sys.exit(not (above > 1.0001 and equal < 0.9995 and right))
PY
"$folder/venv/bin/python" "$folder/program.py"
