"""`parallelize` with real ranks: the contract around the network. Every family is compared in test_exact_families."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import EXACT, FAMILIES
from ranks import Ranks
from torch import Tensor, nn

import halovae
from halovae.errors import DisagreementError, InputError, NotExactError, RankFailedError, VerificationError


def kl(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    return FAMILIES["kl"].build(seed).to(dtype)


def pixels(height: int = 40, width: int = 56, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(rows: int = 5, cols: int = 7, batch: int = 2, seed: int = 2) -> Tensor:
    return torch.randn(batch, 4, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@contextlib.contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[None]:
    with pytest.raises(kind, match=text):
        yield


# ---- signatures and values ------------------------------------------------------------------------------------------


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


def ranks_and_grids(rank: int) -> list[tuple[int, int]]:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    shapes: list[tuple[int, int]] = []
    for options in ({"axis": "height"}, {"axis": "width"}, {"axis": "width", "size": 2}, {"size": 1}, {"axis": "auto"}):
        with halovae.parallelize(vae, **options, verify=False) as handle:
            assert error(vae.decode(z)[0], expected) <= EXACT
            assert handle.last is not None
            shapes.append(handle.last.shape)
    return shapes


def test_more_ranks_than_rows_and_fewer_ranks_than_the_group(four_ranks: Ranks) -> None:
    per_rank = four_ranks.run(ranks_and_grids)
    assert per_rank == [[(2, 1), (1, 3), (1, 2), (1, 1), (2, 2)]] * 4


def sub_group(rank: int) -> str:
    group = dist.new_group([1, 2])
    vae, z = kl(), latents()
    if rank not in (1, 2):
        with raises(InputError, "not a process group that this process belongs to"):
            halovae.parallelize(vae, group)
        return ""
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae, group) as handle:
        assert error(vae.decode(z)[0], expected) <= EXACT
        return repr(handle)


def test_a_sub_group_that_does_not_begin_at_rank_0(four_ranks: Ranks) -> None:
    before, first, second, behind = four_ranks.run(sub_group)
    assert before == behind == ""
    assert "rank   0 of 2" in first
    assert "rank   1 of 2" in second


def two_groups(rank: int) -> None:
    """Each rank is in two groups, and two threads use them at once, each for its own VAE."""
    groups = [dist.new_group(list(range(dist.get_world_size()))) for _ in range(2)]
    vaes, inputs = [kl(seed=seed) for seed in range(2)], [latents(seed=5), latents(seed=6)]
    expected = [vae.decode(z)[0] for vae, z in zip(vaes, inputs, strict=True)]
    found: list[Any] = [None, None]
    handles = [halovae.parallelize(vae, group, verify=False) for vae, group in zip(vaes, groups, strict=True)]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[i] = vaes[i].decode(inputs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in (range(2) if rank == 0 else (1, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle, one, other in zip(handles, found, expected, strict=True):
        handle.restore()
        assert error(one, other) <= EXACT


def test_two_groups_at_once(two_ranks: Ranks) -> None:
    two_ranks.run(two_groups)


def disjoint_groups(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    vae, z = kl(), latents(seed=rank // 2)
    expected = vae.decode(z)[0]
    with halovae.parallelize(vae, groups[rank // 2]):
        assert error(vae.decode(z)[0], expected) <= EXACT


def test_two_disjoint_groups_at_once(four_ranks: Ranks) -> None:
    four_ranks.run(disjoint_groups)


def meshes(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vae"))
    with halovae.parallelize(vae, grid["vae"]) as handle:
        assert error(vae.decode(z)[0], expected) <= EXACT
        assert "of 2" in repr(handle)
    with raises(InputError, r"2-dimensional DeviceMesh: pass one of its dimensions"):
        halovae.parallelize(vae, grid)


def test_a_dimension_of_a_device_mesh(four_ranks: Ranks) -> None:
    four_ranks.run(meshes)


def one_vae_two_threads(rank: int) -> None:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    found: list[Tensor] = []

    def work() -> None:
        with torch.no_grad():
            found.append(vae.decode(z)[0])

    with halovae.parallelize(vae, verify=False):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    assert all(error(one, expected) <= EXACT for one in found)


def test_threads_that_share_a_vae_take_turns(two_ranks: Ranks) -> None:
    two_ranks.run(one_vae_two_threads)


# ---- gather ----------------------------------------------------------------------------------------------------------


def gathers(rank: int, axis: Any) -> list[tuple[Tensor, dict[str, tuple[int, int]]]]:
    vae, z = kl(), latents()
    expected = vae.decode(z)[0]
    outcomes: list[tuple[Tensor, dict[str, tuple[int, int]]]] = []
    for gather in ("all", "first", "shard"):
        with halovae.parallelize(vae, axis=axis, gather=gather, verify=False) as handle:
            result = vae.decode(z).sample
            assert handle.last is not None
            (top, bottom), (left, right) = extents = handle.last.extents["height"], handle.last.extents["width"]
            outcomes.append((result, dict(zip(("height", "width"), extents, strict=True))))
            if gather == "all" or (gather == "first" and rank == 0):
                assert error(result, expected) <= EXACT
            elif bottom > top:
                assert error(result, expected[..., top:bottom, left:right]) <= EXACT
            else:
                assert result.shape == (2, 3, 0, 0)
    return outcomes


@pytest.mark.parametrize("axis", ["height", "width", (2, 2), (1, 3)])
def test_who_holds_the_output(four_ranks: Ranks, axis: Any) -> None:
    per_rank = four_ranks.run(gathers, axis)
    _, _, shards = zip(*per_rank, strict=True)
    covered = torch.zeros(40, 56)
    for _, extents in shards:
        covered[slice(*extents["height"]), slice(*extents["width"])] += 1
    assert bool((covered == 1).all())


# ---- disagreements and bad input -------------------------------------------------------------------------------------


def disagreements(rank: int) -> None:
    with raises(DisagreementError, "disagree on weights"):
        halovae.parallelize(kl(seed=rank))
    with raises(DisagreementError, "disagree on options"):
        halovae.parallelize(kl(), gather=("all", "first")[rank])
    with raises(DisagreementError, "disagree on VAE"):
        halovae.parallelize(FAMILIES[("kl", "tiny")[rank]].build())
    with raises((InputError, RankFailedError)[rank], "mode is 'tiles'"):
        halovae.parallelize(kl(), mode=("tiles", "exact")[rank])

    vae = kl()
    with halovae.parallelize(vae):
        with raises(DisagreementError, r"disagree on arguments: rank 0 has \(2, 4, 5, 7\)"):
            vae.decode(latents(rows=5 + rank))
        with raises(DisagreementError, "float32"):
            vae.decode(latents().to((torch.float32, torch.float64)[rank]))
        with raises(DisagreementError, "disagree on call"):
            (vae.encode, vae.decode)[rank](latents())
        with raises((InputError, RankFailedError)[rank], "got no picture"):
            vae.decode(latents() if rank else None)
        with raises((RankFailedError, InputError)[rank], "computes no gradients"):
            vae.decode(latents().requires_grad_(rank == 1))
        assert vae.decode(latents())[0].shape == (2, 3, 40, 56)


def test_what_differs_between_ranks_is_raised_on_all(two_ranks: Ranks) -> None:
    two_ranks.run(disagreements)


def bad_input(rank: int) -> None:
    with raises(InputError, "there is no VAE"):
        halovae.parallelize("vae")
    with raises(InputError, "Linear has no encode"):
        halovae.parallelize(nn.Linear(2, 2))
    for options, text in (
        ({"mode": "fast"}, "mode is 'fast': allowed are 'exact'"),
        ({"axis": "depth"}, "axis is 'depth'"),
        ({"axis": (2, 2)}, "4 shards but 2 ranks"),
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
        with raises(InputError, "parallelized already"):
            halovae.parallelize(vae)
        with raises(InputError, "got no picture"):
            vae.decode(torch.zeros(3))
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
    from halovae.exact.registry import RULES, rule

    vae = Methods(nn.Sequential(nn.Identity(), Sharpen()))
    with halovae.parallelize(vae, axis="height"), raises(NotExactError, r"torch\.roll in decoder\.1\.1 \(Sharpen\)"):
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


def verified_once(rank: int) -> None:
    vae = kl()
    calls: list[int] = []
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    with halovae.parallelize(vae):
        vae.decode(latents())
        assert len(calls) == 3  # un-parallel and sharded probe, then the call
        vae.decode(latents())
        assert len(calls) == 4
    calls.clear()
    with halovae.parallelize(vae, verify=False):
        vae.decode(latents())
        assert len(calls) == 1


def test_each_half_is_verified_once(two_ranks: Ranks) -> None:
    two_ranks.run(verified_once)


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
    assert text.splitlines()[0] == "halovae.Handle"
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["vae", "halves", "rank", "mode", "last"]
    assert "AutoencoderKL" in text


# ---- composing -------------------------------------------------------------------------------------------------------


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
        assert torch.equal(vae.decode(z)[0], expected)
        assert handle.last is not None
        assert (handle.last.shape, handle.last.messages) == ((1, 1), 0)
