"""What VAEs take: learnt without weights, true with them."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import ClassVar

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES

import halovae
from halovae.base.errors import InputError
from halovae.media import codec
from halovae.media.vae_limits import IMAGENET, PIXELS, SIGNED, UNIT, Fit, Limits, Pixels, limits_of, pixels_of

# Name, pixels per latent, whether frames go one by one, and for some frame counts what they are padded to.
LEARNT = [
    ("kl", 8, True, {1: 1, 6: 6}),
    ("vq", 4, True, {6: 6}),
    ("dc", 32, True, {6: 6}),
    ("temporal_decoder", 8, True, {6: 6}),
    ("qwenimage21", 16, True, {1: 1, 6: 6}),
    ("hunyuan_image_refiner", 16, False, {1: 1, 6: 6}),
    ("wan21", 8, False, {1: 1, 2: 5, 8: 9, 33: 33}),
    ("wan22", 16, False, {8: 9}),
    ("hunyuan_video_framewise", 8, False, {1: 1, 18: 21}),
    ("ltx", 32, False, {1: 1, 8: 9}),
    ("ltx095", 32, False, {10: 17}),
    ("cogvideox", 8, False, {1: 1, 5: 9, 50: 57}),
    ("mochi", 8, False, {1: 1, 8: 13}),
    ("minimax_h3", 16, False, {1: 22, 23: 39}),
    ("kvae_video", 8, False, {5: 5, 37: 41, 49: 49}),
    ("vidtok", 8, False, {1: 1, 6: 9}),
    ("vidtok_noncausal", 8, False, {1: 16, 17: 32}),
    ("vidtok_fsq", 8, False, {2: 5}),
]


LEARNT = [row for row in LEARNT if row[0] in FAMILIES]


@pytest.mark.parametrize(("name", "ratio", "per_frame", "counts"), LEARNT, ids=[row[0] for row in LEARNT])
def test_limits_are_learnt(name: str, ratio: int, per_frame: bool, counts: dict[int, int]) -> None:
    limits = limits_of(FAMILIES[name].build())
    assert (limits.ratio, limits.per_frame) == (ratio, per_frame)
    assert {frames: limits.padded_count(frames) for frames in counts} == counts
    assert limits.fit(min(counts), ratio + 1, 3 * ratio).padded_height == 2 * ratio
    assert limits.fit(min(counts), ratio + 1, 3 * ratio).padded_width == 3 * ratio


@pytest.mark.parametrize("name", ["kl", "tiny", "temporal_decoder", "qwenimage21", "wan22", "ltx095", "vidtok_fsq"])
def test_what_is_learnt_is_true(name: str) -> None:
    """A clip of sizes that the VAE doesn't take comes back in its own sizes."""
    vae = FAMILIES[name].build()
    limits = limits_of(vae)
    frames = np.random.default_rng(0).integers(0, 256, (6, 70, 83, 3), dtype=np.uint8)
    fit = limits.fit(*frames.shape[:3])
    clip = fit.pad(codec.to_tensor(frames, torch.float32, torch.device("cpu")))
    calls: list[str] = []
    with torch.no_grad():
        pieces = codec.encode_pieces(vae, limits, clip.split(1, dim=1), clip.shape[1], lambda: calls.append("encode"))
        latents = codec.joined(limits, pieces)
        expected_calls = codec.decode_calls(vae, limits, latents)
        sample = torch.cat(list(codec.decode_pieces(vae, limits, latents, lambda: calls.append("decode"))), dim=1)
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


def test_a_causal_vae_gets_copies_of_the_first_frame_as_in_its_own_forward() -> None:
    vae = FAMILIES["vidtok"].build()
    limits = limits_of(vae)
    clip = torch.rand(3, 5, 32, 40) * 2 - 1
    with torch.no_grad():
        sample = codec.decode(vae, limits, codec.encode(vae, limits, clip))
        assert torch.equal(sample, vae(clip[None], sample_posterior=False).sample[0])


def small_rae() -> torch.nn.Module:
    """Vision transformers that resize any picture to 64 x 64."""
    return diffusers.AutoencoderRAE(
        encoder_hidden_size=64, encoder_patch_size=16, encoder_num_hidden_layers=1, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32, encoder_input_size=64,
    ).eval()  # fmt: skip


def test_a_vae_of_one_size_says_so_before_the_work() -> None:
    limits = limits_of(small_rae())
    assert limits.fit(2, 64, 64).padded_frames == 2
    with pytest.raises(InputError, match="AutoencoderRAE takes 64x64 only, not 96x80: use --height 64 --width 64"):
        limits.fit(2, 80, 96)


