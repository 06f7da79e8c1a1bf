#!/usr/bin/env bash
# diffusers 0.42.1 (source: PyPI, 2026-11-27): one class of autoencoder, `VQModel`, takes pictures as 0 to 1 in aMUSEd's
# pipelines and as -1 to 1 in Kandinsky's. The class's documentation says nothing of it, and the wrong one is no error.
# The image processors that the pipelines make for themselves differ.
# Seen, of black and white: "AmusedImg2ImgPipeline 0 1", "KandinskyV22Img2ImgPipeline -1 1". Exits with 1 when that
# changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy==2.4.6 pillow==13.0.0
cat >"$folder/program.py" <<'PY'
import diffusers
from PIL import Image

vae = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
picture = Image.new("RGB", (64, 64))
picture.paste((255, 255, 255), (0, 0, 32, 64))
others = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "scheduler"))
amused = diffusers.AmusedImg2ImgPipeline(vqvae=vae, **others)
kandinsky = diffusers.KandinskyV22Img2ImgPipeline(movq=vae, unet=None, scheduler=None)
for pipeline in (amused, kandinsky):
    numbers = pipeline.image_processor.preprocess(picture)
    print(type(pipeline).__name__, int(numbers.min()), int(numbers.max()))
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" 2>/dev/null)
echo "$seen"
[[ $seen == $'AmusedImg2ImgPipeline 0 1\nKandinskyV22Img2ImgPipeline -1 1' ]]
