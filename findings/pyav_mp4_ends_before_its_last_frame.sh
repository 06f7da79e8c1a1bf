#!/usr/bin/env bash
# PyAV 18.1.0 (source: PyPI, 2026-11-27): an mp4 of frames at uneven times can say that it ends before its last frame is
# shown. Seven frames, at 0, 0.1, 0.2, 0.3, 1.0, 1.1 and 3.0 s, written by libx264 with frames that are sent before
# earlier ones (its default): the file says 1.3 s, and 1.7 s where `packet.duration` is set. All seven frames are in it,
# the last one at 3.0 s. The muxer counts by the times at which packets are sent to the decoder, which lag behind. Where
# frames are sent in the order they are shown (bf=0), the file says 3.1 s, and the true 3.5 s with `packet.duration`.
# `frame.duration` changes nothing: the encoder's packets don't have it.
# Seen: "1.3 1.3 1.7" (nothing set; frame.duration; packet.duration), and with bf=0 "3.1 3.1 3.5". Exits with 1 when
# that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0
cat >"$folder/program.py" <<'PY'
import sys
from fractions import Fraction
from itertools import pairwise

import av

TENTH = Fraction(1, 10)
TIMES = (0, 1, 2, 3, 10, 11, 30)
LASTS = {begin: end - begin for begin, end in pairwise((*TIMES, 35))}


def duration(bf, of_frames, of_packets):
    name = f"{sys.argv[1]}/clip.mp4"
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": bf})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = TENTH
        packets = []
        for time in TIMES:
            frame = av.VideoFrame(64, 32, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([16 + 5 * time]) * plane.buffer_size)
            frame.pts, frame.time_base = time, TENTH
            if of_frames:
                frame.duration = LASTS[time]
            packets += stream.encode(frame)
        for packet in packets + stream.encode():
            if of_packets:
                packet.duration = LASTS[packet.pts]
            container.mux(packet)
    with av.open(name) as container:
        stream = container.streams.video[0]
        assert [round(frame.time * 10) for frame in container.decode(stream)] == list(TIMES)
        return float(stream.duration * stream.time_base)


for bf in ("2", "0"):
    print(*(duration(bf, *way) for way in ((False, False), (True, False), (False, True))))
PY
seen=$("$folder/venv/bin/python" "$folder/program.py" "$folder" 2>/dev/null)
echo "$seen"
[[ $seen == $'1.3 1.3 1.7\n3.1 3.1 3.5' ]]
