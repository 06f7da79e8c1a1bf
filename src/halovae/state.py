"""State that a network keeps between its calls: attributes of its modules, and lists and dicts in its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

Place = tuple[int, str]
"""Number of the module, name of the attribute."""

_MISSING = object()


class ModuleState:
    """The attributes of a network's modules that have changed since this was made.

    Args:
        network: the network. Parameters and buffers don't count; nor do names with an underscore in front.
    """

    def __init__(self, network: nn.Module) -> None:
        self._modules = list(network.modules())
        self._base = self._now()

    def _now(self) -> dict[Place, Any]:
        return {
            (number, name): value
            for number, module in enumerate(self._modules)
            for name, value in module.__dict__.items()
            if not name.startswith("_")
        }

    def changed(self) -> dict[Place, Any]:
        base = self._base
        return {place: value for place, value in self._now().items() if value is not base.get(place, _MISSING)}

    def set(self, values: dict[Place, Any]) -> None:
        """Change exactly these attributes; the others become what they were at first."""
        for place in self._now().keys() | self._base.keys():
            value = values.get(place, self._base.get(place, _MISSING))
            attributes, name = self._modules[place[0]].__dict__, place[1]
            if value is _MISSING:
                attributes.pop(name, None)
            elif attributes.get(name, _MISSING) is not value:
                attributes[name] = value

    @contextmanager
    def kept(self) -> Iterator[None]:
        """After it, all attributes are as before it."""
        before = self.changed()
        try:
            yield
        finally:
            self.set(before)


@contextmanager
def undone_by_failure(network: nn.Module) -> Iterator[None]:
    """After an exception in it, all attributes are as before it.

    Some networks keep caches as attributes and clear them at the end of a call; a call that is broken off leaves them
    full, and the next one would go on with them.
    """
    before = [(module, dict(vars(module))) for module in network.modules()]
    try:
        yield
    except BaseException:
        for module, attributes in before:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)
        raise


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
    if isinstance(old, tuple) and isinstance(new, tuple):
        pair = cast("tuple[Any, ...]", old), cast("tuple[Any, ...]", new)
        return tuple(refill(a, b) for a, b in zip(*pair, strict=True))
    return new
