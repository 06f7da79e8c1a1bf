"""Fewer, larger calls of a network: where a VAE walks through time with causal caches, several steps go in one call.

A step is one latent frame for most such VAEs. On a shard that is too little work for an accelerator, and its halos are
many small messages. Steps that get the same by shape (arguments, caches) are joined in time; the VAE gets promises
for all results but the last of them, and joins these. Whether a network takes several steps at once is found out by
trying: caches, first frames and norms over time are its own business.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from halovae.base import verdicts
from halovae.base.memory import is_shortage
from halovae.base.trees import map_tensors, tensors_in
from halovae.calls.blueprint import words_of
from halovae.calls.dataflow import Spec
from halovae.calls.randomness import frozen_generators
from halovae.calls.record import NETWORKS, NetworkCall, Recorder, Recording, answering
from halovae.calls.state import fetches_weights
from halovae.calls.target import Call, Target
from halovae.calls.verify import Probe, is_rounding, make_probe, scales_of, tried
from halovae.comm import Comm, SoloComm
from halovae.comm.agreement import together, verdict_of_all
from halovae.exact.layout import layout_of, mark
from halovae.exact.mesh import Mesh, ShardPlan
from halovae.exact.run import first_tensor, run_sharded
from halovae.kernels.lazy.promise import promised

LOG = logging.getLogger("halovae")
FULL_CALL = 10 << 20
"""Elements of the larger side of a call that fills an accelerator, as measured on one of Nvidia's Hopper generation:
two latent frames of 480 x 832 pixels. Twice as many gained 1 to 3 % there, and took half as much memory again."""
MOST = 32
"""Steps in one call at the most, however small a picture is: a clip that comes in parts waits for as many frames."""
_PROBED = 2
"""Steps in one call of the probe."""
_MORE_FRAMES = 8
"""Frames that the probe is longer by, so that some of its steps are equal. A multiple of usual compressions."""

Ratio = Callable[[], int]
Most = Callable[[NetworkCall], int]
"""How many steps like this one go in one call at the most."""
Steps = tuple[int, ...]
"""How many of the steps that a VAE makes go in each call of its network."""


class Merger:
    """Decides how many steps of a VAE go in one call of its network. Every rank of the group makes one.

    Args:
        frames: latent frames in one call at the most; "auto": as many as fill the device, one step on a CPU.

    Attributes:
        chosen: the steps by kind of call; the same on all ranks.
    """

    def __init__(self, comm: Comm, target: Target, frames: int | str) -> None:
        self._comm, self._target, self._frames = comm, target, frames
        self._recorders: dict[str, Recorder] = {}
        self.chosen: dict[Any, Steps] = {}
        self._able: dict[Any, bool] = {}

    def steps(self, half: str, plan: ShardPlan, ratio: Ratio, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps:
        """The steps of a call; the same on every rank of the group, which all call this with equal arguments.

        Returns:
            Nothing where the VAE is to walk by itself.
        """
        if not self.may_merge(half, plan, args, kwargs):
            return ()
        key = self._key(half, plan, args, kwargs)
        if key not in self.chosen:
            self.chosen[key] = self._choose(half, plan, ratio, args, kwargs)
        return self.chosen[key]

    def may_merge(self, half: str, plan: ShardPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call merges steps, as far as it is known without trying; the same on every rank."""
        tensors = tensors_in((args, kwargs))
        if self._frames == 1 or (self._frames == "auto" and tensors[0].device.type == "cpu"):
            return False
        if not hasattr(self._target.vae, NETWORKS[half]) or not any(t.ndim == 5 and t.shape[2] > 1 for t in tensors):
            return False
        return self.chosen.get(self._key(half, plan, args, kwargs)) != ()

    def _key(self, half: str, plan: ShardPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the steps depend on."""
        return plan, self._target.kind(half, args, kwargs)

    def _choose(self, half: str, plan: ShardPlan, ratio: Ratio, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps:
        words = words_of(self._target, half, args, kwargs)
        device = tensors_in((args, kwargs))[0].device
        name = words and verdicts.name_of(device, "calls", self._frames, plan, FULL_CALL, MOST, words)
        known = verdict_of_all(self._comm, name)
        if isinstance(known, list) and all(type(count) is int for count in cast("list[Any]", known)):
            return tuple(cast("list[int]", known))
        steps = self._found(half, plan, ratio, args, kwargs)
        if steps and self._comm.rank == 0:  # Where there are none, the reason may be gone the next time.
            verdicts.write(name, list(steps))
        return steps

    def _found(self, half: str, plan: ShardPlan, ratio: Ratio, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps:
        with together(self._comm):
            calls = self._calls(half, args, kwargs)
            steps = sizes(calls, functools.partial(self.most, half, plan))
            tensors = tensors_in((args, kwargs))
            kind = half, tensors[0].dtype, tensors[0].device, self._target.settings()
            able = max(steps, default=1) > 1
            if able and kind not in self._able and (verdict := self._try(half, ratio, args, kwargs)) is not None:
                self._able[kind] = verdict
            able = able and self._able.get(kind, False)
        # Ranks of different devices may find different answers in a probe.
        return steps if all(self._comm.all_gather_object(able)) else ()

    def most(self, half: str, plan: ShardPlan, step: NetworkCall) -> int:
        """How many steps go in one call at the most."""
        if self._frames == "auto":
            whole = prod(bounds[-1] for bounds in plan.bounds)
            steps = FULL_CALL * whole // (step.cost * prod(plan.largest))
        else:
            latent = step.inputs[0] if half == "decode" else step.specs[0]
            steps = int(self._frames) // latent.shape[2]
        return max(1, min(steps, MOST))

    def record(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
        """The VAE's own calls of its network, as `Recorder` finds them."""
        if half not in self._recorders:
            method = functools.partial(self._target.run_untiled, half)
            self._recorders[half] = Recorder(self._target.vae, half, method)
        return self._recorders[half].record(args, kwargs)

    def _calls(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[NetworkCall, ...]:
        """The VAE's own calls of its network; none where they can't be followed on shapes, or are of another form."""
        try:
            recording = self.record(half, args, kwargs)
        except Exception as error:  # Whatever a model's code raises on shapes alone: nothing is lost but speed.
            LOG.debug("%s of %s walks by itself: %s", half, self._target.name, error)
            return ()
        if recording.keeps:
            LOG.debug("%s of %s goes on with what the last call left: it walks by itself", half, self._target.name)
            return ()
        return recording.calls if all(map(_is_step, recording.calls)) else ()

    def _try(self, half: str, ratio: Ratio, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
        """Whether a small picture gives the same in merged calls; None where it has too few steps to tell."""
        scales = scales_of(args, kwargs)
        probe = make_probe((1, 1), ratio(), args, kwargs, _MORE_FRAMES, scales)
        steps = sizes(self._calls(half, probe.args, probe.kwargs), lambda _: _PROBED)
        if max(steps, default=1) == 1:
            return None
        # The scale of the noise is left out, as it is where a handle remembers what it has tried.
        words = words_of(self._target, half, probe.args, probe.kwargs)
        name = words and verdicts.name_of(probe.device, "steps", _PROBED, words)
        able = verdicts.read(name)
        if not isinstance(able, bool):
            able = self._takes(half, steps, probe)
            verdicts.write(name, able)
        return able

    def _takes(self, half: str, steps: Steps, probe: Probe) -> bool:
        """Whether the network gives the same for the probe in merged calls."""
        alone = Mesh(SoloComm(), (1, 1))
        results: list[Tensor] = []
        try:
            for each in ((), steps):
                call = merged(self._target, half, each)
                args, more = probe.fresh()
                run = functools.partial(run_sharded, alone, call, tuple(map(_uneven, args)), more, probe.bounds)
                results.append(first_tensor(tried(self._target.vae, probe.device, run)[0]))
        except Exception as error:  # Of a network that doesn't take it.
            if is_shortage(error):
                raise
            LOG.debug("%s of %s takes one step at a time: %s", half, self._target.name, error)
            return False
        return is_rounding(*results)


class Rehearsal:
    """Tries what `Merger` tries, where the weights are: a VAE without any gets random ones on the device.

    Whether a network takes several steps at once is a matter of its architecture.

    Args:
        frames: latent frames in one call, as for `Merger`.
    """

    def __init__(self, target: Target, device: torch.device, frames: int | str) -> None:
        self._target, self._device, self._frames = target, device, frames
        self._merger: Merger | None = None

    def steps(self, half: str, plan: ShardPlan, ratio: Ratio, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps:
        """As `Merger.steps`, of arguments that count by shape only."""
        if self._frames == 1 or (self._frames == "auto" and self._device.type == "cpu"):
            return ()
        if self._merger is None:
            self._merger = Merger(SoloComm(), self._able_to_run(), self._frames)
        args, kwargs = (map_tensors(lambda t: Spec(t).zeros(self._device), value) for value in (args, kwargs))
        return self._merger.steps(half, plan, ratio, args, kwargs)

    def _able_to_run(self) -> Target:
        vae: Any = self._target.vae
        fetched = any(map(fetches_weights, vae.modules()))
        if fetched or not any(parameter.is_meta for parameter in vae.parameters()):
            return self._target
        from halovae.base.quiet import quiet  # needs diffusers, as such a VAE does

        with quiet(), frozen_generators(self._device), torch.device(self._device):
            torch.manual_seed(0)  # What is found out with these weights is kept for other processes, by the weights.
            copy = type(vae).from_config(vae.config).to(self._device, vae.dtype)
        return Target(copy.eval().requires_grad_(False))


def _uneven(value: Any) -> Any:
    """A video whose frames differ in contrast: else a norm over all of them would look like one of each."""
    if not isinstance(value, Tensor) or value.ndim != 5:
        return value
    contrast = 1 + torch.arange(value.shape[2], device=value.device) % 4
    return value * contrast.to(value.dtype).view(-1, 1, 1)


def sizes(calls: Sequence[NetworkCall], most: Most, first: int = 0) -> Steps:
    """How many steps go in each call: of each row of equal steps as many as may, and those that are left.

    So the first calls are the same whatever follows, as a clip that comes in parts needs it.

    Args:
        first: the call to begin with.
    """
    found: list[int] = []
    while (at := first + sum(found)) < len(calls):
        length, limit = row_of(calls, at), most(calls[at])
        found += [limit] * (length // limit) + [length % limit] * (length % limit > 0)
    return tuple(found)


def row_of(calls: Sequence[NetworkCall], at: int) -> int:
    """How many calls from this one on may be one: of one kind, each going on where the one before has ended.

    The call before them has to give the same shape: it tells how a shard of the results is cut.
    """
    if at == 0 or (calls[at - 1].inputs, calls[at - 1].leaves) != (calls[at].inputs, calls[at].leaves):
        return 1
    end = at + 1
    while end < len(calls) and calls[end].kind == calls[at].kind and end - 1 in calls[end].needs:
        end += 1
    return end - at


def _is_step(call: NetworkCall) -> bool:
    """Whether a video comes in, a video goes out, and chance has no part in it."""
    videos = [*call.inputs, *call.leaves]
    return len(videos) == 2 and all(isinstance(v, Spec) and len(v.shape) == 5 for v in videos) and not call.draws


def merged(target: Target, half: str, steps: Steps) -> Call:
    """The un-parallel half without spatial tiles, with so many steps in each call of its network.

    Args:
        steps: how many in each call; nothing: as the VAE does itself.
    """
    call = functools.partial(target.run_untiled, half)
    if not steps:
        return call

    def run(*args: Any, **kwargs: Any) -> Any:
        network = getattr(target.vae, NETWORKS[half])
        with answering(target.vae, half, Merged(network, steps)):
            return call(*args, **kwargs)

    return run


class Merged:
    """Answers a VAE's calls of its network: with promises, until there are steps enough for a real one.

    Args:
        steps: how many in each call.
        before: a tensor like the result of the first step, which is promised where that waits for others.
    """

    def __init__(self, network: nn.Module, steps: Steps, before: Tensor | None = None) -> None:
        self._network, self._steps = network, iter(steps)
        self._waiting: list[Tensor] = []
        self._promises: list[Any] = []
        self._left = 0
        self._run: Callable[[Tensor], Tensor] = network
        self._before = before

    def __call__(self, picture: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._waiting:
            self._left = next(self._steps, 1)
            self._run = lambda joined: self._network(joined, *args, **kwargs)
        self._waiting.append(picture)
        self._left -= 1
        return self._promise() if self._left else self._keep()

    def _promise(self) -> Tensor:
        assert self._before is not None, "a row of steps follows one of the same shape"
        promise = promised(self._before)
        self._promises.append(promise)
        return mark(promise, layout_of(self._before))

    def _keep(self) -> Tensor:
        """Call the network for all that waits, and keep the promises."""
        count, run = len(self._waiting), self._run
        self._run = self._network  # What it holds are caches, which nobody else needs any more.
        result = run(torch.cat(self._waiting, 2) if count > 1 else self._waiting[0])
        parts = result.chunk(count, 2) if count > 1 else (result,)
        for promise, part in zip(self._promises, parts, strict=False):
            promise.recipe.value = part
        self._waiting, self._promises, self._before = [], [], parts[-1]
        return parts[-1]
