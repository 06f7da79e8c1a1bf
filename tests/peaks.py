"""How much memory steps with a clip take at their peak: a process of its own, so that nothing else is in it.

    python peaks.py FOLDER

prints for each step its name, the bytes of the clip in 8 bits, and by how many the resident memory grew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from halovae import media
from halovae.base.memory import PeakMemory
from halovae.media import codec

HEIGHT, WIDTH = 160, 256
CPU = torch.device("cpu")


def video(folder: Path, frames: int) -> Path:
    path = folder / f"{frames}.mp4"
    if not path.exists():
        still = np.broadcast_to(np.arange(WIDTH, dtype=np.uint8)[:, None], (HEIGHT, WIDTH, 3))
        media.write(path, [still] * frames, Fraction(25))
    return path


def read(folder: Path, frames: int) -> Callable[[], object]:
    path = video(folder, frames)
    return lambda: media.read(path)


def to_tensor(folder: Path, frames: int) -> Callable[[], object]:
    clip = np.ones((frames, HEIGHT, WIDTH, 3), np.uint8)
    return lambda: codec.to_tensor(clip, torch.float32, CPU)


def write(folder: Path, frames: int) -> Callable[[], object]:
    clip = torch.zeros(3, frames, HEIGHT, WIDTH)
    return lambda: media.write(folder / "out.mp4", codec.frames_of(clip), Fraction(25))


STEPS = (read, to_tensor, write)
FRAMES = 400

if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for step in STEPS:
        # What libraries take once, and the encoder for the frames that it looks ahead.
        step(place, 30)()
        run = step(place, FRAMES)
        memory = PeakMemory(CPU)
        assert memory.read() is not None, "the system does not tell"
        result = run()
        print(step.__name__, FRAMES * HEIGHT * WIDTH * 3, memory.growth)
        del result, run
