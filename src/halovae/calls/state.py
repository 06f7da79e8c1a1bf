"""State that a network keeps between its calls: attributes of its modules, buffers, and what lists and dicts hold."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from halovae.base.private_diffusers import HOOK_OF_ACCELERATE, OLD_FORWARD
from halovae.base.private_torch import BUFFERS, HOOKS, changes
from halovae.base.replaced import replaced
from halovae.calls.module_facts import NO_STATE, PLAIN, Contents, ModuleFacts
from halovae.kernels.lazy.deferred import Deferred, any_pending

Place = tuple[int, str]
"""Number of the module or object, name of the attribute."""

_MISSING = object()

_DICTS = (dict, OrderedDict, defaultdict)


class ModuleState:
    """The attributes of a network's modules and its own objects that have changed since this was made.

    Lists and dicts count by their content.

    Args:
        network: the network. Parameters don't count, nor does what torch itself keeps in modules.
    """

    def __init__(self, network: nn.Module) -> None:
        self._holders = [*network.modules(), *Snapshot(network, values=False).objects()]
        self._base = self._now()
        self._held = {place: copied(value) for place, value in self._base.items()}
        self._quiet = _Quiet(network)

    def _now(self) -> dict[Place, Any]:
        return {
            (number, name): value
            for number, holder in enumerate(self._holders)
            for name, value in _fields(holder).items()
        }

    def changed(self) -> dict[Place, Any]:
        """By attribute what it is now; lists and dicts as copies."""
        if self._quiet.holds():
            return {}
        base, held = self._base, self._held
        return {
            place: copied(value)
            for place, value in self._now().items()
            if value is not base.get(place, _MISSING) or not is_same(value, held[place])
        }

    def set(self, values: dict[Place, Any]) -> None:
        """Change exactly these attributes; the others become what they were at first."""
        if not values and self._quiet.holds():
            return
        now = self._now()
        for place in now.keys() | self._base.keys():
            value = values.get(place, self._held.get(place, _MISSING))
            is_now, base = now.get(place, _MISSING), self._base.get(place, _MISSING)
            if is_now is not base or not is_same(is_now, value):
                _set_field(self._holders[place[0]], place[1], refill(base, value))


class _Quiet:
    """Tells at a glance that no module of a network keeps anything else than when this was made."""

    def __init__(self, network: nn.Module) -> None:
        attributes = [vars(module) for module in network.modules()]
        self._contents = Contents([*attributes, *(known[BUFFERS] for known in attributes)])
        values = [v for known in attributes for name, v in known.items() if name not in _ELSEWHERE]
        holders = [value for value in values if not isinstance(value, _NO_STATE)]
        self._lists = [(held, tuple(held)) for held in holders if isinstance(held, _LISTS) and held]
        # What holds other things in other ways may change where this does not look.
        self._is_plain = all(isinstance(value, _LISTS) for value in holders) and not any(
            isinstance(item, (list, dict, set)) for _, items in self._lists for item in items
        )

    def holds(self) -> bool:
        return (
            self._is_plain and self._contents.holds() and all(_are_same(held, before) for held, before in self._lists)
        )


_ELSEWHERE = NO_STATE | {BUFFERS}
_LISTS = (list, tuple)
_NO_STATE = (bool, int, float, str, type(None), torch.dtype, torch.device, Tensor, nn.Module)


def _are_same(now: Collection[Any], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def copied(value: Any) -> Any:
    """The value with lists, tuples and dicts of its own, at any depth."""
    if isinstance(value, (list, tuple)):
        items = [copied(item) for item in cast("list[Any]", value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if type(value) in _DICTS:
        table = copy.copy(value)
        table.update({key: copied(item) for key, item in table.items()})
        return table
    return value


def is_same(one: Any, other: Any) -> bool:
    """Whether two values hold the very same leaves."""
    if one is other:
        return True
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        pair = cast("list[Any]", one), cast("list[Any]", other)
        return len(pair[0]) == len(pair[1]) and all(map(is_same, *pair))
    if type(one) in _DICTS and type(one) is type(other):
        table, entries = cast("dict[Any, Any]", one), cast("dict[Any, Any]", other)
        return table.keys() == entries.keys() and all(is_same(item, entries[key]) for key, item in table.items())
    return False


def refill(old: Any, new: Any) -> Any:
    """`new`, put into the very lists and dicts of `old`: who holds on to those sees it too."""
    if isinstance(old, list) and isinstance(new, list):
        held, items = cast("list[Any]", old), cast("list[Any]", new)
        held[:] = [refill(held[i], item) if i < len(held) else item for i, item in enumerate(items)]
        return held
    if isinstance(old, dict) and isinstance(new, dict):
        table, entries = cast("dict[Any, Any]", old), cast("dict[Any, Any]", new)
        merged = {key: refill(table.get(key), value) for key, value in entries.items()}
        table.clear()
        table.update(merged)
        return table
    if isinstance(old, tuple) and isinstance(new, tuple) and len(cast("Any", old)) == len(cast("Any", new)):
        pair = cast("tuple[Any, ...]", old), cast("tuple[Any, ...]", new)
        items = [refill(a, b) for a, b in zip(*pair, strict=True)]
        if all(map(is_same, items, pair[0])):
            return pair[0]
        return type(pair[1])(*items) if hasattr(pair[1], "_fields") else tuple(items)
    return new


# ---- everything, to be put back -------------------------------------------------------------------------------------


class Snapshot:
    """All that a network keeps, as it is when this is made, to be put back later.

    Attributes of modules, buffers, and the content of lists, dicts, sets and the VAE's own objects in them, at any
    depth; tensors by their values, parameters excepted. Functions and library hooks are left alone.

    Args:
        arguments: of a call; the containers among them count too, the tensors don't.
        values: whether tensors are copied, so that those which are written into can be put back too.

    Attributes:
        tensors: those that it keeps, without parameters.
    """

    def __init__(self, network: nn.Module | ModuleFacts, *arguments: Any, values: bool = True) -> None:
        facts = network if isinstance(network, ModuleFacts) else ModuleFacts(network)
        known = facts.now()
        self._facts, self._code = facts, facts.code()
        self._modules = [(each.module, each.attributes) for each in known]
        self._containers: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        tensors = self._walk(value for each in known for value in each.state)
        self.tensors = tensors
        self._copies = [(tensor, changes(tensor), tensor.detach().clone()) for tensor in tensors if values]
        self._walk(arguments)

    def _walk(self, values: Iterable[Any]) -> list[Tensor]:
        """Note all containers in these values, and what they hold; the tensors in them."""
        found: list[Tensor] = []
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                if not isinstance(value, nn.Parameter):
                    found.append(value)
            elif (held := self._content(value)) is not None:
                self._containers.append((value, held))
                waiting += [
                    item for item in (held.values() if isinstance(held, dict) else held) if type(item) not in PLAIN
                ]
        return found

    def _content(self, value: Any) -> Any:
        """A copy of what a container holds; None for what is none."""
        if isinstance(value, (list, set, deque, tuple)):
            return list(cast("list[Any]", value))
        if isinstance(value, dict):
            return dict(cast("dict[Any, Any]", value))
        return _fields(value) if self._is_own(value) else None

    def _is_own(self, value: Any) -> bool:
        """Whether it is an object of the code that the network is from; what else holds things is nobody's state."""
        code = isinstance(value, nn.Module) or callable(value)
        return not code and type(value).__module__.partition(".")[0] in self._code

    def objects(self) -> list[Any]:
        """The VAE's own objects that it keeps."""
        return [container for container, _ in self._containers if self._is_own(container)]

    def written(self) -> bool:
        """Whether a tensor that was there has been written into since; those of inference mode can't tell."""
        return any(version is not None and changes(tensor) != version for tensor, version, _ in self._copies)

    def has_gone_on(self) -> bool:
        """Whether the network keeps other tensors now, or other values in them."""
        known = set(map(id, self.tensors))
        return self.written() or any(id(tensor) not in known for tensor in kept_tensors(self._facts))

    def restore(self) -> None:
        for module, held in self._modules:
            now = vars(module)
            if len(now) == len(held) and all(map(operator.is_, now.values(), held.values())):
                continue  # Nearly all: told at a glance, since some networks have hundreds of modules.
            for name in now.keys() | held.keys():
                old, new = held.get(name, _MISSING), now.get(name, _MISSING)
                if old is new or name in NO_STATE or _is_code(old) or _is_code(new):
                    continue
                if old is _MISSING:
                    del now[name]
                else:
                    now[name] = old
        for container, held in self._containers:
            if not _holds(self._content(container), held):
                _fill(container, held)
        for tensor, version, values in self._copies:
            if not torch.equal(tensor, values) if version is None else changes(tensor) != version:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.resize_(values.shape).copy_(values)


