"""What a VAE asks of its network: its own method runs with a stand-in for `vae.encoder` or `vae.decoder`.

A `Recorder` finds the calls, on shapes alone. Afterwards any stand-in may answer them: one that runs some of the calls,
one that hands out results made elsewhere. Crop, blend and clamp stay the VAE's own code throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from halovae.base.compiled import as_written
from halovae.base.errors import TilingError
from halovae.base.functions import outside_modes
from halovae.base.options import NETWORKS as NETWORKS
from halovae.base.private_torch import pytree, version, without_modes
from halovae.base.replaced import replaced
from halovae.base.trees import on_meta, tensors_in
from halovae.calls.dataflow import Dataflow, Draw, Origin, Spec
from halovae.calls.module_facts import ModuleFacts
from halovae.calls.state import ModuleState, kept_tensors, refill, unchanged, without_fetching
from halovae.kernels import autocast
from halovae.kernels.shapes_only import standing_in

Function = Callable[..., Any]


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network, known by shapes alone."""

    inputs: tuple[Spec, ...]
    """The tensors among its arguments: the crop first."""
    leaves: tuple[Any, ...]
    """Leaves of what it returns; a `Spec` stands for a tensor."""
    structure: Any
    """How the leaves make the result."""
    used: tuple[int, ...]
    """Leaves that the VAE goes on to use; the others are caches for the network itself."""
    needs: Origin
    """Earlier calls whose caches it reads."""
    draws: tuple[Draw, ...]
    """Random draws inside the network."""
    kind: int
    """Calls of one kind get the same, by shape: arguments, caches, and what the modules keep."""

    @property
    def specs(self) -> list[Spec]:
        """Of the used leaves."""
        return [self.leaves[leaf] for leaf in self.used]

    @property
    def cost(self) -> int:
        """Elements of the larger side, which the network's work is in proportion to."""
        return max(sum(spec.numel for spec in self.specs), self.inputs[0].numel)

    def result(self, used: Iterable[Tensor], others: Any = None, device: torch.device | str = "cpu") -> Any:
        """A result of the network, put together.

        Args:
            others: a result to take the other leaves from; None: zeros that take no memory.
        """
        if others is None:
            leaves = [leaf.zeros(device) if isinstance(leaf, Spec) else leaf for leaf in self.leaves]
        else:
            leaves = pytree.tree_leaves(others)
        for place, tensor in zip(self.used, used, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.structure)


@dataclass(frozen=True)
class Recording:
    """All the calls of one encode or decode, in order, and what it returns, on the meta device."""

    calls: tuple[NetworkCall, ...]
    result: Any
    keeps: bool
    """Whether a call goes on with tensors that the call before has left in the VAE."""
    writes: bool
    """Whether the VAE's own method writes into its arguments."""


class Recorder:
    """Notes the network calls that one half of a VAE makes.

    Args:
        vae: the VAE; after a recording it is as before.
    """

    def __init__(self, vae: nn.Module, half: str, method: Function) -> None:
        self._vae, self._half, self._method = vae, half, method
        self._facts = ModuleFacts(vae)
        self._state = ModuleState(getattr(vae, NETWORKS[half]))
        self._effects: dict[Any, _Effect] = {}

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
        """Run the VAE's own method on shapes alone.

        Raises:
            TilingError: what the network gets depends on what it gave before, or can't be told.
        """
        with unchanged(self._facts, args, kwargs) as before, without_fetching(self._vae):
            recording = self._run(args, kwargs, ())
            left = _others(kept_tensors(self._facts), before.tensors)
            keeps = False
            if left:  # Caches, or what is made once and for all: a second call tells.
                again = self._run(args, kwargs, left)
                keeps = again.keeps and bool(_others(left, kept_tensors(self._facts)))
        return replace(recording, keeps=keeps)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], watched: Iterable[Tensor]) -> Recording:
        """A recording in which `keeps` says whether a watched tensor is read."""
        network = getattr(self._vae, NETWORKS[self._half])
        devices = [tensor.device for tensor in tensors_in((args, kwargs)) if not tensor.is_meta]
        stands_for = standing_in(devices[0]) if devices else nullcontext()
        with torch.inference_mode(False):  # Else they don't tell whether they are written.
            args, kwargs = on_meta((args, kwargs))
        given = tensors_in((args, kwargs))
        listener = _Listener(network, self._state, self._effects, Dataflow(), given)
        listener.flow.watched = {id(tensor): tensor for tensor in watched}
        answers = answering(self._vae, self._half, listener)
        with torch.no_grad(), as_written(), stands_for, autocast.Autocast(), answers, listener.flow:
            result = self._method(*args, **kwargs)
        writes = any(version(tensor) for tensor in given)
        return Recording(listener.finish(result), result, listener.flow.met, writes)


def _others(tensors: Iterable[Tensor], known: Iterable[Tensor]) -> list[Tensor]:
    """Those that are not among the known ones."""
    ids = set(map(id, known))
    return [tensor for tensor in tensors if id(tensor) not in ids]


@contextmanager
def answering(vae: nn.Module, half: str, answer: Function) -> Iterator[None]:
    """Within it, the VAE's calls of its network go to `answer`; its attributes stay reachable."""
    name = NETWORKS[half]
    with replaced(vae, name, _StandIn(getattr(vae, name), answer)):
        yield


class _StandIn:
    """Looks like the network, but is called instead of it."""

    def __init__(self, network: nn.Module, answer: Function) -> None:
        self.__dict__.update(_network=network, _answer=answer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._network, name, value)


@dataclass(frozen=True)
class _Kept:
    """A tensor that was among the arguments or in the caches before the call."""

    place: int


