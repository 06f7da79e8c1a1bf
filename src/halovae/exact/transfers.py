"""Which rows go from which rank to which, when an operator needs rows that another rank owns."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from halovae.base.geometry import Cut, Extent, missing, overlap
from halovae.exact.layout import Layout, require_axis
from halovae.exact.mesh import Mesh


class Transfer(NamedTuple):
    """A message: rank of the peer, and the global positions that go to it or come from it."""

    peer: int
    rows: Extent


def transfers(mesh: Mesh, layout: Layout, dim: int, needs: tuple[Extent, ...]) -> tuple[list[Transfer], list[Transfer]]:
    """What this rank sends and what it receives, in the order in which all ranks post it."""
    if 0 in layout.shape:  # there is nothing to send, on any rank
        return [], []
    factor = require_axis(layout, dim)
    peers = mesh.peers(factor.axis)
    sends, receives = _between_parts(factor.cut, mesh.part(factor.axis), needs)
    return [Transfer(peers[part], rows) for part, rows in sends], [
        Transfer(peers[part], rows) for part, rows in receives
    ]


_Moves = list[tuple[int, Extent]]


@lru_cache(maxsize=4096)
def _between_parts(cut: Cut, me: int, needs: tuple[Extent, ...]) -> tuple[_Moves, _Moves]:
    """As (part, rows): what part `me` sends and receives."""
    sends: _Moves = []
    receives: _Moves = []
    for part in range(cut.parts):
        if part == me:
            continue
        for wants, owns, found in ((part, me, sends), (me, part, receives)):
            for piece in missing(cut.extents[wants], needs[wants], cut.size):
                rows = overlap(piece, cut.owned(owns))
                if rows:
                    found.append((part, rows))
    return sends, receives