def _fields(holder: Any) -> dict[str, Any]:
    """What a module or an object holds by name."""
    if isinstance(holder, nn.Module):
        return {name: value for name, value in vars(holder).items() if name not in NO_STATE}
    slots = {name for kind in type(holder).__mro__ for name in _slots_of(kind) if hasattr(holder, name)}
    return {**getattr(holder, "__dict__", {}), **{name: getattr(holder, name) for name in slots}}


def _set_field(holder: Any, name: str, value: Any) -> None:
    """Past whatever a class does when something is set."""
    if value is _MISSING:
        object.__delattr__(holder, name)
    else:
        object.__setattr__(holder, name, value)


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(name for name in slots if not name.startswith("__"))


def _is_code(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)


def _holds(now: Any, held: Any) -> bool:
    """Whether copies of a container's content are the same objects."""
    if len(now) != len(held):
        return False
    if isinstance(held, dict):
        return all(now.get(key, _MISSING) is value for key, value in cast("dict[Any, Any]", held).items())
    return all(map(lambda a, b: a is b, now, held))


def _fill(container: Any, held: Any) -> None:
    if isinstance(container, dict):
        container.clear()
        container.update(held)
    elif isinstance(container, list):
        container[:] = held
    elif isinstance(container, (set, deque)):
        container.clear()
        container.update(held) if isinstance(container, set) else container.extend(held)
    else:
        for name in _fields(container).keys() | held.keys():
            _set_field(container, name, held.get(name, _MISSING))


