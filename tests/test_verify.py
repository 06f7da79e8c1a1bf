"""The probe, VAEs that are not from diffusers, and other machinery around the network."""

from __future__ import annotations

import functools
from enum import Enum
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import EXACT, FAMILIES
from pictures import error, kl, latents, pixels, raises
from ranks import Ranks
from tiles import CUTS
from torch import Tensor, nn

import halovae
from halovae.base.errors import InputError, NotExactError, TilingError, VerificationError
from halovae.calls import verify
from halovae.calls.target import told


class Sharpen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.roll(x, 1, dims=-2)


class Small(nn.Module):
    """A VAE that is not from diffusers: methods, no config."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, 1, 1))
        up = nn.ConvTranspose2d(4, 8, 4, 2, 1)
        self.decoder = nn.Sequential(up, middle or nn.Identity(), nn.Conv2d(8, 3, 3, 1, 1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        self.eval().requires_grad_(False).double()


class Methods(Small):
    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


def wrong_rule(rank: int) -> None:
    from halovae.exact.layout import layout_of, mark
    from halovae.exact.shard_mode import RULES, rule

    vae = Methods(nn.Sequential(nn.Identity(), Sharpen()))
    text = (
        r"torch\.roll in decoder\.1\.1 \(Sharpen\): no rule says how it acts on shards$"  # It has no tiles to advise.
    )
    with halovae.parallelize(vae, axis="height"), raises(NotExactError, text):
        vae.decode(latents())

    @rule(torch.roll)
    def roll(mesh: Any, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return mark(func(tensor, *args, **kwargs), layout_of(tensor))

    try:
        with halovae.parallelize(vae, axis="height"):
            vae.encode(pixels())
            with raises(VerificationError, r"the first submodule that differs is decoder\.1\.1"):
                vae.decode(latents())
    finally:
        RULES.pop(torch.roll)


def test_a_wrong_rule_is_found_and_its_submodule_named(two_ranks: Ranks) -> None:
    two_ranks.run(wrong_rule)


# ---- refusals that are none of exact mode's --------------------------------------------------------------------------


def not_its_size(rank: int) -> None:
    """Sizes that the VAE itself does not take; the rank that fails first tells the other."""
    vae = FAMILIES["wan22"].build()
    text = "AutoencoderKLWan.encode itself takes no 72 x 64, on one rank either: use 80 x 64$"
    with halovae.parallelize(vae, verify=False), raises(InputError, text):
        vae.encode(torch.zeros(1, 3, 1, 72, 64))
    assert vae.encode(torch.zeros(1, 3, 1, 80, 64))[0].mean.shape[-2:] == (5, 4)


def test_a_size_that_the_vae_does_not_take_is_not_put_down_to_exact_mode(two_ranks: Ranks) -> None:
    two_ranks.run(not_its_size)


class NotImplemented(Methods):
    """It can tile, but not this."""

    def __init__(self) -> None:
        super().__init__()
        self.use_tiling = False

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError("no kernel for this dtype")

    def encode(self, x: Tensor) -> Tensor:
        self.encoder(x)
        raise NotImplementedError("no kernel for this dtype")


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_what_is_not_implemented_is_not_put_down_to_tiles(mode: str) -> None:
    vae = NotImplemented()
    with halovae.parallelize(vae, mode=mode):
        for call in (lambda: vae.decode(latents()), lambda: vae.encode(pixels())):
            with pytest.raises(NotImplementedError, match=r"^no kernel for this dtype$") as caught:
                call()
            assert not isinstance(caught.value, NotExactError)


def test_a_vae_that_runs_in_tiles_alone() -> None:
    """Its tiles are the default, switched on or not; exact mode is refused, and so are sizes that they don't cover."""
    tiled = CUTS["allegro_tiled"]
    vae, z = tiled.build(), tiled.picture("decode")
    expected = vae.decode(z).sample
    vae.use_tiling = False
    with halovae.optimize(vae):
        assert torch.equal(vae.decode(z).sample, expected)
        for uncovered in (z[..., :2], torch.cat([z, z[..., :1]], dim=-1), torch.cat([z, z[:, :, :1]], dim=2)):
            with pytest.raises(
                TilingError, match=r"runs in tiles only, and covers 8 \+ 8 \* n frames and 24 \+ 16 \* n"
            ):
                vae.decode(uncovered)
    with pytest.raises(InputError, match="mode='exact': AutoencoderKLAllegro runs in tiles only"):
        halovae.parallelize(vae, mode="exact")
    text = r"decode refuses to run without spatial tiles.* Use mode='tile'"
    with halovae.optimize(vae, untiled=True), pytest.raises(NotExactError, match=text):
        vae.decode(z)


