"""Calls that are replayed from a recording. Where no device records, one that stands in for it does: `recorder.py`."""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from families import EXACT, FAMILIES, run_half
from pictures import error
from ranks import Ranks
from recorder import Graph, InGraph, Recorder, messages_in_graphs, recorder
from torch import Tensor

import halovae
from halovae.base.errors import InputError, RankFailedError
from halovae.base.options import Options
from halovae.calls import replay as graphs
from halovae.calls.device_graphs import Tape
from halovae.calls.module_facts import ModuleFacts
from halovae.comm import Message, SoloComm, default_device
from halovae.comm.backends import TensorLane
from halovae.predict import memory_check

HALVES = ["encode", "decode"]


def is_real() -> bool:
    return default_device().type != "cpu"


def recording_device() -> AbstractContextManager[Any]:
    return nullcontext() if is_real() else recorder()


@pytest.fixture
def records() -> Iterator[None]:
    with recording_device():
        yield


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two ranks with gloo between them, on one device where there is one."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def placed(name: str, half: str) -> tuple[Any, list[Tensor]]:
    """A VAE, and inputs of one shape."""
    family, device = FAMILIES[name], default_device()
    tensor = (family.sample if half == "encode" else family.latent)(torch.float64).to(device)
    return family.build().to(device, torch.float64), [tensor, tensor.flip(-1), tensor * 0.5, tensor.flip(-2)]


def follow(handle: halovae.Handle, name: str, vae: Any, half: str, tensor: Tensor, expected: Tensor) -> bool:
    """Whether a call that gives what it should was replayed."""
    found = run_half(name, vae, half, tensor)
    assert error(found, expected) <= max(EXACT, getattr(FAMILIES[name], f"{half}_tolerance"))
    assert handle.last is not None
    return handle.last.replayed


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["wan21", "wan22", "kl", "hunyuan_video", "dc", "qwenimage"])
def test_a_third_call_is_replayed(name: str, half: str) -> None:
    vae, tensors = placed(name, half)
    expected = [run_half(name, vae, half, tensor) for tensor in tensors]
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        replayed = [follow(handle, name, vae, half, *pair) for pair in zip(tensors, expected, strict=True)]
    assert replayed == [False, False, True, True]


@pytest.mark.usefixtures("records")
def test_other_sizes_and_weights_are_not_replayed() -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    larger = torch.cat([tensor, tensor], -1)
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:

        def replayed(given: Tensor) -> bool:
            return follow(handle, "kl", vae, "decode", given, by_diffusers(vae, given))

        assert [replayed(tensor) for _ in range(3)] == [False, False, True]
        assert not replayed(larger)
        assert replayed(tensor)
        assert [replayed(larger), replayed(larger), replayed(tensor)] == [False, True, True]
        with torch.no_grad():
            vae.decoder.conv_in.weight.mul_(1.5)
        assert replayed(tensor)  # Weights are read anew each time.
        vae.decoder.conv_in.weight = torch.nn.Parameter(vae.decoder.conv_in.weight * 0.5)
        assert not replayed(tensor)


@pytest.mark.usefixtures("records")
def test_what_a_first_call_leaves_in_the_vae_is_no_other_kind_of_call() -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    run, found = vae._decode, list[bool]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        vae.calls_began = True
        return run(*args, **kwargs)

    vae._decode = counted
    with torch.no_grad(), halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        for _ in range(3):
            vae.decode(tensor)
            assert handle.last is not None
            found.append(handle.last.replayed)
    assert found == [False, False, True]


class Asks(torch.nn.Module):
    """A decoder that can't be replayed: it asks for a value."""

    def decode(self, z: Tensor) -> Tensor:
        return z * z.sum().item()


@pytest.mark.usefixtures("records")
def test_kinds_of_calls_that_do_not_come_again_are_forgotten() -> None:
    vae: Any = Asks()
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        for width in range(2, graphs._SEEN + 6):
            for _ in range(2):
                vae.decode(torch.ones(1, 4, 2, width, device=default_device()))
        kept: Any = handle._engine.graphs  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        assert all(0 < len(keys) <= graphs._SEEN + 1 for keys in (kept._seen, kept._refused, kept._used))


