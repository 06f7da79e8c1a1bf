"""Comparison in numbers: known answers, definitions, and what only shows over many frames."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from clips import bars
from numpy.typing import NDArray

from halovae.base.errors import InputError
from halovae.evaluation import clip_gates, compare_clips, compare_latents, latent_gates, psnr
from halovae.evaluation.scores import bound


def noisy(clip: NDArray[Any], strength: float, seed: int = 0) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(0, strength, clip.shape)
    return (clip + noise).round().clip(0, 255).astype(np.uint8)


class TestClips:
    def test_equal(self) -> None:
        found = compare_clips(bars(), bars())
        assert math.isinf(found.psnr)
        assert found.is_identical
        assert found.ssim == pytest.approx(1, abs=1e-12)
        assert (found.largest, found.mean, found.share_off, found.drift, found.flicker) == (0, 0, 0, 0, 0)
        assert found.seam is None
        assert not found.grid
        document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert document["psnr"] is None

    def test_psnr_by_its_definition(self) -> None:
        a, b = bars(), noisy(bars(), 9)
        error = np.square(a.astype(float) - b).mean()
        assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)

    def test_ssim_by_its_definition(self) -> None:
        """Window by window, in Gaussian weights, those only that lie whole in the picture."""
        a = np.random.default_rng(1).integers(0, 256, (1, 13, 12, 3), dtype=np.uint8)
        b = noisy(a, 30)
        bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
        weights = np.outer(bell, bell)[..., None] / bell.sum() ** 2
        values = []
        for y in range(3):
            for x in range(2):
                p, q = (clip[0, y : y + 11, x : x + 11].astype(float) for clip in (a, b))
                p_mean, q_mean = ((weights * one).sum((0, 1)) for one in (p, q))
                p_variance, q_variance = ((weights * gap**2).sum((0, 1)) for gap in (p - p_mean, q - q_mean))
                both = (weights * (p - p_mean) * (q - q_mean)).sum((0, 1))
                luminance = (2 * p_mean * q_mean + 2.55**2) / (p_mean**2 + q_mean**2 + 2.55**2)
                values.append(luminance * (2 * both + 7.65**2) / (p_variance + q_variance + 7.65**2))
        assert compare_clips(a, b).ssim == pytest.approx(np.mean(values), abs=1e-12)

    def test_ssim_sees_even_places(self) -> None:
        """One level apart and bright: less than one, by the luminance term alone."""
        a, b = np.full((1, 200, 180, 3), 230, np.uint8), np.full((1, 200, 180, 3), 231, np.uint8)
        found = compare_clips(a, b)
        expected = (2 * 230 * 231 + 2.55**2) / (230**2 + 231**2 + 2.55**2)
        assert found.ssim == pytest.approx(expected, abs=1e-12)
        assert found.ms_ssim == pytest.approx(expected**0.1333, abs=1e-12)
        assert found.ssim < 1

    def test_one_pixel(self) -> None:
        a, b = bars(), bars()
        b[3, 20, 30, 1] ^= 128
        found = compare_clips(a, b)
        assert found.worst == 3
        assert found.largest == 128
        assert found.share_off == pytest.approx(1 / a[..., 0].size)
        assert found.frames[2].flicker == 0
        # It comes with frame 3 and goes with frame 4.
        assert found.frames[3].flicker == found.frames[4].flicker == pytest.approx(128 / a[0].size)
        assert found.energy.argmax() == 20 * a.shape[2] + 30

    def test_ms_ssim_needs_size(self) -> None:
        assert compare_clips(bars(), bars()).ms_ssim is None
        large = bars(1, 176, 176)
        assert compare_clips(large, large).ms_ssim == pytest.approx(1, abs=1e-12)

    def test_tiny_frames_have_no_ssim(self) -> None:
        found = compare_clips(bars(1, 8, 8), bars(1, 8, 8))
        assert found.ssim is None
        assert (found.drift, found.flicker) == (None, None)

    def test_drift(self) -> None:
        """The difference grows by one level each frame: by 5 from the first frame to the last."""
        a = np.full((6, 16, 16, 3), 100, np.uint8)
        b = a + np.arange(6, dtype=np.uint8)[:, None, None, None]
        found = compare_clips(a, b)
        assert found.drift == pytest.approx(5)
        assert found.flicker == pytest.approx(1)
        assert found.mean == pytest.approx(2.5)

    def test_colour_shift_has_a_sign(self) -> None:
        a = np.full((2, 16, 16, 3), 100, np.uint8)
        b = a.copy()
        b[..., 0] += 4
        b[..., 2] -= 7
        found = compare_clips(a, b)
        assert found.colour_shift == pytest.approx((4, 0, -7))
        assert found.drift == pytest.approx(0)

    def test_levels_between_integers_count(self) -> None:
        a = np.full((1, 16, 16, 3), 100, np.uint8)
        found = compare_clips(a, a.astype(np.float64) + 0.25)
        assert found.largest == 0.25
        assert found.psnr == pytest.approx(20 * math.log10(255 / 0.25))


class TestLatents:
    def test_by_channel_and_frame(self) -> None:
        a = torch.ones(1, 2, 3, 4, 4)
        b = a.clone()
        b[0, 1, 2] += 0.5
        found = compare_latents(a, b)
        assert found.frames == (0, 0, pytest.approx(0.5 * math.sqrt(0.5)))
        assert found.worst == 2
        assert [c.largest for c in found.channels] == [0, 0.5]
        assert found.channels[1].relative_l2 == pytest.approx(0.5 / math.sqrt(3))
        assert found.relative_l2 == pytest.approx(0.5 / math.sqrt(6))

    def test_frames_in_the_batch(self) -> None:
        a = torch.ones(3, 2, 4, 4)
        assert compare_latents(a, a).frames == (0, 0, 0)

    def test_nothing_to_compare_with(self) -> None:
        zeros = torch.zeros(1, 1, 2, 2)
        assert compare_latents(zeros, zeros).relative_l2 == 0
        found = compare_latents(zeros, zeros + 1)
        assert math.isinf(found.relative_l2)
        json.dumps(found.to_dict(), allow_nan=False)


class TestGates:
    def test_the_worst_frame_is_named(self) -> None:
        clip, broken = bars(), bars()
        broken[2] = noisy(clip[2], 60)
        gates = clip_gates(compare_clips(clip, broken), min_ssim=0.94, min_psnr=28)
        assert [gate.passed for gate in gates] == [False, False]
        assert [gate.frame for gate in gates] == [2, 2]
        assert "in frame 2 is below 0.94" in str(gates[0])
        assert str(gates[1]).endswith("dB in frame 2 is below 28 dB")

    def test_equal_clips_pass(self) -> None:
        gates = clip_gates(compare_clips(bars(), bars()), min_ssim=0.99, min_psnr=99)
        assert [gate.passed for gate in gates] == [True, True]
        assert gates[1].to_dict()["found"] is None

    def test_no_ssim_no_gate(self) -> None:
        with pytest.raises(InputError, match="less than 11 rows"):
            clip_gates(compare_clips(bars(1, 8, 8), bars(1, 8, 8)), min_ssim=0.9)

    def test_latents(self) -> None:
        a = torch.ones(1, 1, 2, 4, 4)
        b = a.clone()
        b[:, :, 1] += 0.1
        found = compare_latents(a, b)
        assert latent_gates(found) == []
        assert latent_gates(found, max_l2=0.2)[0].passed
        assert str(latent_gates(found, max_l2=0.05)[0]) == "relative L2 0.1 in frame 1 is above 0.05"


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (3.36e-4, "0.0004"), (0.0004, "0.0005"), (9.9e-7, "1e-6"), (0.31, "0.4"), (2.6, "3")]
)
def test_a_bound_has_one_digit_and_holds(value: float, said: str) -> None:
    assert bound(value) == said
