"""Recordings: which calls a VAE makes, what depends on what, and that nothing is left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiles import CUTS
from torch import nn

from halovae.base.errors import TilingError
from halovae.calls import dataflow
from halovae.calls.dataflow import Shapes
from halovae.calls.record import Recorder, Recording, answering
from halovae.tiles.tile_plan import find_chains


def recorded(name: str, half: str) -> tuple[Any, Recording]:
    cut = CUTS[name]
    vae = cut.build()
    vae.use_tiling = True
    picture = cut.picture(half)
    kwargs = cut.family.decode_kwargs(picture) if half == "decode" else {}
    return vae, Recorder(vae, half, getattr(vae, half)).record((picture,), kwargs)


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "magvit", "vidtok"])
def test_caches_of_every_kind_make_chains(name: str) -> None:
    _, recording = recorded(name, "decode")
    chains = find_chains(recording.calls)
    length = len(recording.calls) // 4
    assert length > 1
    assert [chain.calls for chain in chains] == [tuple(range(i, i + length)) for i in range(0, 4 * length, length)]


def test_tiles_in_time_are_apart() -> None:
    _, recording = recorded("hunyuan_video_framewise", "decode")
    assert len(find_chains(recording.calls)) == len(recording.calls) == 8


def test_only_what_the_vae_uses_travels() -> None:
    _, recording = recorded("cogvideox", "decode")
    call = recording.calls[0]
    assert call.used == (0,)
    assert len(call.leaves) > 10, "the caches"


def test_nothing_runs_and_nothing_stays() -> None:
    vae, recording = recorded("magvit", "decode")
    assert recording.result.sample.is_meta
    assert "decoder" not in vars(vae)
    caches = [module.prev_features for module in vae.modules() if hasattr(module, "prev_features")]
    assert caches == [None] * len(caches)


def test_noise_is_noted_and_not_drawn() -> None:
    before = torch.random.get_rng_state()
    _, recording = recorded("ltx091", "decode")
    assert all(call.draws for call in recording.calls)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stand_ins_may_be_nested_and_end_in_any_order() -> None:
    vae = Recurrent()
    own, z = vae.decoder, torch.randn(1, 3, 8, 8)
    for first_ends_first in (False, True):
        first, second = (answering(vae, "decode", lambda z, n=n: n) for n in (1, 2))
        first.__enter__()
        second.__enter__()
        assert vae.decoder(z) == 2
        (first if first_ends_first else second).__exit__(None, None, None)
        assert vae.decoder(z) == (2 if first_ends_first else 1)
        assert vae.decoder.weight is own.weight
        (second if first_ends_first else first).__exit__(None, None, None)
        assert vae.decoder is own
        assert "decoder" not in vars(vae)


class Writing(nn.Module):
    """Scales its latents in place; its network does so as well, or hides its result."""

    def __init__(self, network: str = "") -> None:
        super().__init__()
        self.decoder = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.network = network

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        z.div_(2) if not self.network else None
        if self.network == "writes":
            self.decoder.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
        if self.network == "hides":
            self.decoder.register_forward_hook(lambda module, args, result: SimpleNamespace(sample=result))
        return self.decoder(z[..., :4])


def test_writing_into_arguments_is_noticed() -> None:
    z = torch.randn(1, 3, 8, 8)
    vae, quiet = Writing(), Recurrent()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert Recorder(vae, "decode", vae.decode).record((z,), {}).writes
            assert not Recorder(quiet, "decode", quiet.decoder).record((z,), {}).writes
    for network, reason in (("writes", "writes into the picture"), ("hides", "in a SimpleNamespace")):
        vae = Writing(network)
        with pytest.raises(TilingError, match=reason):
            Recorder(vae, "decode", vae.decode).record((z,), {})


class Recurrent(nn.Module):
    """Gives its network the network's own output, doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(3, 3, 1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(2 * self.decoder(z))


def test_feedback_is_refused() -> None:
    vae = Recurrent()
    with pytest.raises(TilingError, match="network's own output"):
        Recorder(vae, "decode", vae.decode).record((torch.randn(1, 3, 8, 8),), {})


def test_shapes_are_found_once_by_all_recordings_together() -> None:
    recorded("kl", "decode")
    known = len(dataflow._known)
    recorded("kl", "decode")
    assert len(dataflow._known) == known > 0


def test_a_default_dtype_that_changes_is_heard_of() -> None:
    found: list[torch.dtype] = []
    try:
        for dtype in (torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            func, size = torch.ops.aten.zeros.default, {"device": torch.device("meta")}
            found.append(Shapes().run(func, ([2],), size).dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == [torch.float64, torch.float32]