@pytest.mark.usefixtures("records")
def test_recordings_give_their_memory_to_a_call_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    expected = by_diffusers(vae, tensor)
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        assert [follow(handle, "kl", vae, "decode", tensor, expected) for _ in range(3)] == [False, False, True]
        kept: Any = handle._engine.graphs  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        monkeypatch.setattr(graphs.Graphs, "kept", property(lambda self: len(self._recordings)))
        monkeypatch.setattr(memory_check, "free_bytes", lambda _: 2**40 * (not kept.kept))
        larger = torch.cat([tensor, tensor], -1)
        assert not follow(handle, "kl", vae, "decode", larger, by_diffusers(vae, larger))
        assert not kept.kept


@torch.no_grad()
def by_diffusers(vae: Any, latent: Tensor) -> Tensor:
    """A decode by diffusers' own code, on a copy of the VAE."""
    plain = FAMILIES["kl"].build().to(latent.device, latent.dtype)
    plain.load_state_dict(vae.state_dict())
    return run_half("kl", plain, "decode", latent)


@pytest.mark.usefixtures("records")
def test_what_asks_the_device_goes_on_as_before() -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    expected = run_half("kl", vae, "decode", tensor)
    vae.decoder.register_forward_pre_hook(lambda _, args: print(end=str(args[0].sum().item())[:0]))
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        assert not any(follow(handle, "kl", vae, "decode", tensor, expected) for _ in range(4))
    torch.get_device_module(tensor.device).empty_cache()  # The device is in order after a recording that failed.
    assert torch.randn(3, device=tensor.device).isfinite().all()


@pytest.mark.usefixtures("records")
def test_a_call_that_writes_into_its_argument_is_not_replayed() -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    own, expected = vae.decode, run_half("kl", vae, "decode", tensor / 2)
    vae.decode = lambda z, **options: own(z.div_(2), **options)
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        for _ in range(4):
            given = tensor.clone()
            assert not follow(handle, "kl", vae, "decode", given, expected)
            assert torch.equal(given, tensor / 2)


@pytest.mark.usefixtures("records")
def test_what_torch_is_set_to_counts() -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    expected = run_half("kl", vae, "decode", tensor)
    with halovae.optimize(vae, options=halovae.Options(graphs=True)) as handle:
        assert [follow(handle, "kl", vae, "decode", tensor, expected) for _ in range(3)] == [False, False, True]
        with torch.inference_mode():
            again = [follow(handle, "kl", vae, "decode", tensor, expected) for _ in range(3)]
        assert again == [False, False, True]


def on_shards(rank: int, name: str, half: str, axis: Any) -> None:
    vae, tensors = placed(name, half)
    expected = [run_half(name, vae, half, tensor) for tensor in tensors]
    options = halovae.Options(graphs=True)
    with recording_device(), halovae.parallelize(vae, axis=axis, verify=False, options=options) as handle:
        replayed, messages = list[bool](), set[int]()
        for pair in zip(tensors, expected, strict=True):
            replayed.append(follow(handle, name, vae, half, *pair))
            assert handle.last is not None
            messages.add(handle.last.messages if replayed[-1] or len(replayed) == 1 else 0)
    assert replayed == [False, False, True, True]
    assert len(messages - {0}) == 1, "a replay sends what the first call sent"


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("axis", "name"), [("height", "wan21"), ("height", "kl"), ("width", "kl")])
def test_two_ranks_of_one_device(pair: Ranks, name: str, half: str, axis: str) -> None:
    pair.run(on_shards, name, half, axis)


@torch.no_grad()
def streamed(rank: int, in_graphs: bool = False) -> None:
    """A stream in pieces, thrice and more, one of them left early; then a whole call, which is of another kind."""
    vae, (latent, *_) = placed("wan21", "decode")
    expected = run_half("wan21", vae, "decode", latent)
    options, replayed = halovae.Options(graphs=True), list[bool]()
    with (
        recording_device() as device,
        messages_in_graphs(device) if in_graphs else nullcontext(),
        halovae.parallelize(vae, verify=False, options=options) as handle,
    ):
        for is_left_early in (False, False, False, True, False):
            with handle.decode_stream(latent.clone()) as stream:
                pieces = [next(stream)] if is_left_early else list(stream)
            assert len(pieces) > 1 or is_left_early
            found = torch.cat(pieces, 2)
            assert error(found, expected[:, :, : found.shape[2]]) <= EXACT
            assert handle.last is not None
            replayed.append(handle.last.replayed)
        assert not follow(handle, "wan21", vae, "decode", latent, expected)
    assert replayed == [False, False, True, True, True]


