#!/usr/bin/env bash
# diffusers 0.42.1 on torch 2.13.0 (source: PyPI, 2026-11-28): `AutoencoderKLAllegro`, which runs in tiles only, encodes
# as many whole tiles as fit and leaves out the rest without a word. Rows, columns and frames beyond the last whole tile
# make no difference to the latents, whose shape is that of the whole clip; there they hold a constant.
# Tiles of 160 x 160 that step by 40 and 80, and of 24 frames that step by 16; a clip of 200 columns, then one of 30
# frames; random weights.
# Seen: "columns: latents (6, 20, 25), other pixels in the last 40 columns change 0 of them; frames: latents (7, 20, 20),
# other pixels in the last 6 frames change 0 of them". Exits with 1 when they change any.
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
vae = diffusers.AutoencoderKLAllegro(
    block_out_channels=(8, 16, 16, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=160
).eval()
vae.enable_tiling()


def changed(clip, edge):
    other = clip.clone()
    other[edge] = torch.randn_like(other[edge])
    one, two = (vae.encode(each).latent_dist.parameters for each in (clip, other))
    return tuple(one.shape[2:]), int((one != two).sum())


columns, by_columns = changed(torch.randn(1, 3, 24, 160, 200), (..., slice(-40, None)))
frames, by_frames = changed(torch.randn(1, 3, 30, 160, 160), (slice(None), slice(None), slice(-6, None)))
print(f"columns: latents {columns}, other pixels in the last 40 columns change {by_columns} of them; ", end="")
print(f"frames: latents {frames}, other pixels in the last 6 frames change {by_frames} of them")
raise SystemExit(not (by_columns == by_frames == 0 and columns == (6, 20, 25) and frames == (7, 20, 20)))
PY
"$folder/venv/bin/python" "$folder/program.py" 2>/dev/null