class TestPixels:
    """Which numbers a VAE takes for a picture."""

    def test_every_class_has_been_looked_up(self) -> None:
        assert set(PIXELS) == {family.model for family in FAMILIES.values()} | {"AutoencoderRAE"}

    def test_documentation_agrees(self) -> None:
        """Whose class tells of ImageNet takes no -1 to 1."""
        unusual = {name for name in PIXELS if "imagenet" in (getattr(diffusers, name).__doc__ or "").lower()}
        assert unusual == {name for name, pixels in PIXELS.items() if pixels != SIGNED}

    def test_processors_agree(self) -> None:
        """Whose pipelines don't normalise takes 0 to 1: one class, by its config."""
        unnormalised = re.compile(r"self\.(image|video)_processor = \w+\([^)]*do_normalize=False")
        annotated = re.compile(r"^\s+(?:vae|movq|vqvae): (\w+)", re.MULTILINE)
        found = set()
        for path in Path(diffusers.__file__).parent.glob("*pipelines/**/*.py"):
            text = path.read_text()
            if unnormalised.search(text):
                found |= set(annotated.findall(text))
        assert found == {"VQModel"}
        tokens = diffusers.VQModel(**FAMILIES["vq"].config, lookup_from_codebook=True)
        assert pixels_of(tokens) == UNIT
        assert pixels_of(FAMILIES["vq"].build()) == SIGNED

    @pytest.mark.parametrize("pixels", [UNIT, IMAGENET])
    def test_there_and_back(self, pixels: Pixels) -> None:
        levels = torch.linspace(0, 255, 3 * 2 * 4 * 5).reshape(3, 2, 4, 5).double()
        signed = levels / 127.5 - 1
        mean, std = (torch.tensor(value)[:, None, None, None].double() for value in (pixels.mean, pixels.std))
        assert torch.allclose(pixels.from_signed(signed), (levels / 255 - mean) / std, atol=1e-6)
        assert torch.allclose(pixels.to_signed(pixels.from_signed(signed)), signed, atol=1e-6)
        assert pixels.from_signed(signed.bfloat16()).dtype == torch.bfloat16
        assert SIGNED.from_signed(signed) is signed

    def test_both_halves_go_by_it(self) -> None:
        vae = small_rae()
        limits = limits_of(vae)
        clip = torch.rand(3, 1, 64, 64) * 2 - 1
        with torch.no_grad():
            latents = codec.encode(vae, limits, clip)
            assert torch.equal(latents, vae.encode((clip[:, 0][None] + 1) / 2).latent)
            assert torch.equal(codec.decode(vae, limits, latents)[:, 0], vae.decode(latents).sample[0] * 2 - 1)

    def test_an_unknown_class_is_refused_by_name(self) -> None:
        class AutoencoderOfTomorrow(torch.nn.Module):
            config: ClassVar[dict[str, int]] = {}

        assert pixels_of(AutoencoderOfTomorrow()) is None
        limits = replace(limits_of(FAMILIES["kl"].build()), name="AutoencoderOfTomorrow", pixels=None)
        for call in (codec.encode, codec.decode):
            with pytest.raises(InputError, match="not known which numbers AutoencoderOfTomorrow takes"):
                call(None, limits, torch.zeros(3, 1, 8, 8))


def test_a_vae_that_takes_no_clips_is_one_line() -> None:
    with pytest.raises(InputError, match="can't decode what it encodes") as caught:
        limits_of(FAMILIES["consistency"].build())
    assert "\n" not in str(caught.value)


def test_tiles_that_have_to_cover_the_clip() -> None:
    """Of a VAE that has no other way, and whose decode gives frames before channels."""
    vae = FAMILIES["allegro_tiled"].build()
    limits = limits_of(vae)
    fit = limits.fit(9, 10, 41)
    assert (fit.padded_frames, fit.padded_height, fit.padded_width) == (16, 24, 56)
    clip = torch.rand(3, 8, 24, 40) * 2 - 1
    with torch.no_grad():
        latents = codec.encode(vae, limits, clip)
        assert torch.equal(codec.decode(vae, limits, latents), vae.decode(latents).sample[0].transpose(0, 1))


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

    limits = Limits(
        name="Some", has_frame_dim=True, per_frame=False, channels=3, latent_channels=4, ratio=8, padded_count=none
    )
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
    pieces = [FIT.crop_piece(padded[:, at : at + 1], at) for at in range(5)]
    assert torch.equal(torch.cat(pieces, 1), clip)


def test_frames_are_padded_one_by_one() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    cpu = torch.device("cpu")
    pieces = list(codec.padded(frames, FIT, torch.float32, cpu))
    assert len(pieces) == 5
    assert torch.equal(torch.cat(pieces, 1), FIT.pad(codec.to_tensor(frames, torch.float32, cpu)))


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


def test_limits_of_a_vae_whose_halves_are_wrapped_by_now() -> None:
    """A server learns new frame counts while its pipeline's VAE is parallelized, and watched for its report."""
    vae = FAMILIES["wan21"].build()
    limits = limits_of(vae)
    with halovae.optimize(vae):
        inner = vae.encode
        vae.encode = wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
        try:
            assert limits.padded_count(10) == 13
            assert limits_of(vae).padded_count(6) == 9
        finally:
            vae.encode = inner
