#!/usr/bin/env bash
# diffusers 0.42.1 on torch 2.13.0 (source: PyPI, 2026-11-28): the `config` of a model is not the same in two processes.
# Beside the settings it has `_use_default_values`, a list of the names that nobody gave, in the order of a set of
# strings, which Python seeds anew in each process. So a digest of `dict(vae.config)`, as the key of a cache on disk, finds
# nothing again. The file that `save_config` writes leaves the list out and is the same each time.
# One autoencoder of default settings in each of six processes.
# Seen: several digests of the config, one of the saved file, and one of the config without names that begin with an
# underscore. Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 diffusers==0.42.1 numpy==2.4.6 pillow==13.0.0
cat >"$folder/program.py" <<'PY'
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import diffusers


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


vae = diffusers.AutoencoderKL()
config = dict(vae.config)
plain = {name: value for name, value in config.items() if not name.startswith("_")}
with tempfile.TemporaryDirectory() as folder:
    vae.save_config(folder)
    saved = next(Path(folder).glob("*.json")).read_text()
print(*(digest(text) for text in (json.dumps(config, sort_keys=True), json.dumps(plain, sort_keys=True), saved)))
PY
for _ in 1 2 3 4 5 6; do "$folder/venv/bin/python" "$folder/program.py"; done >"$folder/found"
count() { cut -d' ' -f"$1" "$folder/found" | sort -u | wc -l; }
echo "six processes: $(count 1) digests of the config, $(count 2) without its own notes, $(count 3) of the saved file"
[ "$(count 1)" -gt 1 ] && [ "$(count 2)" -eq 1 ] && [ "$(count 3)" -eq 1 ]
