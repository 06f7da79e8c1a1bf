"""What goes into a call and what comes out of it: containers of any kind, arguments that are written, one frame."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import torch
from families import EXACT, FAMILIES, run_decode, run_encode
from pictures import error, kl, latents, raises
from ranks import Ranks
from test_trees import Frozen, FrozenSlots, Slots, Strict
from torch import Tensor, nn

import halovae
from halovae.base.errors import HalovaeError, TilingError
from halovae.base.trees import tensors_in


class Net(nn.Module):
    """A small VAE whose decode is what a test says."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.decoder = nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False).double()
        self.run = run

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.decoder, *args, **kwargs)


PACKS: dict[str, Any] = {
    "frozen": Frozen, "frozen slots": FrozenSlots, "slots": Slots, "deque": lambda s: collections.deque([s], 3),
    "OrderedDict": lambda s: collections.OrderedDict(s=s), "dict subclass": lambda s: collections.Counter(sample=s),
    "beside": lambda s: (s, Slots(2 * s), {"more": collections.defaultdict(list, s=[3 * s])}),
    "with what is whole": lambda s: [s, s.mean((2, 3)), torch.arange(s.shape[3]), s.shape[2]],
}  # fmt: skip


def results(rank: int) -> None:
    z = latents(batch=1)
    for name, pack in PACKS.items():
        vae = Net(lambda net, z, pack=pack: pack(net(z)))
        expected = vae.decode(z)
        with halovae.parallelize(vae, halves=["decode"], size=2):
            found = vae.decode(z)
        assert type(found) is type(expected), name
        for one, other in zip(tensors_in(found), tensors_in(expected), strict=True):
            assert error(one, other) <= EXACT, name
    vae = Net(lambda net, z: Strict(sample=net(z)))
    with halovae.parallelize(vae, halves=["decode"]):
        assert error(tensors_in(vae.decode(z))[0], vae.run(vae.decoder, z)["sample"]) <= EXACT
    with halovae.parallelize(vae, halves=["decode"], size=2), raises(HalovaeError, "a Strict can't be sent to ranks"):
        vae.decode(z)
    vae = Net(lambda net, z: (y := net(z), (frame for frame in y)))
    with halovae.parallelize(vae, halves=["decode"], verify=False), raises(HalovaeError, "holds a generator"):
        vae.decode(z)


def test_results_in_containers_of_any_kind(three_ranks: Ranks) -> None:
    three_ranks.run(results)


def scaled(net: Any, z: Tensor) -> Tensor:
    z.div_(2)
    torch.nn.functional.relu(z[:, :2], inplace=True)
    return net(z)


def streamed(net: Any, z: Tensor, caches: list[Tensor]) -> Tensor:
    caches[0] = z
    return net(z)


CALLS: dict[str, Any] = {
    "a list of pictures": lambda z: ([z, 2 * z], lambda net, zs: torch.cat([net(x) for x in zs])),
    "pictures at any depth": lambda z: (
        {"inputs": SimpleNamespace(z=(z,), scale=torch.ones(1, 4, 1, 1, dtype=z.dtype) * 3)},
        lambda net, given: net(given["inputs"].z[0] * given["inputs"].scale),
    ),
    "scaled in place": lambda z: (z, scaled),
    "statistics in place": lambda z: (
        [z, torch.zeros(4, dtype=z.dtype)], lambda net, zs: (zs[1].add_(zs[0].mean((0, 2, 3))), net(zs[0]))[1]
    ),
    "copied from a result": lambda z: (
        [z, torch.zeros(1, 3, *z.shape[2:], dtype=z.dtype)], lambda net, zs: zs[1].copy_(net(zs[0])).sigmoid()
    ),
}  # fmt: skip


def arguments(rank: int) -> None:
    for name, make in CALLS.items():
        for verify, grads in ((True, torch.no_grad), (False, torch.inference_mode)):
            with grads():
                given, run = make(latents(batch=1))
                mine, _ = make(latents(batch=1))
                expected = Net(run).decode(given)
                vae = Net(run)
                with halovae.parallelize(vae, halves=["decode"], size=2, verify=verify, gather="first"):
                    found = vae.decode(mine)
            if rank == 0:
                assert error(found, expected) <= EXACT, name
            for one, other in zip(tensors_in(mine), tensors_in(given), strict=True):
                assert error(one, other) <= EXACT, f"{name}: what was written"
    z, caches = latents(batch=1), [latents(batch=1)]
    vae = Net(streamed)
    with halovae.parallelize(vae, halves=["decode"], verify=False), raises(HalovaeError, "changes a list among its"):
        vae.decode(z, caches)
    assert caches[0].shape == z.shape


def test_arguments_in_containers_and_what_is_written_into_them(three_ranks: Ranks) -> None:
    three_ranks.run(arguments)


def tiles(rank: int) -> None:
    """The method runs twice on each rank, and writes once."""
    vae, z = kl(), latents(batch=1)
    own = type(vae).decode
    vae.enable_tiling()
    vae.decode = lambda z, **options: own(vae, z.div_(2), **options)
    given = z.clone()
    expected = vae.decode(given)[0]
    with halovae.parallelize(vae, mode="tile"):
        mine = z.clone()
        assert torch.equal(vae.decode(mine)[0], expected)
        assert torch.equal(mine, given)
    with halovae.parallelize(vae, mode="tile", gather="first"), raises(TilingError, "writes into its arguments"):
        vae.decode(z)


def test_tiles_write_into_arguments_once(two_ranks: Ranks) -> None:
    two_ranks.run(tiles)


def processors(rank: int) -> None:
    """Attention without the fused function, whole and head by head."""
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    for processor in (AttnProcessor(), SlicedAttnProcessor(1)):
        vae, z = kl(), latents()
        for module in vae.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(processor)
        expected = vae.decode(z)[0]
        with halovae.parallelize(vae):
            assert error(vae.decode(z)[0], expected) <= EXACT


def test_attention_without_the_fused_function(two_ranks: Ranks) -> None:
    two_ranks.run(processors)


def one_frame(rank: int) -> None:
    """A network that packs the frames behind the first one has none of them here."""
    family = FAMILIES["hunyuan_video15"]
    vae = family.build().double()
    x, z = family.sample(torch.float64)[:, :, :1], family.latent(torch.float64)[:, :, :1]
    expected = run_encode(vae, x), run_decode(family, vae, z)
    for axis in ("height", "width"):
        with halovae.parallelize(vae, axis=axis):
            assert error(run_encode(vae, x), expected[0]) <= family.encode_tolerance
            assert error(run_decode(family, vae, z), expected[1]) <= family.decode_tolerance


def test_one_frame_of_a_video(two_ranks: Ranks) -> None:
    two_ranks.run(one_frame)
