#!/usr/bin/env bash
# PyAV 18.1.0 (source: PyPI, 2026-11-27): `VideoFrame.rotation` of a clip that is only mirrored is a half turn for a
# mirror left to right, and nothing for a mirror top to bottom. A reader that turns pictures by `rotation` shows the
# first upside down, and the second as if nothing were set. `Stream.set_display_rotation(0, hflip=True)` writes such
# clips. Only the matrix tells them apart: `frame.side_data["DISPLAYMATRIX"]`.
# Seen: "left-right -180 (-1, 0, 0, 1)", "top-bottom 0 (1, 0, 0, -1)", "half turn -180 (-1, 0, 0, -1)". Exits with 1
# when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0
cat >"$folder/program.py" <<'PY'
import struct
import sys

import av


def read_back(**turn):
    name = f"{sys.argv[1]}/clip.mp4"
    with av.open(name, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(**turn)
        for packet in (*stream.encode(av.VideoFrame(64, 32, "yuv420p")), *stream.encode()):
            container.mux(packet)
    with av.open(name) as container:
        frame = next(container.decode(video=0))
        matrix = struct.unpack("9i", bytes(frame.side_data["DISPLAYMATRIX"]))
        return frame.rotation, tuple(number // 65536 for number in matrix[:2] + matrix[3:5])


print("left-right", *read_back(degrees=0, hflip=True))
print("top-bottom", *read_back(degrees=0, vflip=True))
print("half turn", *read_back(degrees=180))
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder")
echo "$seen"
[[ $seen == $'left-right -180 (-1, 0, 0, 1)\ntop-bottom 0 (1, 0, 0, -1)\nhalf turn -180 (-1, 0, 0, -1)' ]]
