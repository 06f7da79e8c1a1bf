"""Children of a fork own nothing that their parent shares with others: no descriptor, no lock, no word to say.

A fork copies descriptors, locks and finalizers, and of the threads only the one that forks. So a child would keep
connections of a dead parent open, wait for locks that nobody gives back, and take leave in its parent's name.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Owner = TypeVar("Owner")
Lock = TypeVar("Lock", bound=Any)

_owners: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def owned_here(owner: Owner, disown: Callable[[Owner], None]) -> None:
    """Call `disown(owner)` in every child that this process forks, for as long as the owner lives.

    Args:
        owner: who has something that a forked child must not have.
        disown: lets go of it, without a lock and without a word to anybody else. Children of children call it again.
    """
    _owners[owner] = disown


def free_in_children(lock: Lock) -> Lock:
    """A lock of `threading` that no forked child finds held: who held it is not there to give it back."""
    owned_here(lock, lambda held: held._at_fork_reinit())
    return lock


def _disown_all() -> None:
    for owner, disown in tuple(_owners.items()):
        disown(owner)


if hasattr(os, "register_at_fork"):  # Else there are no forks.
    os.register_at_fork(after_in_child=_disown_all)
