#!/usr/bin/env bash
# diffusers 0.42.1 on torch 2.13.0 (source: PyPI, 2026-11-27): `AutoencoderVidTok` gives other numbers of frames by
# `encode` and `decode` than by its own `forward`, without a word. The causal one takes 17 frames (4k + 1, as other
# video autoencoders do) and gives back 13: `forward` puts three copies of the first frame before the clip, and `decode`
# drops three frames for them, but `encode` doesn't put them there. The other one, `is_causal=False`, takes 28 frames
# and gives back 16: `decode` drops what is over a multiple of four latents, which `forward` pads before.
# Seen: "causal: 17 frames, 4 latents, 13 frames; forward 17", "not causal: 28 frames, 7 latents, 16 frames; forward
# 28". Exits with 1 when that changes.
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


def say(what, causal, frames):
    vae = diffusers.AutoencoderVidTok(ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1, is_causal=causal).eval()
    clip = torch.randn(1, 3, frames, 32, 32)
    latents = vae.encode(clip).latent_dist.mode()
    both, whole = vae.decode(latents), vae(clip, sample_posterior=False).sample
    print(f"{what}: {frames} frames, {latents.shape[2]} latents, {both.shape[2]} frames; forward {whole.shape[2]}")


say("causal", True, 17)
say("not causal", False, 28)
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" 2>/dev/null)
echo "$seen"
causal='causal: 17 frames, 4 latents, 13 frames; forward 17'
other='not causal: 28 frames, 7 latents, 16 frames; forward 28'
[[ $seen == "$causal"$'\n'"$other" ]]
