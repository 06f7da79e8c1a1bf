"""What one process has found out is not asked again by another, as long as nothing has changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from command import enter, saved
from families import FAMILIES
from pictures import kl, latents, pixels
from ranks import Ranks
from torch import Tensor, nn
from torch import distributed as dist

import halovae
from halovae.api import exact_engine
from halovae.base import verdicts
from halovae.base.errors import TooLittleMemoryError
from halovae.calls import blueprint
from halovae.calls.merge_steps import Merger
from halovae.calls.target import Target
from halovae.calls.verify import compression
from halovae.cli.main import main
from halovae.exact.mesh import ShardPlan, plan_shards
from halovae.exact.shard_mode import RULES
from halovae.kernels import precision
from halovae.media import vae_limits
from halovae.pipelines.stages import StageTimeline, watched
from halovae.predict import memory_check

CPU = torch.device("cpu")


def switched_on(folder: str | Path) -> Any:
    return patch.dict(os.environ, {verdicts.SWITCH: "on", "XDG_CACHE_HOME": str(folder)})


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    with switched_on(tmp_path):
        folder = verdicts.folder()
        assert folder is not None
        yield folder


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_read_and_forgotten(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (verdicts.name_of(CPU, "question", number) for number in (1, 2))
    assert one is not None
    assert verdicts.read(one) is None
    verdicts.write(one, {"answer": [1, 2.5, True]})
    assert verdicts.read(one) == {"answer": [1, 2.5, True]}
    assert verdicts.read(other) is None
    count, size = verdicts.usage()
    assert count == 1
    assert size == sum(path.stat().st_size for path in cache.iterdir())
    for broken in ("", "{", "[]", '{"name": "another", "answer": 3}', '{"name": null}'):
        (cache / f"{one}.json").write_text(broken)
        assert verdicts.read(one) is None
    verdicts.write(one, 4)
    assert verdicts.read(one) == 4
    assert main(["doctor", "--clear-cache"]) == 0
    assert capsys.readouterr().out.startswith("forgotten: 1 answer, ")
    assert verdicts.usage() == (0, 0)


def test_the_oldest_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "_MOST", 8)
    names = [verdicts.name_of(CPU, number) for number in range(9)]
    for age, name in enumerate(names[:8]):
        verdicts.write(name, age)
        os.utime(cache / f"{name}.json", (age, age))
    assert verdicts.read(names[0]) == 0  # Asked for last, so it stays.
    left = cache / "left.part"
    left.touch()
    os.utime(left, (0, 0))
    verdicts.write(names[8], 8)
    kept = [name for name in names if verdicts.read(name) is not None]
    assert kept == [names[0], *names[3:]]
    assert not left.exists()


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null"])
def test_where_nothing_can_be_kept_nothing_fails(place: str) -> None:
    with switched_on(place):
        name = verdicts.name_of(CPU, "question")
        verdicts.write(name, True)
        assert verdicts.read(name) is None
        assert verdicts.usage() == (0, 0)
        verdicts.clear()


def test_switched_off_nothing_is_asked_or_kept(tmp_path: Path) -> None:
    with switched_on(tmp_path), patch.dict(os.environ, {verdicts.SWITCH: "off"}):
        assert verdicts.name_of(CPU, "question") is None
        assert verdicts.usage() == (0, 0)
    assert not list(tmp_path.iterdir())


# ---- what voids a verdict --------------------------------------------------------------------------------------------


def _no_change(vae: Any) -> None:
    return


def _weights(vae: Any) -> None:
    with torch.no_grad():
        vae.decoder.conv_in.weight[0, 0, 0, 0] += 1


def _setting(vae: Any) -> None:
    vae.decoder.conv_in.padding = (2, 2)


def _config(vae: Any) -> None:
    vae.register_to_config(scaling_factor=0.5)


def _dtype(vae: Any) -> None:
    vae.float()


def _module(vae: Any) -> None:
    vae.decoder.conv_act = nn.GELU()


def _hook(vae: Any) -> None:
    vae.decoder.register_forward_hook(lambda *_: None)


def _instance(vae: Any) -> None:
    vae.decoder.forward = lambda *args: args[0]


def _wrapped(vae: Any) -> None:
    vae.decoder.compile(backend="eager")


def _words(vae: Any, *args: Any, **kwargs: Any) -> str | None:
    words = blueprint.words_of(Target(vae), "decode", args or (latents(),), kwargs)
    return words and verdicts.name_of(CPU, words)


@dataclass(eq=False)
class _Pipeline:
    vae: Any


def _timed(vae: Any) -> None:
    """As the runner of pipelines leaves it while it runs: around the VAE's own method, and around ours."""
    halovae.optimize(vae).release("encode")
    vae._while_watched = watched(_Pipeline(vae), StageTimeline(CPU), lambda *_: None)
    vae._while_watched.__enter__()


