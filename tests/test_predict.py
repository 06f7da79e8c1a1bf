"""Predictions on shapes alone: what can be counted is counted right, for every family and in every mode."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, run_encode, run_half
from ranks import Ranks
from tiles import CUTS
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import halovae
from halovae.base.errors import InputError, NotExactError, TilingError
from halovae.base.memory import allocated_by
from halovae.calls.record import NETWORKS
from halovae.calls.target import Target
from halovae.comm.bandwidth import LinkSpeed
from halovae.kernels import convolution
from halovae.kernels.lazy import upsampled
from halovae.predict import predictor as predict_module
from halovae.predict import rates
from halovae.predict.predictor import Prediction, Predictor
from halovae.predict.rates import GivenSpeed, MeasuredSpeed, Operation

CPU = torch.device("cpu")
SPEED = GivenSpeed(flops=1e11, bandwidth=1e10)
LINK = LinkSpeed(latency=1e-4, bandwidth=1e9)
NEEDS_VALUES = {("consistency", "decode"), ("ltx2_diffusion", "decode")}
"""The first one's scheduler looks up time steps among the weights; the second one's attention takes no shapes alone."""


@functools.cache
def on_meta(name: str) -> Any:
    """A family's VAE without weights: one for all predictions, which leave it as it was."""
    return CUTS.get(name, FAMILIES[name]).build().to("meta")


def predict(name: str, half: str, mode: str, ranks: int, vae: Any = None, link: LinkSpeed = LINK) -> Prediction:
    return predict_each(name, half, mode, [ranks], vae, link)[0]


def predict_each(
    name: str, half: str, mode: str, counts: Sequence[int] = (1, 2), vae: Any = None, link: LinkSpeed = LINK
) -> list[Prediction]:
    """On each number of ranks."""
    family = FAMILIES[name]
    vae = vae or on_meta(name)
    picture = family.sample() if half == "encode" else family.latent()
    if mode == "tile" and name in CUTS:
        picture = CUTS[name].picture(half)
    kwargs = family.decode_kwargs(picture) if half == "decode" else {}
    predictor = Predictor(Target(vae), SPEED, link)
    if mode == "tile":
        return [predictor.tile(half, (picture,), kwargs, ranks=ranks) for ranks in counts]
    ratio = family.ratio[0] if half == "encode" else 1
    return [predictor.exact(half, (picture,), kwargs, ranks=ranks, ratio=ratio) for ranks in counts]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    for half in ("encode", "decode"):
        if not getattr(FAMILIES[name], half):
            continue
        check_exact(name, half)
        if name in CUTS and getattr(CUTS[name], half):
            check_tiles(name, half)


def check_exact(name: str, half: str) -> None:
    """Less time and memory on more ranks where exact mode takes the VAE; otherwise the same refusal as its own."""
    family = FAMILIES[name]
    if not getattr(family, f"exact_{half}"):
        with pytest.raises(NotExactError):
            predict(name, half, "exact", 2)
    elif (name, half) in NEEDS_VALUES:
        with pytest.raises(InputError, match="can't be followed on shapes alone"):
            predict(name, half, "exact", 1)
    else:
        one, two = predict_each(name, half, "exact")
        assert two.flops < 0.75 * one.flops
        assert two.messages > one.messages == 0
        assert two.exposed > one.exposed == 0
        assert one.memory > 0


def check_tiles(name: str, half: str) -> None:
    one, two = predict_each(name, half, "tile")
    assert two.flops < 0.75 * one.flops
    assert one.cut == two.cut == f"{CUTS[name].chains(half)} tiles"
    assert two.seconds < one.seconds + two.exposed


@pytest.mark.parametrize(("name", "half"), [("vq", "encode"), ("hunyuan_image", "encode")])
def test_tiles_that_cant_be(name: str, half: str) -> None:
    with pytest.raises(TilingError):
        predict(name, half, "tile", 2)


ACCELERATOR = GivenSpeed(flops=1e11, bandwidth=1e10, device=torch.device("cuda"))
"""Nothing runs on it: it says which kernels are meant."""


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("name", ["wan21", "kl", "hunyuan_video"])
def test_kernels_of_accelerators_are_followed(name: str, half: str) -> None:
    """As much arithmetic as by the CPU's kernels, but for upsampled pixels, which ours fold in and it may not."""
    pytest.importorskip("triton")
    family = FAMILIES[name]
    picture = (family.sample() if half == "encode" else family.latent()).bfloat16()
    kwargs = family.decode_kwargs(picture) if half == "decode" else {}
    predictor = Predictor(Target(family.build().to("meta", torch.bfloat16)), ACCELERATOR, LINK)
    found = predictor.exact(half, (picture,), kwargs)
    expected = predict(name, half, "exact", 1)
    assert 0.4 * expected.flops < found.flops < 2.5 * expected.flops
    assert {str(key[0]) for key in predictor._costs._known} >= {"halovae.gpu_chain.default"}