@dataclass(frozen=True)
class _Effect:
    """What a call with arguments of given shapes does: it is found once and then repeated."""

    result: tuple[tuple[Any, ...], Any]
    after: tuple[tuple[Any, ...], Any]
    """Arguments and module state after the call."""
    read: tuple[int, ...]
    """Which leaves of arguments and module state it reads."""
    draws: tuple[Draw, ...]


@dataclass
class _Heard:
    """A call while the recording goes on."""

    inputs: tuple[Spec, ...]
    effect: _Effect
    needs: Origin
    used: set[int] = field(default_factory=set[int])


class _Listener:
    """Answers calls with results on the meta device, and notes what depends on what."""

    def __init__(
        self, network: nn.Module, state: ModuleState, effects: dict[Any, _Effect], flow: Dataflow, given: list[Tensor]
    ) -> None:  # fmt: skip
        self.flow, self._given = flow, given
        self._network, self._state, self._effects = network, state, effects
        self._heard: list[_Heard] = []
        self._results: dict[int, tuple[int, int]] = {}
        self._caches: set[int] = set()
        self._fed: set[tuple[int, int]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, before = self._begin(args, kwargs)
        if key not in self._effects:
            self._effects[key] = self._run(args, kwargs, before)
        return self._answer(self._effects[key], args, kwargs, before)

    @outside_modes
    def _begin(self, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """What tells the call from others, and the leaves of its arguments and of the modules' state."""
        self._note_use(self.flow.reads)
        state = self._state.changed()
        before, structure = pytree.tree_flatten((args, kwargs, state))
        for leaf in before:
            if isinstance(leaf, Tensor):
                self.flow.follow(leaf, self.flow.origin(leaf))
        return (autocast.state(), structure, tuple((type(leaf), _described(leaf)) for leaf in before)), before

    @outside_modes
    def _answer(self, effect: _Effect, args: Any, kwargs: Any, before: list[Any]) -> Any:
        self.flow.met = self.flow.met or any(id(before[place]) in self.flow.watched for place in effect.read)
        inputs = tuple(Spec(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self._heard.append(_Heard(inputs, effect, self._needs([before[place] for place in effect.read])))
        with without_modes():
            return self._apply(effect, args, kwargs, before)

    def _run(self, args: Any, kwargs: Any, before: list[Any]) -> _Effect:
        self.flow.reads.clear()
        self.flow.draws.clear()
        versions = [version(tensor) for tensor in self._given]
        result = self._network(*args, **kwargs)
        if versions != [version(tensor) for tensor in self._given]:
            raise TilingError("its network writes into the picture that it is given: its tiles can't run apart")
        places = {id(leaf): place for place, leaf in enumerate(before) if isinstance(leaf, Tensor)}

        def described(tree: Any) -> tuple[tuple[Any, ...], Any]:
            leaves, structure = pytree.tree_flatten(tree)
            found = [_Kept(places[id(leaf)]) if id(leaf) in places else _described(leaf) for leaf in leaves]
            return tuple(found), structure

        read = tuple(place for leaf, place in places.items() if leaf in self.flow.reads)
        self.flow.reads.clear()
        after = described((args, kwargs, self._state.changed()))
        return _Effect(described(result), after, read, tuple(self.flow.draws))

    def _apply(self, effect: _Effect, args: Any, kwargs: Any, before: list[Any]) -> Any:
        index = len(self._heard) - 1

        def made(leaf: Any) -> Any:
            if isinstance(leaf, _Kept):
                return before[leaf.place]
            if not isinstance(leaf, Spec):
                return leaf
            tensor = leaf.empty("meta")
            self.flow.follow(tensor, frozenset([index]))
            self._caches.add(id(tensor))
            return tensor

        new_args, new_kwargs, new_state = pytree.tree_unflatten(list(map(made, effect.after[0])), effect.after[1])
        refill((args, kwargs), (new_args, new_kwargs))
        self._state.set(new_state)
        leaves = list(map(made, effect.result[0]))
        self._results.update({id(leaf): (index, i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)})
        return pytree.tree_unflatten(leaves, effect.result[1])

    def _needs(self, read: list[Tensor]) -> Origin:
        for tensor in read:
            if self.flow.origin(tensor) and id(tensor) not in self._caches:
                raise TilingError(_FEEDBACK)
            if id(tensor) in self._results:
                self._fed.add(self._results[id(tensor)])
        return Origin().union(*map(self.flow.origin, read))

    def _note_use(self, ids: Iterable[int]) -> None:
        for tensor in list(ids):
            if tensor in self._results:
                call, leaf = self._results[tensor]
                self._heard[call].used.add(leaf)
        self.flow.reads.clear()

    def finish(self, result: Any) -> tuple[NetworkCall, ...]:
        self._note_use([*self.flow.reads, *map(id, tensors_in(result))])
        if any(leaf in self._heard[call].used for call, leaf in self._fed):
            raise TilingError(_FEEDBACK)
        kinds = {id(effect): kind for kind, effect in enumerate(self._effects.values())}
        return tuple(
            NetworkCall(
                call.inputs, *call.effect.result, tuple(sorted(call.used)), call.needs, call.effect.draws,
                kinds[id(call.effect)],
            )
            for call in self._heard
        )  # fmt: skip


_FEEDBACK = "the VAE feeds its network with what it made of the network's own output: its tiles can't run apart"


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return Spec(leaf)
    if tensors_in(leaf):
        raise TilingError(f"its network takes or gives tensors in a {type(leaf).__name__}, in which tiles get lost")
    return leaf