def kept_tensors(network: nn.Module | ModuleFacts) -> list[Tensor]:
    """The tensors that a network keeps now, without parameters."""
    return Snapshot(network, values=False).tensors


def settle(network: nn.Module | ModuleFacts) -> None:
    """Compute what the network keeps and has not needed so far: after a call, its sources may be written into."""
    if any_pending():
        for tensor in kept_tensors(network):
            if isinstance(tensor, Deferred):
                tensor.computed()


@contextmanager
def unchanged(network: nn.Module | ModuleFacts, *arguments: Any) -> Iterator[Snapshot]:
    """After it, the network keeps what it kept before, however it ends: a trial leaves no trace."""
    before = Snapshot(network, *arguments)
    try:
        yield before
    finally:
        before.restore()


@contextmanager
def undone_by_failure(network: nn.Module | ModuleFacts, *arguments: Any) -> Iterator[None]:
    """After an exception in it, the network keeps what it kept before.

    Some networks keep caches and clear them at the end of a call, or go on with them in the next one; a call that is
    broken off leaves them half done.
    """
    before = Snapshot(network, *arguments)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def has_hooks(network: nn.Module) -> bool:
    """Whether somebody hears of the calls of a module, or changes what it gets or gives."""
    return any(vars(module)[name] for module in network.modules() for name in HOOKS)


@contextmanager
def without_hooks(network: nn.Module) -> Iterator[None]:
    """Within it, modules run without their forward hooks."""
    with ExitStack() as stack:
        for module in network.modules():
            for name in HOOKS:
                if vars(module)[name]:
                    stack.enter_context(replaced(module, name, OrderedDict()))
        yield


@contextmanager
def without_fetching(network: nn.Module) -> Iterator[None]:
    """Within it, hooks that fetch offloaded weights before a module runs do not: a run on shapes needs none.

    They would put into the module what is only a shape, and leave it there.
    """
    with ExitStack() as stack:
        for module in filter(fetches_weights, network.modules()):
            stack.enter_context(replaced(module, "forward", vars(module)[OLD_FORWARD]))
        yield


def fetches_weights(module: nn.Module) -> bool:
    """Whether a hook of accelerate stands around a module whose weights are elsewhere."""
    return vars(module).keys() >= {HOOK_OF_ACCELERATE, OLD_FORWARD, "forward"} and any(
        tensor.is_meta for tensors in (module.parameters(), module.buffers()) for tensor in tensors
    )
