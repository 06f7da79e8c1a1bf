#!/usr/bin/env bash
# diffusers 0.42.1 on torch 2.13.0 (source: PyPI, 2026-11-27): `enable_tiling` changes what a causal `AutoencoderVidTok`
# decodes by percents of the largest value, also where the clip is far smaller than one tile, so that no border is near.
# Its tiled decode cuts time too, and its upsampling in time doesn't carry all that it needs over the first cut: frames
# 1 to 13 differ, the first and all later ones don't. Tiled encode of one tile is the same as un-tiled. In float64, 64 x
# 64 pixels in tiles of 256, random weights.
# Seen: "encode 0.0%, decode 4.6%, frames 1 to 13 of 21". Exits with 1 when decode is within 1%, or other frames differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 diffusers==0.42.1 numpy==2.4.6 pillow==13.0.0
cat >"$folder/program.py" <<'PY'
import diffusers
import torch

torch.manual_seed(0)
torch.set_grad_enabled(False)
vae = diffusers.AutoencoderVidTok(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1).eval().double()
clip, latents = torch.randn(1, 3, 24, 64, 64).double(), torch.randn(1, 4, 6, 8, 8).double()


def both():
    return vae.encode(clip).latent_dist.mode(), vae.decode(latents)


whole = both()
vae.enable_tiling()
encode, decode = ((a - b).abs() / b.abs().max() for a, b in zip(both(), whole, strict=True))
frames = [number for number, off in enumerate(decode.amax((0, 1, 3, 4)).tolist()) if off > 1e-9]
print(f"encode {encode.max():.1%}, decode {decode.max():.1%}, frames {frames[0]} to {frames[-1]} of {decode.shape[2]}")
raise SystemExit(not (encode.max() < 1e-9 and decode.max() > 0.01 and frames == list(range(1, 14))))
PY
"$folder/venv/bin/python" "$folder/program.py" 2>/dev/null
