#!/usr/bin/env bash
# PyAV 18.1.0 with FFmpeg 8.1.2 in its wheel (source: PyPI, 2026-11-27): writing and reading one clip moves its colour
# by half a pixel to the left, although nothing is lost in between. `reformat` from RGB to yuv420p puts each colour
# sample in the middle of two pixels; H.264 has it at the left one, unless the file says otherwise, and `reformat` of
# the decoded frame to RGB honours that, where colour is interpolated (FULL_CHR_H_INT). Before it is written, the same
# frame comes back in place. The filter `scale=out_chroma_loc=left` puts samples where H.264 has them.
# Seen, in pixels: samples +0.53, back unwritten 0.00, back through H.264 -0.55, samples by the filter -0.02. Exits with
# 1 when any is off by more than 0.1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6
cat >"$folder/program.py" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Interpolation

HEIGHT, WIDTH = 64, 128
FULL = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
bump = 60 * np.exp(-(((np.arange(WIDTH) - 60) / 12) ** 2))
colour = np.array([1, -0.299 / 0.587, 0])  # Red without a change of luma (BT.601, PyAV's default).
picture = np.broadcast_to(128 + bump[:, None] * colour, (HEIGHT, WIDTH, 3)).round().astype(np.uint8)


def middle(columns):
    """Where a bump has its middle, in columns."""
    columns = columns - columns[0]
    return (columns * np.arange(len(columns))).sum() / columns.sum()


def samples(frame):
    plane = np.frombuffer(frame.planes[2], np.uint8).reshape(HEIGHT // 2, -1)[:, : WIDTH // 2]
    return middle(picture[..., 0].mean(0)) - 2 * middle(plane.mean(0))


def back(frame):
    red = frame.to_ndarray(format="rgb24", interpolation=FULL)[..., 0].mean(0)
    return middle(red) - middle(picture[..., 0].mean(0))


def through_h264(frame):
    name = f"{sys.argv[1]}/clip.mp4"
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    with av.open(name) as container:
        read = next(container.decode(video=0))
    assert all(bytes(a) == bytes(b) for a, b in zip(read.planes, frame.planes, strict=True))
    return read


def by_filter(frame):
    graph = Graph()
    source = graph.add_buffer(width=WIDTH, height=HEIGHT, format=frame.format, time_base=Fraction(1, 10))
    scale = graph.add("scale", "flags=bicubic+accurate_rnd:out_chroma_loc=left")
    graph.link_nodes(source, scale, graph.add("format", "pix_fmts=yuv420p"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
yuv = rgb.reformat(format="yuv420p")
seen = samples(yuv), back(yuv), back(through_h264(yuv)), samples(by_filter(rgb))
for what, pixels in zip(("samples", "back", "back through H.264", "samples by the filter"), seen, strict=True):
    print(f"{what}: {pixels:+.2f} pixels")
sys.exit(any(abs(pixels - before) > 0.1 for pixels, before in zip(seen, (0.5, 0, -0.5, 0), strict=True)))
PY
"$folder/venv/bin/python" "$folder/program.py" "$folder" 2>/dev/null
