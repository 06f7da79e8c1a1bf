#!/usr/bin/env bash
# diffusers 0.42.1 on torch 2.13.0 (source: PyPI, 2026-11-27): `AutoencoderKLKVAEVideo` loses frames at some lengths,
# and its latents have a made-up deviation. Of 4k + 1 frames, which it takes, those of 16k + 5 come back three fewer,
# from 21 on: the decoder's last segment is one latent long then, and decodes to one frame, as a clip's first latent
# does. And `latent_dist.std` is 1 for any clip and any weights, since `encode` puts zeros in place of the logarithm of
# the variance that its network gives: `sample()`, unlike `mode()`, adds noise of deviation 1.
# Seen: "17>17 21>18 25>25 33>33 37>34 41>41, std 1.0 to 1.0". Exits with 1 when that changes.
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
vae = diffusers.AutoencoderKLKVAEVideo(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4).eval()
counts = []
for frames in (17, 21, 25, 33, 37, 41):
    latents = vae.encode(torch.randn(1, 3, frames, 32, 32)).latent_dist
    counts.append(f"{frames}>{vae.decode(latents.mode()).sample.shape[2]}")
print(f"{' '.join(counts)}, std {latents.std.min():.1f} to {latents.std.max():.1f}")
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" 2>/dev/null)
echo "$seen"
[[ $seen == "17>17 21>18 25>25 33>33 37>34 41>41, std 1.0 to 1.0" ]]
