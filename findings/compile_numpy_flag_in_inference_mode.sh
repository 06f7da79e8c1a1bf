#!/usr/bin/env bash
# torch 2.13.0 (source: PyPI, CPU build; on a GPU torch 2.11.0 does the same) with diffusers 0.42.1, 2026-11-28:
# `torch.compile` of the encoder of `AutoencoderKLHunyuanImageRefiner` works under `torch.no_grad()`, and raises
# AssertionError ("Guard failed on the same frame it was created") under `torch.inference_mode()`. diffusers counts the
# down-sampling steps with numpy, so modules keep a `numpy.bool` as a flag; the compiler guards it as a tensor that it
# makes outside of inference mode, and then meets one that is made inside. Encoders without such a flag compile in both.
# A small encoder with random weights, a clip 5x64x64. Exits with 1 when it raises in both modes, or in none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from diffusers import AutoencoderKLHunyuanImageRefiner

vae = AutoencoderKLHunyuanImageRefiner(
    block_out_channels=(16, 32, 64, 64, 64), latent_channels=8, layers_per_block=1
).eval()
flags = {type(m.add_temporal_downsample) for m in vae.modules() if hasattr(m, "add_temporal_downsample")}
clip, found = torch.randn(1, 3, 5, 64, 64), {}
for mode in (torch.no_grad, torch.inference_mode):
    torch.compiler.reset()
    try:
        with mode():
            torch.compile(vae.encoder, backend="eager")(clip)
        found[mode.__name__] = "works"
    except AssertionError as error:
        found[mode.__name__] = str(error).split(".")[0]
print(f"torch {torch.__version__}, flags are {flags}: {found}")
sys.exit([words == "works" for words in found.values()] != [True, False])
PY