@pytest.mark.usefixtures("records")
def test_a_stream_is_replayed_piece_by_piece(pair: Ranks) -> None:
    streamed(0)
    pair.run(streamed)
    if not is_real():
        pair.run(streamed, True)


def in_one_graph(rank: int) -> None:
    """Messages as part of the graph: told, counted, void after a failure; where a rank can't, all post by the host."""
    vae, (tensor, *_) = placed("kl", "decode")
    expected, options = run_half("kl", vae, "decode", tensor), halovae.Options(graphs=True, alone=False)
    with recorder() as device, messages_in_graphs(device):
        with halovae.parallelize(vae, verify=False, options=options) as handle:

            def replayed() -> str:
                follow(handle, "kl", vae, "decode", tensor, expected)
                assert handle.last is not None
                return handle.last.recording

            def launches() -> int:
                return sum(entry[0] == "graph" for entry in device.log)

            replayed()
            sent = handle.last and (handle.last.messages, handle.last.bytes)
            assert not replayed()
            before, words = launches(), replayed()
            assert launches() == before + 1
            assert re.fullmatch(r"1 graph with \d+ exchanges inside", words)
            assert handle.last is not None
            assert (handle.last.messages, handle.last.bytes) == sent, "a replay sends what the first call sent"
            assert f"replayed: {words}" in str(handle.last)

            broken = patch.object(Graph, "replay", side_effect=OSError("no power")) if rank else nullcontext()
            started = time.monotonic()
            with broken, pytest.raises(OSError if rank else RankFailedError, match="no power"):
                replayed()
            assert time.monotonic() - started < 5, "what waits in a graph is woken"
            assert [bool(replayed()) for _ in range(3)] == [False, False, True]

        unable = patch.object(InGraph, "__init__", side_effect=RuntimeError("not in a graph"))
        with unable if rank else nullcontext(), halovae.parallelize(vae, verify=False, options=options) as handle:
            assert not replayed()
            assert not replayed()
            assert re.fullmatch(r"\d+ graphs with \d+ exchanges between them \(rank 1: not in a graph\)", replayed())


@pytest.mark.skipif(is_real(), reason="an accelerator's messages are in its graphs by themselves, or can't be")
def test_messages_are_part_of_the_graph(pair: Ranks) -> None:
    pair.run(in_one_graph)


def on_cpu(rank: int) -> None:
    family = FAMILIES["kl"]
    vae, latent = family.build().double(), family.latent(torch.float64)
    expected = run_half("kl", vae, "decode", latent)
    with halovae.parallelize(vae, options=halovae.Options(graphs=True)) as handle:
        assert not any(follow(handle, "kl", vae, "decode", latent, expected) for _ in range(3))


def test_nothing_changes_where_nothing_records(pair: Ranks) -> None:
    pair.run(on_cpu)


@pytest.mark.usefixtures("records")
def test_without_being_asked_for_what_pays_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, (tensor, *_) = placed("kl", "decode")
    expected = run_half("kl", vae, "decode", tensor)

    def replayed() -> list[bool]:
        with halovae.optimize(vae) as handle:
            found = [follow(handle, "kl", vae, "decode", tensor, expected) for _ in range(4)]
            assert handle.last is not None
            if is_real():  # Of a CPU's memory only the process's peak is known.
                assert (handle.last.kept_memory > 0) == found[-1]
        return found

    monkeypatch.setattr(graphs, "_GAIN", 1e9)
    assert replayed() == [False, False, True, True]
    monkeypatch.setattr(graphs, "_GAIN", 0.0)
    assert not any(replayed())
    monkeypatch.setattr(graphs, "_GAIN", 1e9)
    if is_real():
        monkeypatch.setattr(graphs, "_FREE_SHARE", 1e18)
        assert not any(replayed())
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "_GAIN", 1e9)
    seen: list[int] = []
    vae.decoder.mid_block.register_forward_hook(lambda *_: seen.append(1))
    assert not any(replayed())
    assert len(seen) == 4


