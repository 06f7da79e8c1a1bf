"""What a call in exact mode does, step by step: the same on a device and, where it is predicted, on shapes alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

from halovae.base.options import Axis
from halovae.base.trees import pictures_in
from halovae.calls.merge_steps import Merger, Rehearsal, Steps, merged
from halovae.calls.target import Target
from halovae.comm import Comm
from halovae.exact.mesh import ShardPlan, plan_shards
from halovae.exact.run import GroupRun, Runner, on_shards

Told = TypeVar("Told")
"""What is said of a call."""


class ExactCall(ABC, Generic[Told]):
    """One encode or decode in exact mode, as one rank takes part in it.

    Args:
        joiner: decides how many steps in time go in each call of the network.
        ranks: how many may have a shard.

    Attributes:
        comm: the group.
        picture: the first one among the arguments: the one that is cut.
        shards: how it is cut.
        steps: how many steps in time go in each call of the network.
        work: the network's run.
        result: what the half returns.
    """

    comm: Comm
    shards: ShardPlan
    steps: Steps
    work: GroupRun
    result: Any

    def __init__(
        self, target: Target, joiner: Merger | Rehearsal, half: str, args: tuple[Any, ...], kwargs: dict[str, Any], *,
        ranks: int, axis: Axis, keep: str,
    ) -> None:  # fmt: skip
        self.target, self.half, self.args, self.kwargs = target, half, args, kwargs
        self.picture = pictures_in((args, kwargs))[0]
        self._axis: Axis = axis
        self._joiner, self._ranks, self._keep = joiner, ranks, keep

    def make(self) -> Told:
        """All steps, in their order."""
        self.plan()
        self.compile()
        self.memory()
        self.probe()
        self.join_steps()
        with self.watched():
            self.run()
            self.gather()
        return self.report()

    def plan(self) -> None:
        """How the picture is cut."""
        height, width = self.picture.shape[-2:]
        self.shards = plan_shards(height, width, self.ratio(), self._ranks, self._axis)

    def compile(self) -> None:
        """Begin to compile the kernels, side by side with the next steps. On shapes there are none."""

    def memory(self) -> None:
        """Whether there is enough of it. On shapes that is no question."""

    def probe(self) -> None:
        """Whether shards give what the VAE gives. Shapes alone tell nothing of that."""

    def join_steps(self) -> None:
        """How many steps in time go in each call of the network."""
        self.steps = self._joiner.steps(self.half, self.shards, self.compression, self.args, self.kwargs)

    def run(self) -> None:
        """The network on shards."""
        self.work = GroupRun(self.comm, self.shards, self.args, self.kwargs, self._keep)
        self.work.run(merged(self.target, self.half, self.steps), self.runner())

    def gather(self) -> None:
        """The whole result."""
        self.result = self.work.gather()

    def watched(self) -> AbstractContextManager[None]:
        """Within it, the network runs and its result is put together: what that takes is looked at."""
        return nullcontext()

    @abstractmethod
    def report(self) -> Told: ...

    @abstractmethod
    def compression(self) -> int:
        """Pixels per latent for encode, 1 for decode."""

    def ratio(self) -> int:
        """The compression; 1 where nothing is cut, so that it need not be known."""
        return self.compression()

    def runner(self) -> Runner:
        """What makes the call on shards."""
        return on_shards
