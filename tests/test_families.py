"""The table of tiny autoencoders is fit for use: complete, live, deterministic, of the shapes it states."""

import re
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.models import autoencoders
from families import FAMILIES, OUT_OF_SCOPE, Family, run_decode, run_encode

Run = Callable[[torch.Tensor], torch.Tensor]

HALVES = [
    pytest.param(family, half, id=f"{family.name}-{half}")
    for family in FAMILIES.values()
    for half in ("encode", "decode")
    if getattr(family, half)
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _half(family: Family, half: str) -> tuple[Run, torch.Tensor]:
    vae = family.build()
    if half == "encode":
        return lambda sample: run_encode(vae, sample), family.sample()
    return lambda latent: run_decode(family, vae, latent), family.latent()


def _assert_shape(family: Family, half: str, y: torch.Tensor):
    sample, latent, time = family.sample_shape, family.latent_shape, family.ratio[1]
    assert y.shape[0] == sample[0]
    if half == "encode":
        assert y.shape[2:] == latent[2:]
        return
    assert y.shape[-2:] == sample[-2:]
    if len(sample) == 5:
        frames = y[0].numel() // (sample[1] * sample[3] * sample[4])
        assert frames in (sample[2], (latent[2] - 1) * time + 1)


def test_every_class_has_a_row_or_a_reason():
    """Also one that a new version of diffusers brings, by its place or by its name."""
    known = {family.model for family in FAMILIES.values()} | OUT_OF_SCOPE.keys()
    classes = {name for name, value in vars(autoencoders).items() if isinstance(value, type)}
    named = {name for name in dir(diffusers) if re.search(r"Autoencoder|VAE(?!Image)|VQModel|DecoderModel$", name)}
    named = {name for name in named if not re.search(r"Pipeline|Blocks|Step", name)}
    assert classes | named == known, "give it a row in the table of families.py, or a reason in OUT_OF_SCOPE"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_shapes_follow_the_ratio(family: Family):
    (*_, height, width), (*_, rows, columns) = family.sample_shape, family.latent_shape
    space, time = family.ratio
    assert (height, width) == (rows * space, columns * space)
    assert rows >= 4
    assert columns >= 6
    assert rows != columns
    if len(family.sample_shape) == 5:
        assert (family.latent_shape[2] - 2) * time < family.sample_shape[2] <= family.latent_shape[2] * time


@pytest.mark.parametrize(("family", "half"), HALVES)
def test_half_is_live(family: Family, half: str):
    run, x = _half(family, half)
    y = run(x)
    _assert_shape(family, half, y)
    assert y.isfinite().all()
    assert y.std() > 0.05
    assert torch.equal(run(x), y), "a second call gives another result"

    corner = x.clone()
    corner[..., -1, -1] = 3 - corner[..., -1, -1]
    assert not torch.equal(run(corner), y), "the last pixel makes no difference"


def test_the_seed_makes_a_difference():
    for family in FAMILIES.values():
        pairs = zip(family.build().parameters(), family.build(seed=1).parameters(), strict=True)
        assert not any(torch.equal(one, other) for one, other in pairs), family.name
