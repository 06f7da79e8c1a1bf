"""What VAEs take: learnt without weights, true with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES

from halovae import codec
from halovae.errors import InputError
from halovae.fit import Fit, Limits, limits_of

# Name, pixels per latent, whether frames go one by one, and for some frame counts what they are padded to.
LEARNT = [
    ("kl", 8, True, {1: 1, 6: 6}),
    ("vq", 4, True, {6: 6}),
    ("dc", 32, True, {6: 6}),
    ("temporal_decoder", 8, True, {6: 6}),
    ("qwenimage21", 16, True, {1: 1, 6: 6}),
    ("hunyuan_image_refiner", 16, False, {1: 1, 6: 6}),
    ("wan21", 8, False, {1: 1, 2: 5, 8: 9, 33: 33, 80: 81, 81: 81}),
    ("wan22", 16, False, {8: 9}),
    ("hunyuan_video_framewise", 8, False, {1: 1, 18: 21, 130: 133}),
    ("ltx", 32, False, {1: 1, 8: 9, 120: 121}),
    ("ltx095", 32, False, {10: 17}),
    ("cogvideox", 8, False, {1: 1, 5: 9, 49: 49, 50: 57}),
    ("mochi", 8, False, {1: 1, 8: 13, 80: 85}),
    ("minimax_h3", 16, False, {1: 22, 23: 39}),
]


@pytest.mark.parametrize(("name", "ratio", "per_frame", "counts"), LEARNT, ids=[row[0] for row in LEARNT])
def test_limits_are_learnt(name: str, ratio: int, per_frame: bool, counts: dict[int, int]) -> None:
    limits = limits_of(FAMILIES[name].build())
    assert (limits.ratio, limits.per_frame) == (ratio, per_frame)
    assert {frames: limits.padded_count(frames) for frames in counts} == counts
    assert limits.fit(min(counts), ratio + 1, 3 * ratio).padded_height == 2 * ratio
    assert limits.fit(min(counts), ratio + 1, 3 * ratio).padded_width == 3 * ratio


@pytest.mark.parametrize("name", ["kl", "tiny", "temporal_decoder", "qwenimage21", "wan22", "ltx095", "cogvideox"])
def test_what_is_learnt_is_true(name: str) -> None:
    """A clip of sizes that the VAE doesn't take comes back in its own sizes."""
    vae = FAMILIES[name].build()
    limits = limits_of(vae)
    frames = np.random.default_rng(0).integers(0, 256, (6, 70, 83, 3), dtype=np.uint8)
    fit = limits.fit(*frames.shape[:3])
    clip = fit.pad(codec.to_tensor(frames, torch.float32, torch.device("cpu")))
    calls: list[str] = []
    with torch.no_grad():
        latents = codec.encode(vae, limits, clip, lambda: calls.append("encode"))
        expected_calls = codec.decode_calls(vae, limits, latents)
        sample = codec.decode(vae, limits, latents, lambda: calls.append("decode"))
    assert codec.to_frames(fit.crop(sample)).shape == frames.shape
    assert latents.shape[1] == limits.latent_channels
    assert calls.count("encode") == (6 if limits.per_frame else 1)
    assert calls.count("decode") == expected_calls


def test_frames_of_an_image_vae_are_what_each_gives_alone() -> None:
    vae = FAMILIES["kl"].build()
    limits = limits_of(vae)
    clip = torch.rand(3, 3, 32, 40) * 2 - 1
    with torch.no_grad():
        sample = codec.decode(vae, limits, codec.encode(vae, limits, clip))
        for frame in range(3):
            alone = vae.decode(vae.encode(clip[:, frame][None]).latent_dist.mode()).sample[0]
            assert torch.equal(sample[:, frame], alone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("allegro", "Encoding without tiling has not been implemented"),
        ("consistency", "can't decode what it encodes"),
    ],
)
def test_vaes_that_take_no_clips_are_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        limits_of(FAMILIES[name].build())
    assert "\n" not in str(caught.value)


def test_wrong_channel_count_is_one_line() -> None:
    family = FAMILIES["kl"]
    vae = getattr(__import__("diffusers"), family.model)(**{**family.config, "in_channels": 1, "out_channels": 1})
    with pytest.raises(InputError, match="takes neither RGB images nor RGB clips"):
        limits_of(vae)


def test_learning_leaves_the_vae_alone() -> None:
    vae = FAMILIES["wan21"].build()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    limits_of(vae).padded_count(9)
    assert all(
        value.device.type == "cpu" and torch.equal(value, before[name]) for name, value in vae.state_dict().items()
    )


def test_a_vae_that_keeps_no_count_is_refused() -> None:
    def none(frames: int) -> int:
        raise InputError("keeps no frame count")

    limits = Limits(has_frame_dim=True, per_frame=False, channels=3, latent_channels=4, ratio=8, padded_count=none)
    with pytest.raises(InputError, match="keeps no frame count"):
        limits.fit(5, 8, 8)


FIT = Fit(frames=2, height=3, width=5, padded_frames=5, padded_height=8, padded_width=8)


def test_padding_repeats_the_edge_and_the_last_frame() -> None:
    clip = torch.arange(3 * 2 * 3 * 5, dtype=torch.float32).reshape(3, 2, 3, 5)
    padded = FIT.pad(clip)
    assert padded.shape == (3, 5, 8, 8)
    assert torch.equal(padded[:, :2, :3, :5], clip)
    assert torch.equal(padded[:, 4], padded[:, 1])
    assert torch.equal(padded[:, :, 7], padded[:, :, 2])
    assert torch.equal(padded[..., 7], padded[..., 4])
    assert torch.equal(FIT.crop(padded), clip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_padding_in_other_formats(dtype: torch.dtype) -> None:
    assert FIT.pad(torch.ones(3, 2, 3, 5, dtype=dtype)).dtype == dtype


def test_nothing_is_said_when_nothing_is_padded() -> None:
    fit = Fit(frames=5, height=8, width=8, padded_frames=5, padded_height=8, padded_width=8)
    clip = torch.ones(3, 5, 8, 8)
    assert fit.pad(clip) is clip
    assert fit.notes == ()
    assert FIT.notes == (
        "2 frames padded to 5 for the VAE, cropped back after it",
        "5x3 padded to 8x8 for the VAE, cropped back after it",
    )


def test_other_sizes_than_asked_are_refused() -> None:
    with pytest.raises(InputError, match="gave back 4 frames of 8x8 for 5 frames of 8x8"):
        FIT.crop(torch.ones(3, 4, 8, 8))


def test_all_levels_survive() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert np.array_equal(codec.to_frames(codec.to_tensor(levels, dtype, torch.device("cpu"))), levels)
    assert codec.to_frames(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).tolist() == [[[[0], [255]]]]