def test_graphs_is_yes_or_no_or_auto() -> None:
    with pytest.raises(InputError, match="graphs is 1: give True, False or 'auto'"):
        Options(graphs=1)  # pyright: ignore[reportArgumentType]


def test_whatever_a_replay_takes_for_unchanged_is_looked_at() -> None:
    """All but values of tensors in their place, which a replay reads anew."""
    vae = FAMILIES["kl"].build()
    conv: Any = vae.decoder.conv_in
    conv.mean = torch.zeros(3)
    facts, places = ModuleFacts(vae), set[Any]()
    before = facts.reading()
    conv.weight.add_(1)
    assert facts.reading() == before == ModuleFacts(vae).reading()
    for change in (
        lambda: setattr(conv, "mean", torch.ones(3)),
        lambda: setattr(conv, "scale", 0.5),
        lambda: setattr(vae.decoder.conv_out, "scale", 0.5),
        lambda: setattr(vae.decoder.conv_out, "scale", 0.25),
        lambda: setattr(conv.weight, "data", conv.weight.data.transpose(2, 3)),
        lambda: setattr(conv.weight, "data", conv.weight.data.clone()),
        lambda: setattr(vae.decoder.conv_out, "weight", torch.nn.Parameter(vae.decoder.conv_out.weight.clone())),
        lambda: vae.decoder.conv_norm_out.register_buffer("offset", torch.zeros(3)),
        lambda: setattr(vae.decoder, "conv_in", torch.nn.Identity()),
        lambda: setattr(vae.decoder.up_blocks, "0", torch.nn.Identity()),
    ):
        places.add(facts.reading())
        change()
        assert facts.reading() not in places
        assert facts.reading() == ModuleFacts(vae).reading()


# ---- the tape by itself ----------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


