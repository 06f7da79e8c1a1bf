"""Which rows go from which rank to which, when an operator needs rows that another rank owns."""

from __future__ import annotations

from typing import NamedTuple

from halovae.exact.layout import Layout, require_axis
from halovae.exact.mesh import Mesh
from halovae.geometry import Extent, missing, overlap


class Transfer(NamedTuple):
    """A message: rank of the peer, and the global positions that go to it or come from it."""

    peer: int
    rows: Extent


def transfers(mesh: Mesh, layout: Layout, dim: int, needs: tuple[Extent, ...]) -> tuple[list[Transfer], list[Transfer]]:
    """What this rank sends and what it receives, in the order in which all ranks post it."""
    factor = require_axis(layout, dim)
    cut, me = factor.cut, mesh.part(factor.axis)
    sends: list[Transfer] = []
    receives: list[Transfer] = []
    for part, peer in enumerate(mesh.peers(factor.axis)):
        if part == me:
            continue
        for wants, owns, found in ((part, me, sends), (me, part, receives)):
            for piece in missing(cut.extents[wants], needs[wants], cut.size):
                rows = overlap(piece, cut.owned(owns))
                if rows:
                    found.append(Transfer(peer, rows))
    return sends, receives