def overflowing(rank: int) -> None:
    """Noise of variance one is too much for float16 here, and the caller's latents are not; or they are too."""
    for weights, size, caplog in (
        (2e4, 1e-3, ""),
        (3e5, 1.0, "float16 overflows in this VAE, use float32 or bfloat16"),
    ):
        vae = kl(torch.float32)
        vae.decoder.conv_in.weight.data *= weights
        vae, z = vae.half(), latents().half() * size
        expected = vae.decode(z).sample
        with halovae.parallelize(vae), patch.object(verify.LOG, "warning") as warned:
            found = vae.decode(z).sample
        assert torch.equal(found.isnan(), expected.isnan())
        assert verify.distance(found, expected) < 0.05
        assert caplog in str(warned.mock_calls)
        assert bool(expected.isnan().all()) == bool(warned.called) == bool(caplog)


def test_a_vae_that_overflows_gives_what_it_gives(two_ranks: Ranks) -> None:
    two_ranks.run(overflowing)


@pytest.mark.parametrize(
    ("found", "expected", "allowed"),
    [
        ([1.0, nan, inf, -inf], [1.0, nan, inf, -inf], 0.0),
        ([1.0, nan, 0.0], [1.0, 0.0, 0.0], inf),
        ([1.0, inf], [1.0, -inf], inf),
        ([1.0, inf], [1.0, 5.0], inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([3.0, 5.0, nan], [3.0, 4.0, nan], 0.2),
    ],
)
def test_the_distance_of_results_that_are_not_finite(found: Any, expected: Any, allowed: float) -> None:
    assert verify.distance(torch.tensor(found), torch.tensor(expected)) == pytest.approx(allowed)


def test_nothing_but_nan_tells_nothing() -> None:
    assert not verify.is_rounding(torch.full((2,), nan), torch.full((2,), nan))


def test_the_scale_of_what_the_caller_has() -> None:
    tensor = torch.full((1, 2, 4, 4), 3.0)
    tensor[0, 0, 0, 0] = inf
    scales = verify.scales_of(
        (tensor, 5), {"other": [torch.zeros(1, 2, 4, 4), torch.full((1, 1, 2, 2), 7e4).half() / 2]}
    )
    assert scales == pytest.approx([3 * (31 / 32) ** 0.5, 1.0, 1.0])


# ---- what can be parallelized ----------------------------------------------------------------------------------------


def foreign(rank: int) -> None:
    x, z = pixels(), latents(6, 8)
    for vae in (Methods(), Small()):
        encode = vae.encode if isinstance(vae, Methods) else vae.encoder
        decode = vae.decode if isinstance(vae, Methods) else vae.decoder
        expected = encode(x), decode(z)
        with halovae.parallelize(vae, axis="width"):
            found = (vae.encode(x), vae.decode(z)) if isinstance(vae, Methods) else (vae.encoder(x), vae.decoder(z))
        assert max(map(error, found, expected)) <= EXACT
    vae.config = SimpleNamespace(name="not a mapping")
    halovae.parallelize(vae).restore()


def test_vaes_that_are_not_from_diffusers(two_ranks: Ranks) -> None:
    two_ranks.run(foreign)


class Nested(Methods):
    def decode(self, z: Tensor, again: bool = True) -> Tensor:
        return self.decode(2 * z, again=False) if again else self.decoder(z)


def nested(rank: int) -> None:
    vae = Nested()
    expected = vae.decode(latents())
    with halovae.parallelize(vae):
        assert error(vae.decode(latents()), expected) <= EXACT


def test_a_half_that_calls_itself(two_ranks: Ranks) -> None:
    two_ranks.run(nested)


def composing(rank: int) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import apply_group_offloading

    x, z = pixels(), latents()
    vae = kl()
    expected = vae.encode(x)[0].parameters, vae.decode(z)[0]

    def same() -> bool:
        return max(error(vae.encode(x)[0].parameters, expected[0]), error(vae.decode(z)[0], expected[1])) <= EXACT

    with halovae.parallelize(vae):
        with torch.inference_mode():
            assert same()
        assert same()
        vae.to(torch.float32)
        assert vae.decode(z.float())[0].dtype == torch.float32
        vae.to(torch.float64)

    seen: list[nn.Module] = []

    class Seen(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    vae = kl()
    add_hook_to_module(vae, Seen())
    for module in vae.encoder.modules():
        add_hook_to_module(module, Seen())
    with halovae.parallelize(vae):
        assert same()
    assert vae in seen
    remove_hook_from_module(vae, recurse=True)

    vae = kl()
    cpu = torch.device("cpu")
    apply_group_offloading(vae, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with halovae.parallelize(vae):
        assert same()


@pytest.mark.filterwarnings("ignore")
def test_composes_with_offloading_hooks_and_inference_mode(two_ranks: Ranks) -> None:
    two_ranks.run(composing)


class Kind(Enum):
    SMALL = 1


class Unnamed:
    """What repr() gives an address."""


def test_what_ranks_compare_is_the_same_in_every_process() -> None:
    config = {
        "act": nn.functional.silu, "scheduler": Unnamed(), "tasks": {"encode", "decode", "edit"}, "kind": Kind.SMALL,
        "levels": {1: 2, "all": 3}, "device": "cuda:3", "place": torch.device("cpu", 1), "dtype": torch.float16,
        "own": Unnamed, "part": functools.partial(max, 1), "sizes": (1, [2.5, None]), "name": "cuda:3 or so",
    }  # fmt: skip
    words = told(config)
    assert told(dict(reversed(config.items()))) == words
    for part in (
        "'act': torch.nn.functional.silu", "'scheduler': test_verify.Unnamed", "'tasks': {'decode', 'edit', 'encode'}",
        "'levels': {'all': 3, 1: 2}", "'device': 'cuda'", "'place': cpu", "'kind': Kind.SMALL",
        "'dtype': torch.float16", "'own': test_verify.Unnamed",
        "'part': [builtins.max, [1], {}]", "'sizes': [1, [2.5, None]]",
        "'name': 'cuda:3 or so'",
    ):  # fmt: skip
        assert part in words
    assert "0x" not in words


def wrapped(rank: int, folder: str) -> None:
    """Offloaded weights, another default device, a data-parallel wrapper, and weights in parts."""
    from accelerate import cpu_offload, disk_offload
    from torch.distributed.fsdp import fully_shard

    vae, z = kl(), latents()
    expected = vae.decode(z).sample
    with torch.device("meta"), halovae.parallelize(vae, mode="auto"):
        assert error(vae.decode(z).sample, expected) <= EXACT
    for number, offload in enumerate((cpu_offload, lambda vae, **more: disk_offload(vae, f"{folder}/{rank}", **more))):
        vae = kl()
        offload(vae, execution_device=torch.device("cpu"), offload_buffers=True)
        with halovae.parallelize(vae, mode=("auto", "exact")[number]):
            assert error(vae.decode(z).sample, expected) <= EXACT
        assert all(parameter.is_meta for parameter in vae.parameters())
    vae = kl()
    replicas = nn.parallel.DistributedDataParallel(vae.requires_grad_(True))
    vae.requires_grad_(False)
    with halovae.parallelize(replicas):
        assert error(vae.decode(latents()).sample, expected) <= EXACT
    fully_shard(vae.decoder.conv_in)
    for call in (halovae.parallelize, halovae.optimize):
        with raises(InputError, r"in parts on the ranks \(DTensor\).* without FSDP"):
            call(vae)
    assert "decode" not in vars(vae)


@pytest.mark.filterwarnings("ignore")
def test_wrapped_and_offloaded_vaes(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(wrapped, str(tmp_path))


def plain_stack(rank: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, 1, 1)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in network.parameters():
            parameter.data = torch.randn(parameter.shape)
    network, x = network.double().requires_grad_(False), pixels()
    expected = network(x)
    for axis in ("height", "width", (1, 2)):
        with halovae.sharded(axis=axis) as shards:
            shard = shards.scatter(x, ratio=2)
            assert shard.numel() == x.numel()  # a size is the whole picture's
            result = shards.gather({"picture": network(shard)})["picture"]
        assert error(result, expected) <= EXACT
    with raises(InputError, "makes 4 shards but the group has 2 ranks"):
        halovae.sharded(axis=(2, 2))
    with halovae.sharded() as shards, raises(InputError, "too small"):
        shards.scatter(x[..., :2, :])


def test_a_plain_stack_of_modules(two_ranks: Ranks) -> None:
    two_ranks.run(plain_stack)


def test_a_world_of_one_runs_un_parallel() -> None:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae) as handle:
        assert torch.allclose(vae.decode(z)[0], expected, rtol=0, atol=1e-12 * expected.abs().max().item())
        assert handle.last is not None
        assert (handle.last.shape, handle.last.messages) == ((1, 1), 0)