class Echo(SoloComm):
    """A group whose other rank sends 100 more than it gets, when it is waited for."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.size, self.log = 2, log

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        self.post(sends, receives).wait()

    def post(self, sends: Sequence[Message], receives: Sequence[Message], bulk: bool = False) -> Any:
        self.log.append(("post",))
        return Answer(self.log, [(place, sent + 100) for (_, sent), (_, place) in zip(sends, receives, strict=True)])


class Answer:
    def __init__(self, log: list[tuple[Any, ...]], values: list[tuple[Tensor, Tensor]]) -> None:
        self._log, self._values = log, values

    def wait(self) -> None:
        self._log.append(("arrived",))
        for place, value in self._values:
            place.copy_(value)


def test_a_tape_keeps_the_order_of_kernels_messages_and_waits() -> None:
    x, buffer = torch.arange(4.0), torch.zeros(4)
    with recorder() as device:
        tape = Tape(Echo(device.log), CPU)
        with tape.recording():
            y = x + 1
            pending = tape.post([(1, y)], [(1, buffer)])
            z = y * 2
            pending.wait()
            w = z + buffer
            pending.wait()  # Once more does nothing.
            tape.exchange([(1, w)], [(1, buffer)])
            w = w - buffer
        assert device.log == [], "something was done"
        assert z.isnan().all()
        for values in (x.clone(), x + 5):
            device.log.clear()
            x.copy_(values)
            with tape.turn():
                tape.replay()
            assert torch.equal(z, 2 * (values + 1))
            assert torch.equal(w, torch.full((4,), -100.0))
            graphs = [("graph", number) for number in range(1, 5)]
            messages = [("post",), ("arrived",)]
            assert [entry for entry in device.log if entry[0] not in ("wait", "record")] == [
                graphs[0], messages[0], graphs[1], messages[1], graphs[2], *messages, graphs[3]
            ]  # fmt: skip
            # Who replays next, on whatever stream, waits for this one.
            assert device.log[0][:2] == ("wait", "default")
            assert device.log[-1] == ("record", "default")
        assert device.log[0] == ("wait", "default", "default")


class EchoLane(TensorLane):
    """The same group where its messages may be part of a graph."""

    def __init__(self, device: Recorder) -> None:
        super().__init__()
        self._device, self._comm = device, Echo(device.log)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> list[Any]:
        assert self._device.capturing is not None
        return [InGraph(self._device.capturing, lambda: [self._comm.post(sends, receives)])]

    def _break(self) -> None:
        self._device.log.append(("broken",))


def test_a_tape_with_messages_in_its_graph_is_one_launch_until_the_lane_is_broken() -> None:
    x, buffer, late = torch.arange(4.0), torch.zeros(4), torch.zeros(4)
    with recorder() as device:
        lane = EchoLane(device)
        tape = Tape(Echo(device.log), CPU, lane)
        with tape.recording():
            y = x + 1
            pending = tape.post([(1, y)], [(1, buffer)])
            z = y * 2
            pending.wait()
            pending.wait()
            w = z + buffer
            tape.exchange([(1, w)], [(1, buffer)])
            tape.exchange([], [])
            tape.post([(1, w)], [(1, late)])
        assert (device.log, tape.graphs, tape.exchanges) == ([], 1, 3)
        for values in (x.clone(), x + 5):
            device.log.clear()
            x.copy_(values)
            tape.replay()
            assert torch.equal(z, 2 * (values + 1))
            assert torch.equal(w, z + values + 101)
            assert torch.equal(buffer, w + 100)
            assert torch.equal(late, w + 100), "what nobody waits for is waited for at the end"
            assert device.log == [("graph", 1), *[("post",), ("arrived",)] * 3]
        lane.abort()
        device.log.clear()
        with pytest.raises(RuntimeError, match="without a preceding capture"):
            tape.replay()
        assert device.log == []
        with pytest.raises(RuntimeError, match="the lane is broken"), Tape(Echo(device.log), CPU, lane).recording():
            pass
        lane = EchoLane(device)
        refused = Tape(Echo(device.log), CPU, lane)
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), refused.recording():
            device.synchronize(refused.post([(1, x + 1)], [(1, buffer)]))
        lane.abort()  # Nobody holds it.


def test_messages_keep_their_memory_until_they_have_arrived_and_no_longer() -> None:
    sent, buffer, late = torch.ones(4), torch.zeros(4), torch.zeros(4)
    seen = [weakref.ref(tensor) for tensor in (sent, buffer, late)]
    with recorder() as device:
        tape = Tape(Echo(device.log), CPU)
        with tape.recording():
            first = tape.post([(1, sent)], [(1, buffer)])
            tape.post([(1, sent)], [(1, late)])
            kept = sent
            del sent, buffer, late
            gc.collect()
            assert all(ref() is not None for ref in seen)
            first.wait()
            del first
            gc.collect()
            assert seen[1]() is None
            assert seen[2]() is not None, "nobody has waited for it yet"
        del kept
        gc.collect()
        assert [ref() for ref in seen] == [None] * 3, "the tape owns what it only points at"


def test_what_nobody_waits_for_is_waited_for_at_the_end() -> None:
    sent, buffer = torch.ones(4), torch.zeros(4)
    with recorder() as device:
        tape = Tape(Echo(device.log), CPU)
        with tape.recording():
            tape.post([(1, sent)], [(1, buffer)])
        tape.replay()
        assert ("arrived",) in device.log
        assert torch.equal(buffer, sent + 100)


def test_a_tape_refuses_what_needs_an_answer_and_leaves_the_device_in_order() -> None:
    x = torch.ones(4)
    with recorder() as device:
        for ask in (lambda: (x + 1).sum().item(), lambda: bool(x[0] > 0), device.synchronize):
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), Tape(
                Echo(device.log), CPU
            ).recording():  # fmt: skip
                ask()
            assert device.capturing is None
        tape = Tape(Echo(device.log), CPU)
        with pytest.raises(RuntimeError, match="can't be recorded"), tape.recording():
            tape.all_gather_object(None)
        tape = Tape(Echo(device.log), CPU)
        with tape.recording():
            y = x * 3
        tape.replay()
        assert torch.equal(y, x * 3)
