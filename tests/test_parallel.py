"""`parallelize` with real ranks: values, types and errors. Every family is compared in test_exact_families."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import EXACT, FAMILIES
from pictures import error, kl, latents, pixels, raises
from ranks import Ranks
from torch import Tensor, nn

import halovae
from halovae.base.errors import DisagreementError, InputError, RankFailedError
from halovae.base.options import CallReport


def same_signatures(rank: int) -> list[Tensor]:
    vae, x, z = kl(), pixels(), latents()
    results: list[Tensor] = []

    def run() -> list[Any]:
        generator = torch.Generator().manual_seed(7)
        whole, bare = vae.encode(x), vae.encode(x=x, return_dict=False)
        return [
            type(whole), type(bare), type(whole.latent_dist), whole.latent_dist.mode(), bare[0].parameters,
            whole.latent_dist.sample(generator), whole.latent_dist.std, whole.latent_dist.kl(),
            vae.decode(z).sample, vae.decode(z=z, return_dict=False)[0],
        ]  # fmt: skip

    expected = run()
    with halovae.parallelize(vae):
        found = run()
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            assert error(one, other) <= EXACT
            results.append(one)
        else:
            assert one is other
    return results


def test_signatures_types_and_values(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(same_signatures)
    assert len(first) == 7
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def slicing(rank: int) -> None:
    vae, x, z = kl(), pixels(batch=3), latents(batch=3)
    expected = vae.encode(x)[0].parameters, vae.decode(z)[0]
    vae.enable_slicing()
    with halovae.parallelize(vae, axis=(2, 1)):
        assert error(vae.encode(x)[0].parameters, expected[0]) <= EXACT
        assert error(vae.decode(z)[0], expected[1]) <= EXACT
    assert vae.use_slicing


def test_slicing_of_a_batch(two_ranks: Ranks) -> None:
    two_ranks.run(slicing)


def low_precision(rank: int, dtype: torch.dtype) -> None:
    """The order of summation differs, so the results do; neither may be farther from the truth."""
    vae, x, z = kl(), pixels(), latents()
    truth = vae.encode(x)[0].parameters, vae.decode(z)[0]
    vae, x, z = vae.to(dtype), x.to(dtype), z.to(dtype)
    plain = vae.encode(x)[0].parameters, vae.decode(z)[0]
    with halovae.parallelize(vae):
        found = vae.encode(x)[0].parameters, vae.decode(z)[0]
    for one, other, true in zip(found, plain, truth, strict=True):
        assert one.dtype == dtype
        assert (one.double() - true).norm() <= 1.5 * (other.double() - true).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_truth_as_un_parallel(two_ranks: Ranks, dtype: torch.dtype) -> None:
    two_ranks.run(low_precision, dtype)


def odd_sizes(rank: int, axis: Any) -> None:
    vae = kl()
    for height, width in ((42, 58), (47, 63), (33, 40)):
        x = pixels(height, width, batch=1)
        expected = vae.encode(x)[0].parameters
        with halovae.parallelize(vae, axis=axis) as handle:
            assert error(vae.encode(x)[0].parameters, expected) <= EXACT
            assert handle.last is not None
            assert handle.last.shape != (1, 1)


@pytest.mark.parametrize("axis", ["height", "width"])
def test_sizes_off_the_ratio(two_ranks: Ranks, axis: str) -> None:
    two_ranks.run(odd_sizes, axis)


def second_call(rank: int, name: str) -> None:
    """Nothing that a call leaves in the network disturbs the next, of another size, or an un-parallel one."""
    family = FAMILIES[name]
    vae = family.build().to(torch.float64)
    sample = family.sample(torch.float64)
    sizes = [sample, sample[..., : sample.shape[-2] // 2 + 8, :], sample]
    expected = [vae.encode(x)[0].parameters for x in sizes]
    decoded = vae.decode(expected[0][:, : expected[0].shape[1] // 2])[0]
    with halovae.parallelize(vae, axis="width", verify=False):
        found = [vae.encode(x)[0].parameters for x in sizes]
        again = vae.decode(expected[0][:, : expected[0].shape[1] // 2])[0]
    found.append(vae.encode(sample)[0].parameters)
    for one, other in zip(found, [*expected, expected[0]], strict=True):
        assert error(one, other) <= family.encode_tolerance
    assert error(again, decoded) <= family.decode_tolerance
    assert torch.equal(found[-1], expected[0])


@pytest.mark.parametrize("name", ["wan21", "magvit", "cogvideox"])
def test_a_second_call_of_another_size(two_ranks: Ranks, name: str) -> None:
    two_ranks.run(second_call, name)


# ---- groups ----------------------------------------------------------------------------------------------------------


def disagreements(rank: int) -> None:
    with raises(DisagreementError, "disagree on weights"):
        halovae.parallelize(kl(seed=rank))
    with raises(DisagreementError, "disagree on options"):
        halovae.parallelize(kl(), gather=("all", "first")[rank])
    with raises(DisagreementError, "disagree on VAE"):
        halovae.parallelize(FAMILIES[("kl", "tiny")[rank]].build())
    with raises(InputError, "mode is 'tiles'") as refused:
        halovae.parallelize(kl(), mode=("tiles", "exact")[rank])
    # One clause catches it on all ranks; the error tells whose fault it is.
    assert isinstance(refused.value, RankFailedError) is (rank == 1)
    assert type(pickle.loads(pickle.dumps(refused.value))) is type(refused.value)

    vae = kl()
    with halovae.parallelize(vae):
        with raises(DisagreementError, r"disagree on arguments: rank 0 has \(2, 4, 5, 7\)"):
            vae.decode(latents(rows=5 + rank))
        with raises(DisagreementError, "float32"):
            vae.decode(latents().to((torch.float32, torch.float64)[rank]))
        with raises(DisagreementError, "disagree on call"):
            (vae.encode, vae.decode)[rank](latents())
        with raises(InputError, "got no picture"):
            vae.decode(latents() if rank else None)
        for bad, kind in ((latents().to("meta"), "on the meta device"), (latents().to_sparse(), "torch.sparse_coo")):
            with raises(InputError, f"decode got a tensor .*{kind}: pass a dense one"):
                vae.decode(bad)
        # The probe is smaller than what is wrong, and is not to blame.
        for call, fault in (
            (lambda: vae.decode(latents()[:, :3]), "takes no 3 channels, on one rank either: use 4$"),
            (lambda: vae.encode(pixels()[:, :1]), "takes no 1 channel, on one rank either: use 3$"),
            (lambda: vae.decode(latents().float()), "takes no float32, on one rank either: use float64, as its "),
            (lambda: vae.decode(latents(), foo=1), "not take what it was called with, on one rank either: .*'foo'"),
        ):  # fmt: skip
            with raises(InputError, fault):
                call()
        with raises(InputError, "computes no gradients"):
            vae.decode(latents().requires_grad_(rank == 1))
        assert vae.decode(latents())[0].shape == (2, 3, 40, 56)


def test_what_differs_between_ranks_is_raised_on_all(two_ranks: Ranks) -> None:
    two_ranks.run(disagreements)


def bad_input(rank: int) -> None:
    with raises(InputError, "there is no VAE"):
        halovae.parallelize("vae")
    with raises(InputError, "Linear has none of"):
        halovae.parallelize(nn.Linear(2, 2))
    for options, text in (
        ({"mode": "fast"}, "mode is 'fast': allowed are 'exact'"),
        ({"axis": "depth"}, "axis is 'depth'"),
        ({"axis": (2, 2)}, "4 shards but the VAE runs on 2 ranks"),
        ({"axis": (0, 2)}, "axis is"),
        ({"axis": 2}, "axis is 2"),
        ({"size": 3}, "size is 3 but the group has 2 ranks"),
        ({"size": 0}, "size is 0"),
        ({"gather": "none"}, "gather is 'none'"),
    ):
        vae = kl()
        with raises(InputError, text):
            halovae.parallelize(vae, **options)
        assert "encode" not in vae.__dict__

    vae = kl()
    with halovae.parallelize(vae):
        for bad, told in ((torch.zeros(3, 4, 5), r"a value of type Tensor of shape \(3, 4, 5\)"), (None, "None")):
            with raises(InputError, f"got no picture but {told}: pass a tensor"):
                vae.decode(bad)
        with raises(InputError, "empty tensor"):
            vae.decode(latents(rows=0))
        with raises(InputError, "smaller than one latent"):
            vae.encode(pixels(4, 4))
    with halovae.parallelize(vae.requires_grad_(True)), torch.enable_grad():
        with raises(InputError, "computes no gradients"):
            vae.decode(latents())
        with torch.no_grad():
            vae.decode(latents())
    with halovae.parallelize(vae.requires_grad_(False)), torch.enable_grad():
        assert not vae.decode(latents())[0].requires_grad


def test_bad_input_is_one_line_and_changes_nothing(two_ranks: Ranks) -> None:
    two_ranks.run(bad_input)


# ---- trust, but verify -----------------------------------------------------------------------------------------------


def restoring(rank: int) -> None:
    vae = kl()
    before = vae.decode
    handle = halovae.parallelize(SimpleNamespace(vae=vae))
    assert vae.decode != before
    assert vae.decode.__doc__ == before.__doc__
    handle.restore()
    handle.restore()
    assert vae.decode == before
    assert not {"encode", "decode"} & vae.__dict__.keys()

    wrapped = vae.decode
    vae.decode = lambda *args, **kwargs: wrapped(*args, **kwargs)  # as a compiler does
    mine, expected = vae.decode, vae.decode(latents())[0]
    with halovae.parallelize(vae):
        assert error(vae.decode(latents())[0], expected) <= EXACT
    assert vae.decode is mine


def test_restore_puts_back_what_was_there(two_ranks: Ranks) -> None:
    two_ranks.run(restoring)


def reports(rank: int) -> tuple[str, Any]:
    vae = kl()
    with halovae.parallelize(vae, axis="height") as handle:
        assert handle.last is None
        assert "no call yet" in repr(handle)
        vae.decode(latents())
        last = handle.last
        assert last is not None
        assert last.bounds == ((0, 2, 5), (0, 7))
        assert last.messages > 10
        assert last.bytes > 1000
        assert 0 <= last.wait_seconds <= last.seconds
        assert sum(last.phases.values()) == pytest.approx(last.seconds, abs=0.05)
        assert last.peak_memory is None or last.peak_memory > 1 << 20
        assert last.extents["height"] == ((0, 16), (16, 40))[rank]
        assert last.to_dict()["half"] == "decode"
        vae.decode(latents())
        assert handle.last is not last
        return repr(handle), handle.last.messages


def test_reports_and_repr(two_ranks: Ranks) -> None:
    (text, first), (_, second) = two_ranks.run(reports)
    assert first == second
    head, *lines = text.splitlines()
    assert head == "halovae: AutoencoderKL"
    names = ["halves", "ranks", "mode", "axis", "gather", "dtype", "verify", "options", "last"]
    assert [line.split()[0] for line in lines[: len(names)]] == names
    assert "1 of" not in text
    assert "decode exact on 2 x 1 shards" in text
    assert max(map(len, lines)) <= 120


def test_a_report_tells_what_of_the_time_is_the_probe() -> None:
    phases = {"probe": 2.25, "network": 3.5}
    report = CallReport(half="decode", mode="exact", reference="un-tiled", seconds=5.75, phases=phases, shape=(1, 2))
    assert str(report).startswith("decode exact on 1 x 2 shards: 5.750 s (probe 2.250), ")
    assert "probe" not in str(replace(report, phases={"network": 3.5}))


# ---- a picture for each rank -----------------------------------------------------------------------------------------


def each_its_own(rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    vae, z = kl(), latents(5 + rank, seed=rank)
    x, other = pixels(seed=rank), pixels()
    expected, encoded, together = vae.decode(z)[0], vae.encode(x)[0].parameters, vae.encode(other)[0].parameters
    shapes: list[tuple[int, int]] = []

    def check(*args: Any, **kwargs: Any) -> None:
        assert error(handle.each("decode", *args, **kwargs).sample, expected) <= EXACT
        assert handle.last is not None
        shapes.append(handle.last.shape)

    with halovae.parallelize(vae, gather="first") as handle:
        check(z)
        assert handle.last is not None
        assert handle.last.messages == 0
        assert error(handle.each("encode", x)[0].parameters, encoded) <= EXACT

        failures = [True] * (rank == 1)
        memory = vae.decoder.conv_in.register_forward_pre_hook(
            lambda module, args: torch.empty(2**60, dtype=torch.uint8) if failures and failures.pop() else None
        )
        check(z=z)
        memory.remove()
        with raises(InputError, "decode got no picture"):
            handle.each("decode", z if rank else None)
        with raises(InputError, "half is 'decoder': this handle runs"):
            handle.each("decoder", z)
        check(z)
        found = vae.encode(other)[0].parameters
        assert rank or error(found, together) <= EXACT
    with halovae.parallelize(vae, dtype={"decode": torch.float32}, halves=["decode"]):
        decoded = vae.decode(latents())[0]
    assert decoded.dtype == torch.float32
    assert torch.allclose(decoded.double(), kl().decode(latents())[0], atol=1e-3)
    return shapes[1], shapes[2]


def test_each_rank_has_a_picture_of_its_own(two_ranks: Ranks) -> None:
    """Alone where it fits into the memory of its rank, else on all ranks."""
    assert two_ranks.run(each_its_own) == [((1, 1), (1, 1)), ((2, 1), (1, 1))]


# ---- names that options had ------------------------------------------------------------------------------------------


def test_options_that_have_moved_are_still_taken() -> None:
    vae = kl()
    with pytest.warns(DeprecationWarning, match=r"parallelize\(timeout=...\) will go: give options=halovae\.Options"):
        handle = halovae.parallelize(vae, timeout=7, verify=False)
    assert "timeout 7" in str(handle)
    with pytest.warns(DeprecationWarning, match="graphs"), pytest.raises(InputError, match="graphs is 3: give True"):
        halovae.optimize(vae, graphs=3)
    with pytest.raises(TypeError, match=r"optimize\(\) got an unexpected keyword argument 'graph'"):
        halovae.optimize(vae, graph=True)
    with pytest.raises(InputError, match="options is 7: give"):
        halovae.optimize(vae, options=7)
    handle.restore()
