"""How far two results are apart, in numbers: clips by frame, latents by channel, seams, and gates on them.

Clips are arrays (frames, height, width, 3) of levels from 0 to 255, as integers or as floating point.
"""

from halovae.evaluation.distances import (
    ClipComparison,
    Frames,
    Gate,
    LatentComparison,
    clip_gates,
    compare_clips,
    compare_latents,
    latent_gates,
)
from halovae.evaluation.scores import FrameScores, psnr, score_frame
from halovae.evaluation.seams import CutLines, near_lines, seam_energy

__all__ = [
    "ClipComparison",
    "CutLines",
    "FrameScores",
    "Frames",
    "Gate",
    "LatentComparison",
    "clip_gates",
    "compare_clips",
    "compare_latents",
    "latent_gates",
    "near_lines",
    "psnr",
    "score_frame",
    "seam_energy",
]
