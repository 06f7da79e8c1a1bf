"""What a VAE keeps between calls: trials leave no trace in it, failed calls are undone, and streams go on."""

from __future__ import annotations

from collections import OrderedDict, deque
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import EXACT
from pictures import error, raises
from ranks import Ranks
from torch import Tensor, nn

import halovae
from halovae.api import exact_engine
from halovae.base.errors import RankFailedError, TilingError
from halovae.calls import verify
from halovae.calls.record import Recorder
from halovae.calls.state import Snapshot, kept_tensors, unchanged, undone_by_failure, without_hooks


class Store:
    """An object of the VAE's own, with slots."""

    __slots__ = ("frames",)

    def __init__(self) -> None:
        self.frames: dict[str, Tensor] = {}


class Causal(nn.Module):
    """A convolution over this frame and the one before it, which it keeps in one of the ways that there are."""

    def __init__(self, way: str, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.way, self.conv = way, nn.Conv3d(inputs, outputs, (2, 3, 3), (1, stride, stride), padding=(0, 1, 1))
        self._last: Tensor | None = None
        self.items: list[Tensor | None] = [None]
        self.store = Store()
        self.register_buffer("ring", None)

    def clear(self) -> None:
        self._last, self.ring = None, None
        self.items[0] = None
        self.store.frames.clear()

    def before(self, x: Tensor) -> Tensor:
        kept = {
            "attribute": self._last,
            "list": self.items[0],
            "object": self.store.frames.get("last"),
            "buffer": self.ring,
        }
        last = kept[self.way]
        return torch.zeros_like(x[:, :, :1]) if last is None else last

    def keep(self, x: Tensor) -> None:
        last = x[:, :, -1:].clone()
        if self.way == "attribute":
            self._last = last
        elif self.way == "list":
            self.items[0] = last
        elif self.way == "object":
            self.store.frames["last"] = last
        elif self.ring is None:
            self.ring = last
        else:
            self.ring.copy_(last)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.before(x), x], 2)
        self.keep(x)
        return self.conv(joined)


WAYS = ["attribute", "list", "object", "buffer"]


class Stream(nn.Module):
    """A VAE that goes on where the call before it has ended, until it is cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Causal("list", 3, 8, 2), nn.SiLU(), Causal("attribute", 8, 4))
        layers = [Causal(way, 4 if way == WAYS[0] else 8, 8) for way in WAYS]
        self.decoder = nn.Sequential(*layers, nn.Upsample(scale_factor=(1, 2, 2)), nn.Conv3d(8, 3, 1))
        self.use_tiling = False
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        self.eval().requires_grad_(False).double()

    def clear(self) -> None:
        for module in self.modules():
            if isinstance(module, Causal):
                module.clear()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.decoder(frame) for frame in z.split(1, 2)], 2)


def chunks(channels: int, height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, channels, 4, height, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def streamed(vae: Any, clip: list[Tensor], latents: list[Tensor]) -> list[Tensor]:
    vae.clear()
    return [vae.encode(part) for part in clip] + [vae.decode(part) for part in latents]


class Boom(Exception):
    pass


def stream(rank: int) -> None:
    vae, clip, latents = Stream(), chunks(3, 24, 32), chunks(4, 12, 16)
    expected = streamed(vae, clip, latents)
    vae.clear()
    for options in ({}, {"verify": False}, {"options": halovae.Options(frames_per_call=2)}):
        with halovae.parallelize(vae, axis="height", **options) as handle:
            found = streamed(vae, clip, latents)
            assert max(map(error, found, expected)) <= EXACT, options
            assert handle.last is not None
            assert not handle.last.steps
            # Again, with a failure of the other rank in the midst of the second chunk, which is then made again.
            vae.clear()
            assert error(vae.decode(latents[0]), expected[3]) <= EXACT
            broken = nullcontext() if rank else patch.object(nn.Upsample, "forward", side_effect=Boom)
            with broken, pytest.raises(RankFailedError if rank else Boom):
                vae.decode(latents[1])
            assert error(vae.decode(latents[1]), expected[4]) <= EXACT, options
            # A latent that is written into after the call is not what the next chunk goes on with.
            scratch = latents[2].clone()
            vae.clear()
            vae.decode(scratch)
            scratch.zero_()
            vae.clear()
    with halovae.parallelize(vae, mode="tile"), raises(TilingError, "goes on with what the call before has left"):
        vae.decode(latents[0])
    assert not kept_tensors(vae)
    vae.decode(latents[0])
    with halovae.parallelize(vae, axis="width"), raises(halovae.HalovaeError, "clear its caches first"):
        vae.decode(latents[1])


def test_a_stream_goes_on_from_call_to_call(two_ranks: Ranks) -> None:
    two_ranks.run(stream)


def test_a_stream_on_one_rank_does_not_read_what_the_caller_has_changed() -> None:
    vae, latents = Stream(), chunks(4, 12, 16)
    expected = [vae.decode(part) for part in latents]
    vae.clear()
    with halovae.optimize(vae):
        for part, whole in zip(latents, expected, strict=True):
            scratch = part.clone()
            found = vae.decode(scratch)
            scratch.fill_(7)
            assert error(found, whole) <= EXACT


def test_recordings_leave_no_trace() -> None:
    vae, latents = Stream(), chunks(4, 12, 16)
    vae.decode(latents[0])
    kept = kept_tensors(vae)
    recording = Recorder(vae, "decode", vae.decode).record((latents[1],), {})
    assert recording.keeps
    assert len(recording.calls) == 4
    assert list(map(id, kept_tensors(vae))) == list(map(id, kept))
    assert not any(tensor.is_meta for tensor in kept)


class Keeper(nn.Module):
    """Everything that can be kept, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self._hidden, self.run = 1, torch.zeros(2), len
        self.items: list[Any] = [torch.zeros(2), {"deep": [1]}]
        self.table: dict[str, Any] = OrderedDict(one=1)
        self.row: deque[int] = deque([1, 2])
        self.names = {"a"}
        self.store = Store()
        self.register_buffer("counts", torch.zeros(2))

    def change(self, arguments: list[int]) -> None:
        self.number, self.new, self.run = 2, 3, max
        self._hidden.add_(1)
        self.items[0] = torch.ones(2)
        self.items[1]["deep"].append(2)
        self.table["two"] = 2
        self.row.append(3)
        self.names.add("b")
        self.store.frames["x"] = torch.ones(1)
        self.counts.add_(1)
        self.counts = torch.ones(3)
        arguments.append(1)

    def said(self) -> str:
        return repr({name: value for name, value in sorted(vars(self).items()) if not name.startswith("_")}) + repr(
            (self._hidden, self.store.frames, self.counts)
        )