def _patched_and_timed(vae: Any) -> None:
    vae.decode = lambda *args: args
    _timed(vae)


OTHER = [_weights, _setting, _config, _dtype, _module]
UNTOLD = [_hook, _instance, _wrapped, _patched_and_timed]
SAME = [_no_change, _timed]


@pytest.mark.parametrize("change", [*SAME, *OTHER, *UNTOLD])
def test_a_change_of_the_vae_is_another_question(change: Callable[[Any], None], cache: Path) -> None:
    before, vae = _words(kl()), kl()
    target = Target(vae)  # Before anything is wrapped around what stands in for a half, as it is in a call.
    change(vae)
    words = blueprint.words_of(target, "decode", (latents(),), {})
    assert before is not None
    assert (words is None) == (change in UNTOLD)
    assert (words is not None and verdicts.name_of(CPU, words) == before) == (change in SAME)


def test_a_change_around_the_vae_is_another_question(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, before = kl(), _words(kl())
    assert _words(vae, latents(), return_dict=False) == before  # The same in another container.
    assert before not in (_words(vae, latents(7, 7)), _words(vae, latents().float()), _words(vae, latents(), other=1))
    assert _words(vae, latents(), object()) is None
    with monkeypatch.context() as patched:
        patched.setattr(type(vae), "_decode", lambda self, z, return_dict=True: z)
        assert _words(vae) not in (None, before)
    with monkeypatch.context() as patched:
        patched.setitem(RULES, torch.roll, lambda *args: args)
        assert _words(vae) is None
    with torch.overrides.BaseTorchFunctionMode():
        assert _words(vae) is None
    with monkeypatch.context() as patched:
        patched.setattr(verdicts, "_program", lambda: ("another version",))
        assert _words(vae) not in (None, before)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: 77)
        assert _words(vae) not in (None, before)
    with halovae.optimize(vae):
        assert _words(vae) == before
    assert _words(vae) == before


def test_a_change_of_the_program_is_another_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "kernels" / "some.py"
    kernel.parent.mkdir()
    kernel.write_text("FAST = 1")
    monkeypatch.setattr(verdicts, "__file__", str(tmp_path / "base" / "verdicts.py"))
    before = verdicts._program.__wrapped__()
    kernel.write_text("FAST = 2")
    assert verdicts._program.__wrapped__() != before


# ---- other processes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def first_calls(rank: int, folders: list[str], off: int = -1) -> tuple[int, list[Tensor]]:
    """How many probes the first calls of a new handle take on two ranks, and what they give."""
    group = dist.new_group([0, 1])
    if rank > 1:
        return 0, []
    vae, switch = kl(), {verdicts.SWITCH: "off" if rank == off else "on"}
    counted = patch.object(exact_engine, "verify", wraps=exact_engine.verify)
    with switched_on(folders[rank]), patch.dict(os.environ, switch), counted as probe:
        with halovae.parallelize(vae, group, axis="width"):
            found = [vae.encode(pixels())[0].parameters, vae.decode(latents())[0]]
        return probe.call_count, found


def test_another_process_takes_what_one_has_found_out(
    two_ranks: Ranks, three_ranks: Ranks, tmp_path: Path
) -> None:  # fmt: skip
    here, empty = str(tmp_path / "here"), str(tmp_path / "empty")
    counts, results = zip(*two_ranks.run(first_calls, [here, here]), strict=True)
    assert counts == (2, 2)
    for folders in ([here, here], [here, empty], [empty, here]):
        again, same = zip(*three_ranks.run(first_calls, folders)[:2], strict=True)
        assert again == (0, 0)
        for one, other in zip(results, same, strict=True):
            assert all(map(torch.equal, one, other))
    # One rank has its cache switched off: all ask anew.
    assert [count for count, _ in two_ranks.run(first_calls, [here, here], 1)] == [2, 2]


