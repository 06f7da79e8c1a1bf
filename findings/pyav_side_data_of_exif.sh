#!/usr/bin/env bash
# PyAV 18.1.0 (source: PyPI, 2026-11-27) on JPEG with EXIF, made by Pillow 13.0.0: `frame.side_data` raises ValueError
# on every access, also when another kind of side data is asked for. Its list of kinds ends before FFmpeg 8's for EXIF,
# and one kind that it doesn't know spoils all. Motion JPEG in avi, mov or mkv, as cameras write it, gives the same.
# `frame.rotation` of the same frame works, and already holds EXIF's orientation.
# Seen: "ValueError: 31 is not a valid Type" and rotation -90; without EXIF no error. Exits with 1 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 pillow==13.0.0
cat >"$folder/program.py" <<'PY'
import sys
from fractions import Fraction

import av
from PIL import Image


def read(name):
    with av.open(name) as container:
        frame = next(container.decode(video=0))
        try:
            said = frame.side_data.get("DISPLAYMATRIX")
        except ValueError as error:
            said = f"ValueError: {error}"
        print(f"{name.rpartition('.')[2]}: {said}, rotation {frame.rotation}")


plain, tagged, clip = (f"{sys.argv[1]}/{name}" for name in ("plain.jpg", "tagged.jpg", "clip.mov"))
exif = Image.Exif()
exif[0x0112] = 6  # Orientation: a quarter turn.
Image.new("RGB", (64, 32), "red").save(plain)
Image.new("RGB", (64, 32), "red").save(tagged, exif=exif)
with av.open(clip, "w") as container:
    stream = container.add_stream("mjpeg", rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
    with open(tagged, "rb") as file:
        packet = av.Packet(file.read())
    packet.stream, packet.pts, packet.dts, packet.time_base, packet.is_keyframe = stream, 0, 0, Fraction(1, 10), True
    container.mux(packet)
for name in (plain, tagged, clip):
    read(name)
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
error='ValueError: 31 is not a valid Type, rotation -90'
[[ $seen == "jpg: None, rotation 0"$'\n'"jpg: $error"$'\n'"mov: $error" ]]
