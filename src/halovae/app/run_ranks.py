"""From a command's options to its ranks: this process, processes started for it, or those of torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from halovae.app import launch
from halovae.app.run_options import RunOptions
from halovae.app.watch import guarded
from halovae.base.errors import InputError

if TYPE_CHECKING:
    from halovae.app.session import Session


def run(words: Sequence[str], options: RunOptions, body: Callable[[Session], None]) -> int:
    """Run `body` on every rank; further ranks are started with the words of the command line. Returns the exit code."""
    here = launch.place()
    busy = options.vae_patch_parallel_size
    asked = busy or 1 if options.ranks is None else options.ranks
    ranks = asked if here is None else here.world_size
    if options.ranks not in (None, ranks):
        raise InputError(f"--ranks {options.ranks}: torchrun has started {ranks}; leave --ranks out")
    if here is None:
        launch.check_ranks(ranks)
    if busy is not None and busy > ranks:
        raise InputError(f"--vae-patch-parallel-size {busy}: there are only {ranks} ranks; start more or ask for fewer")
    _check_axis(options.axis, busy or ranks)
    if here is None and sys.stderr.isatty():
        # Libraries take seconds to import. The first stage writes over it.
        sys.stderr.write(f"starting {ranks} rank{'s' * (ranks != 1)}\r")
    if here is None and ranks > 1:
        return launch.run_ranks(words, ranks)
    with guarded():
        # Not before the signals are taken care of: importing torch and diffusers takes seconds.
        from halovae.app.session import session

        with session(options, here or launch.Place()) as opened:
            body(opened)
    return 0


def _check_axis(axis: str | tuple[int, int], ranks: int) -> None:
    if isinstance(axis, tuple) and axis[0] * axis[1] > ranks:
        rows, columns = axis
        raise InputError(f"--axis {rows}x{columns} needs {rows * columns} ranks, but there are {ranks}: add --ranks")