def test_frames_that_go_together_make_fewer_messages() -> None:
    """More in one call of the network: fewer messages, as much arithmetic, more memory."""
    family = FAMILIES["wan21"]
    picture, target = torch.empty(1, 3, 17, 64, 64, device="meta"), Target(family.build().to("meta"))
    each, joined = (
        Predictor(target, SPEED, LINK, frames).exact("encode", (picture,), {}, ranks=2, ratio=8) for frames in (1, 2)
    )
    assert joined.messages < each.messages
    assert joined.flops == each.flops
    assert joined.memory > each.memory


def test_tiles_of_weights_that_are_on_a_device() -> None:
    """What stands for the results of tiles is no constant: it must not meet real weights."""
    family = CUTS["wan21"]
    real = predict("wan21", "encode", "tile", 2, vae=family.build())
    assert real.flops == predict("wan21", "encode", "tile", 2).flops


def packed_flops(picture: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Of the operator with packed weights, which torch's counter doesn't know."""
    return conv_flop_count(picture, weight, out_shape)


@pytest.mark.parametrize("name", ["kl", "wan22", "mochi"])
def test_arithmetic_is_counted_as_torch_counts_it(name: str) -> None:
    family = FAMILIES[name]
    vae = family.build()
    halovae.optimize(vae)
    packed = {torch.ops.mkldnn._convolution_pointwise: packed_flops}
    with FlopCounterMode(display=False, custom_mapping=packed) as counter:
        run_encode(vae, family.sample())
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    found = predict(name, "encode", "exact", 1).flops
    assert counted <= found <= 1.1 * counted  # torch's counter doesn't know the attention of a CPU


def sent(rank: int, name: str, mode: str) -> list[tuple[int, int]]:
    """Messages and bytes of encode and decode on this rank."""
    family = FAMILIES[name]
    vae = CUTS[name].build()
    found: list[tuple[int, int]] = []
    with halovae.parallelize(vae, mode=mode, verify=False) as handle:
        for half in ("encode", "decode"):
            picture = family.sample() if half == "encode" else family.latent()
            if mode == "tile":
                picture = CUTS[name].picture(half)
            run_half(name, vae, half, picture)
            assert handle.last is not None
            found.append((handle.last.messages, handle.last.bytes))
    return found


@pytest.mark.parametrize("mode", ["exact", "tile"])
@pytest.mark.parametrize("name", ["wan21", "kl"])
def test_messages_are_those_that_are_sent(two_ranks: Ranks, name: str, mode: str) -> None:
    for half, ranks in zip(("encode", "decode"), zip(*two_ranks.run(sent, name, mode), strict=True), strict=True):
        found = predict(name, half, mode, 2)
        assert (found.messages, found.bytes) == max(ranks)


@pytest.mark.parametrize("half", ["encode", "decode"])
@pytest.mark.parametrize("name", ["wan21", "wan22", "magvit"])
def test_memory_is_what_is_allocated(name: str, half: str) -> None:
    """By a first call, which packs weights: in networks as small as these they are most of it."""
    family = FAMILIES[name]
    vae = family.build()
    picture = family.sample() if half == "encode" else family.latent()
    with halovae.optimize(vae):
        allocated = allocated_by(functools.partial(run_half, name, vae, half, picture), CPU)
    assert predict(name, half, "exact", 1).memory - picture.nbytes == pytest.approx(allocated, rel=0.08)


def allocated_on_shards(rank: int) -> int:
    vae = FAMILIES["wan21"].build()
    with halovae.parallelize(vae, verify=False):
        return allocated_by(functools.partial(run_half, "wan21", vae, "decode", FAMILIES["wan21"].latent()), CPU)


def test_memory_on_two_ranks(two_ranks: Ranks) -> None:
    """Of decode: an encoder has its compression measured first, by a call of its own."""
    allocated = max(two_ranks.run(allocated_on_shards))
    found = predict("wan21", "decode", "exact", 2).memory - FAMILIES["wan21"].latent().nbytes
    assert found == pytest.approx(allocated, rel=0.1)


@pytest.mark.parametrize("mode", ["exact", "tile"])
def test_real_weights_and_inference_mode_make_no_difference(mode: str) -> None:
    """A scale that is real must not break a chain of functions, nor an operator made of others look like a copy."""
    vae = CUTS["wan22"].build()
    real = predict("wan22", "decode", mode, 1, vae).to_dict()
    with torch.inference_mode():
        assert predict("wan22", "decode", mode, 1, vae).to_dict() == real
    assert predict("wan22", "decode", mode, 1, vae.to("meta")).to_dict() == real


def test_a_slow_link_is_seen() -> None:
    fast, slow = (
        predict("wan21", "decode", "exact", 2, link=LinkSpeed(latency=latency, bandwidth=1e9))
        for latency in (1e-6, 1e-2)
    )
    assert slow.exposed - fast.exposed == pytest.approx(fast.messages * 1e-2, rel=0.3)
    assert slow.seconds - fast.seconds == pytest.approx(slow.exposed - fast.exposed)


def test_arithmetic_of_known_sizes() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Conv2d(3, 64, 3, padding=1)
            self.thin = torch.nn.Conv2d(64, 2, 3, padding=1)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self.thin(self.wide(x))

    vae = Net().requires_grad_(False)
    found = Predictor(Target(vae), SPEED, LINK).exact("encode", (torch.zeros(1, 3, 32, 48),), {})
    assert found.flops == 2 * 9 * 32 * 48 * (3 * 64 + 64 * 2)


def test_pieces_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is worked on piece by piece; on shapes alone one piece stands for those of its size."""
    whole = predict("wan21", "decode", "exact", 1)
    for kernels in (convolution, upsampled):
        monkeypatch.setattr(kernels, "WINDOW_BYTES", 1 << 12)
    pieces = predict("wan21", "decode", "exact", 1)
    assert pieces.flops == pytest.approx(whole.flops, rel=0.5)
    assert pieces.seconds > 1.5 * whole.seconds


@pytest.mark.parametrize(
    ("name", "mode"),
    [("wan21", "exact"), ("wan21", "tile"), ("wan22", "exact"), ("cogvideox", "exact"), ("magvit", "exact")],
)
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_calls_of_one_kind_are_followed_once(name: str, mode: str, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And cost as much as if each of them were: messages, memory and all."""
    family, cut = FAMILIES[name], CUTS.get(name, FAMILIES[name])
    target = Target(cut.build().to("meta"))
    picture = cut.picture(half) if mode == "tile" else family.sample() if half == "encode" else family.latent()
    shape = list(picture.shape)
    shape[2] = 33 if half == "encode" else 9
    shape[-2:] = [size * (4 if mode == "exact" else 1) for size in shape[-2:]]  # weights are kept beside large pictures
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    getattr(target.vae, NETWORKS[half]).register_forward_hook(counted)
    found: list[Prediction] = []
    calls: list[int] = []
    for echoes in (True, False):
        if not echoes:
            monkeypatch.setattr(predict_module, "echoing", lambda *_: contextlib.nullcontext())
        count, predictor = 0, Predictor(target, SPEED, LINK)
        options = {"ratio": family.ratio[0] if half == "encode" else 1} if mode == "exact" else {}
        found.append(getattr(predictor, mode)(half, (torch.empty(shape, device="meta"),), {}, ranks=2, **options))
        calls.append(count)
    assert calls[0] < calls[1] or calls[1] == 1 or name == "magvit"
    one, other = (prediction.to_dict() for prediction in found)
    assert one == {**other, "seconds": pytest.approx(other["seconds"]), "exposed": pytest.approx(other["exposed"])}


def test_the_vae_is_as_before() -> None:
    family = FAMILIES["magvit"]  # keeps its caches on its modules
    vae = family.build()
    before = run_encode(vae, family.sample())
    predict("magvit", "encode", "exact", 2, vae)
    assert torch.equal(run_encode(vae, family.sample()), before)


# ---- trials of operators ---------------------------------------------------------------------------------------------


def busy(milliseconds: list[float]) -> Callable[[], None]:
    """Takes so long, one after the other, and then the last ones again and again."""
    turns = itertools.chain(milliseconds, itertools.cycle(milliseconds[-2:]))

    def call() -> None:
        until = time.thread_time() + next(turns) / 1000
        while time.thread_time() < until:
            pass

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_trial_that_was_disturbed_is_done_again() -> None:
    seconds, steady = rates._quickest(busy([64, 32, 16, 8, 8]), CPU)
    assert steady
    assert seconds == pytest.approx(8e-3, rel=0.2)
    _, steady = rates._quickest(busy([2 ** (8 - turn) / 2 for turn in range(9)]), CPU)
    assert not steady
    assert rates._seconds(lambda: time.sleep(0.05)) < 0.02  # other work has the processor meanwhile


@pytest.mark.usefixtures("one_thread")
def test_shards_of_about_one_size_share_their_trials() -> None:
    """And are told by them in proportion; functions without arithmetic on any rows, too."""
    speed, known = MeasuredSpeed(CPU, torch.float32), list[int]()
    for rows, columns in ((40, 66), (40, 100), (50, 104)):
        weight = torch.empty(8, 8, 3, 3, device="meta")
        picture = torch.empty(1, 8, rows, columns, device="meta")
        for args, func in (
            ((picture, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), torch.ops.aten.convolution.default),
            ((picture,), torch.ops.aten.silu.default),
        ):
            job = Operation(func, args, {}, func(*args), makes=True)
            assert 0 < speed.seconds(job) < 1
            assert speed.workspace(job) < 2**24
        known.append(len(speed._known))
    assert known[1] == known[0]
    assert known[2] > known[1]  # libraries choose by rows
    assert speed.unsteady <= 1
