"""Tiles in one call of the network. A network on a CPU gains little by it, so here the device is said to be another."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from halovae.calls.record import Recorder
from halovae.calls.target import Target
from halovae.comm import SoloComm
from halovae.tiles import batches as batches_module
from halovae.tiles.batches import ALONE, Batches, BatchVerdict
from halovae.tiles.tile_runner import TileRunner


@pytest.fixture
def on_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator gains is given: here it is the numbers that count."""
    monkeypatch.setattr(batches_module, "_by_itself", lambda device: False)
    monkeypatch.setattr(Batches, "_seconds", lambda self, run: (run(), 1.0)[1])


SEEN: list[int] = []
"""How many pictures each call of an `Encoder` got. Not in it: what a network keeps tells its calls apart."""


class Encoder(nn.Module):
    """Looks at each picture of a batch by itself, or, if told so, at all of them."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.convolution, self.mixes = nn.Conv2d(3, 4, 3, padding=1), mixes

    def forward(self, picture: Tensor) -> Tensor:
        SEEN.append(len(picture))
        result = self.convolution(picture)
        return result - result.mean() if self.mixes else result


def run(network: Encoder, tiles: list[Tensor], verdicts: dict[Any, BatchVerdict], **options: Any) -> dict[int, Tensor]:
    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = network

        def encode(self, pictures: Tensor) -> Tensor:
            return torch.cat([self.encoder(picture[None]) for picture in pictures])

    vae = Vae()
    calls = Recorder(vae, "encode", vae.encode).record((torch.stack(tiles),), {}).calls
    SEEN.clear()
    batches = Batches(network, calls, set(range(len(calls))), torch.device("cpu"), verdicts, **options)
    found: dict[int, Tensor] = {}
    for number, tile in enumerate(tiles):
        given = tile[None].clone()
        found |= batches.run(number, (given,), {})
        given.zero_()  # as a VAE may that has one buffer for all tiles
    return found


def tiles(count: int) -> list[Tensor]:
    return list(torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_tiles_of_one_shape_go_together(on_accelerator: None):
    network, verdicts = Encoder().double(), dict[Any, BatchVerdict]()
    with torch.no_grad():
        given = tiles(11)
        found = run(network, given, verdicts)
        assert SEEN == [1] * 4 + [4, 1] * 3 + [7]  # both ways thrice to try it, then all that are left
        more = tiles(30)
        again = run(network, more, verdicts)
        assert SEEN == [8, 16, 6]  # twice as many, as long as that gains
        assert [(verdict.tiles, verdict.fewer) for verdict in verdicts.values()] == [(batches_module.MOST, None)]
        for results, sources in ((found, given), (again, more)):
            for place, tile in enumerate(sources):
                assert torch.allclose(results[place], network(tile[None]), atol=1e-14)


def test_a_batch_that_gains_nothing_takes_no_memory(
    on_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Where it is the kernels that gain, a tile goes by itself."""
    monkeypatch.setattr(Batches, "_seconds_each", lambda self, waiting: 0.5)
    verdicts = dict[Any, BatchVerdict]()
    with torch.no_grad():
        run(Encoder().double(), tiles(11), verdicts)
    assert [(verdict.tiles, verdict.is_fast) for verdict in verdicts.values()] == [(1, True)]
    assert SEEN[-7:] == [1] * 7


def test_more_tiles_than_gain_are_not_tried_twice(on_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many may be slower than few."""
    each = {1: 1.0, 4: 0.5, 8: 0.4, 16: 0.9}
    monkeypatch.setattr(Batches, "_seconds_each", lambda self, waiting: each[len(waiting)])
    monkeypatch.setattr(Batches, "_seconds", lambda self, run: (run(), each[SEEN[-1]] * SEEN[-1])[1])
    verdicts = dict[Any, BatchVerdict]()
    with torch.no_grad():
        run(Encoder().double(), tiles(4 + 8 + 16 + 8 + 8), verdicts)
    assert SEEN[-4:] == [8, 16, 8, 8]


@pytest.mark.parametrize(("mixes", "options"), [(True, {}), (False, {"same_bits": True})])
def test_tiles_by_themselves(mixes: bool, options: dict[str, bool], on_accelerator: None):
    network, verdicts = Encoder(mixes).double(), dict[Any, BatchVerdict]()
    with torch.no_grad():
        given = tiles(9)
        found = run(network, given, verdicts, **options)
        assert all(torch.equal(found[place], network(tile[None])) for place, tile in enumerate(given))
    assert list(verdicts.values()) == [ALONE] * mixes


def test_hooks_see_every_tile(on_accelerator: None):
    network, seen = Encoder().double(), list[int]()
    network.register_forward_hook(lambda module, args, result: seen.append(len(args[0])))
    with torch.no_grad():
        run(network, tiles(6), {})
    assert seen[-6:] == [1] * 6


def test_a_whole_decode(on_accelerator: None):
    vae = FAMILIES["minimax_h3"].build()
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_min_overlap_height = vae.tile_sample_min_overlap_width = 16
    latents = torch.randn(1, 4, 7, 6, 6)
    runner = TileRunner(SoloComm(), Target(vae), ranks=1)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        for _ in range(2):
            outcome = runner.run("decode", (latents,), {})
            # Its norms are in float32 whatever the rest is, and a batch adds up in another order.
            assert torch.allclose(outcome.result.sample, expected, atol=1e-5)
    assert outcome.together.is_fast