def fail(keeper: Keeper) -> None:
    with undone_by_failure(keeper):
        keeper.change([])
        raise Boom


@pytest.mark.parametrize("inference", [False, True])
def test_everything_is_put_back_but_functions(inference: bool) -> None:
    with torch.inference_mode(inference):
        keeper, arguments = Keeper(), list[int]()
        before, counts = keeper.said(), keeper.counts
        with unchanged(keeper, arguments) as kept:
            keeper.change(arguments)
            assert kept.has_gone_on()
        assert keeper.said().replace("max", "len") == before
        assert keeper.counts is counts
        assert arguments == []
        assert keeper.run is max  # Compilers and libraries put functions in; these are no state.
        with undone_by_failure(keeper, arguments):
            keeper.change(arguments)
        changed = keeper.said()
        with pytest.raises(Boom):
            fail(keeper)
        assert keeper.said() == changed
        assert not Snapshot(keeper).has_gone_on()


# ---- hooks ----------------------------------------------------------------------------------------------------------


def hooks(rank: int) -> None:
    vae, clip, latents = Stream(), chunks(3, 24, 32), chunks(4, 12, 16)
    expected = vae.encode(clip[0]), vae.decode(latents[0])
    vae.clear()
    heard: list[Any] = []
    with patch.object(exact_engine, "verify", wraps=verify.verify) as verified:
        vae.decoder[4].register_forward_hook(lambda *_: heard.append(1))
        with halovae.parallelize(vae):
            vae.decode(latents[0])
            vae.encode(clip[0])
            assert len(heard) == 4  # frames of the call, none of the probe
            assert verified.call_count == 2
            vae.clear()
            vae.decode(latents[0])
            assert verified.call_count == 2
    # A hook that puts weights in place takes part in trials: they fail without it.
    weight = vae.decoder[5].weight.data
    vae.clear()
    vae.decoder[5].weight.data = weight[:, :1]

    def load(module: Any, args: Any) -> None:
        module.weight.data = weight

    def unload(module: Any, args: Any, output: Any) -> None:
        module.weight.data = weight[:, :1]

    vae.decoder[5].register_forward_pre_hook(load)
    vae.decoder[5].register_forward_hook(unload)
    with halovae.parallelize(vae):
        assert error(vae.decode(latents[0]), expected[1]) <= EXACT


def test_hooks_hear_of_calls_and_not_of_trials(two_ranks: Ranks) -> None:
    two_ranks.run(hooks)


def test_hooks_are_as_before() -> None:
    layer = nn.Linear(1, 1)
    handle = layer.register_forward_pre_hook(lambda *_: None)
    with without_hooks(layer):
        assert not layer._forward_pre_hooks
    assert len(layer._forward_pre_hooks) == 1
    handle.remove()
    assert not layer._forward_pre_hooks
