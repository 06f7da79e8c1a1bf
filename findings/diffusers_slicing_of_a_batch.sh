#!/usr/bin/env bash
# diffusers 0.42.1 on torch 2.13.0 (source: PyPI, 2026-11-27): `enable_slicing`, which is said to save memory only,
# makes `decode` of two clips raise in three autoencoders, and is needed in a fourth. `AutoencoderKLMagvit` keeps the
# end of the first clip for the second one, which comes out three frames longer. `AutoencoderKLLTXVideo` and
# `AutoencoderKLLTX2Video`, given timesteps, take the second clip for the timestep of the first: a `zip` is missing.
# `AutoencoderKLHunyuanVideo15` raises without slicing: the mask of its attention has the batch's size where the heads
# belong.
# Seen: RuntimeError of the first three sliced and of the last one whole; the other four calls work. Exits with 1 when
# that changes.
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
MAGVIT = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": (1,) * 5,
    "decoder_block_out_channels": (8, 16, 32),
    "decoder_layers_per_block": (1,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3,
    "timestep_conditioning": True,
}
HUNYUAN = {"block_out_channels": (8, 16, 16, 32, 32), "layers_per_block": 1, "latent_channels": 4}


def tried(name, config, channels, sliced, *timestep):
    vae = getattr(diffusers, name)(**config).eval()
    if sliced:
        vae.enable_slicing()
    try:
        return str(tuple(vae.decode(torch.randn(2, channels, 2, 4, 4), *timestep).sample.shape))
    except RuntimeError as error:
        return f"RuntimeError: {error}"


times = torch.tensor([0.05, 0.05])
for row in (
    ("AutoencoderKLMagvit", MAGVIT, 4),
    ("AutoencoderKLLTXVideo", LTX, 8, times),
    ("AutoencoderKLLTX2Video", LTX, 8, times),
    ("AutoencoderKLHunyuanVideo15", HUNYUAN, 4),
):
    name, config, channels, *timestep = row
    for sliced in (False, True):
        print(name, "sliced:" if sliced else "whole:", tried(name, config, channels, sliced, *timestep))
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" 2>/dev/null)
echo "$seen"
[[ $(grep -o '^[A-Za-z0-9]* [a-z]*: RuntimeError' <<<"$seen") == 'AutoencoderKLMagvit sliced: RuntimeError
AutoencoderKLLTXVideo sliced: RuntimeError
AutoencoderKLLTX2Video sliced: RuntimeError
AutoencoderKLHunyuanVideo15 whole: RuntimeError' ]]