def test_the_steps_that_go_together_are_not_looked_for_twice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, find = list[str](), Merger._found

    def found(self: Merger, half: str, *given: Any) -> Any:
        looked.append(half)
        return find(self, half, *given)

    monkeypatch.setattr(Merger, "_found", found)
    steps, latent = list[Any](), FAMILIES["wan21"].latent(torch.float32)
    for frames in (3, 3, 2):
        vae = FAMILIES["wan21"].build()
        with torch.no_grad(), halovae.optimize(vae, options=halovae.Options(frames_per_call=frames)) as handle:
            vae.decode(torch.cat([latent, latent], 2))
            assert handle.last is not None
            steps.append(handle.last.steps)
    assert looked == ["decode", "decode"]
    assert steps[0] == steps[1] != steps[2]
    assert max(steps[0]) == 3


def many_writes(rank: int, folder: str) -> int:
    with switched_on(folder):
        name, seen = verdicts.name_of(CPU, "shared"), 0
        for turn in range(300):
            verdicts.write(name, [rank] * 500 + [turn])
            answer = verdicts.read(name)
            assert answer is not None
            assert set(answer[:-1]) in ({0}, {1})
            seen += answer[0] != rank
        return seen


def test_two_processes_at_once(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(many_writes, str(tmp_path))
    with switched_on(tmp_path):
        assert verdicts.usage()[0] == 1


# ---- what is kept besides the probe ----------------------------------------------------------------------------------


def test_the_memory_of_a_call_is_not_predicted_twice(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run on shapes takes longer than the call in a new process on a GPU."""
    vae, latent = kl(), latents(24, 24, batch=1)
    plan = plan_shards(24, 24, 1, 2)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 2**16)

    def refused(cut: ShardPlan) -> str:
        with pytest.raises(TooLittleMemoryError) as failure:
            memory_check.Room(Target(vae)).check("decode", cut, 1, "all", latent, (latent,), {})
        return str(failure.value)

    message = refused(plan)
    with patch.object(memory_check, "Predictor") as predicts:
        assert refused(plan) == message
        assert not predicts.called
    assert refused(plan_shards(24, 24, 1, 4)) != message


def test_frame_counts_dtypes_and_ratios_are_not_asked_twice(cache: Path) -> None:
    vae = FAMILIES["wan21"].build()
    limits = vae_limits.limits_of(vae)
    sizes = limits.fit(6, 33, 40)
    ratio = compression(Target(vae), torch.zeros(1, 3, 5, 64, 64))
    precision._is_faster.cache_clear()
    work = precision.working_dtype(torch.float16)
    precision._is_faster.cache_clear()
    with (
        patch.object(vae_limits, "skeleton") as built,
        patch.object(Target, "run_untiled") as run,
        patch.object(precision, "_seconds") as timed,
    ):
        again = vae_limits.limits_of(vae)
        assert again.fit(6, 33, 40) == sizes
        assert {**vars(again), "padded_count": 0} == {**vars(limits), "padded_count": 0}
        assert compression(Target(vae), torch.zeros(1, 3, 5, 64, 64)) == ratio == 8
        assert precision.working_dtype(torch.float16) == work
    assert not built.called
    assert not run.called
    assert not timed.called


class Seen(nn.Module):
    """Notes where its pictures are, and may look at their values."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.conv, self.looks, self._seen = nn.Conv2d(3, 4, 3, 4, 1), looks, list[str]()

    def encode(self, x: Tensor) -> Tensor:
        self._seen.append(x.device.type)
        assert not self.looks or float(x.sum()) == 0
        return self.conv(x)


@pytest.mark.parametrize(("looks", "seen"), [(False, "meta"), (True, "cpu")])
def test_a_ratio_takes_no_arithmetic_where_shapes_tell_it(looks: bool, seen: str) -> None:
    vae, places = Seen(looks), list[str]()
    with torch.no_grad(), patch.object(Seen, "encode", _noting(places, Seen.encode)):
        assert compression(Target(vae), torch.zeros(1, 3, 64, 64)) == 4
    assert places[-1] == seen


def _noting(places: list[str], encode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def noted(self: Any, x: Tensor) -> Tensor:
        places.append(x.device.type)
        return encode(self, x)

    return noted


def test_warm_up_leaves_nothing_to_find_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    enter(tmp_path, monkeypatch)
    sizes = "--height", "40", "--width", "48", "--num-frames", "5"
    assert main(["warm-up", "--model", saved("wan21", tmp_path / "wan"), *sizes]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["encode", "decode", "kept:"]
    assert str(cache) in said[-1]
    assert verdicts.usage()[0] > 0
