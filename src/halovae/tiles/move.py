"""Results on their way to the ranks that need them, while later tiles still run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halovae.base.errors import TilingError
from halovae.base.private_torch import pytree
from halovae.calls.dataflow import flat, memory_order
from halovae.calls.record import NetworkCall
from halovae.comm import Comm, Message, Pending
from halovae.tiles.tile_plan import Schedule, TileChain


class Mover:
    """Sends and receives the results of chains, in rounds.

    Round k moves the k-th chain that gets ready on each rank. All ranks know the schedule, so all post the same rounds
    with the same exact sizes, and none has to be asked what comes.

    Args:
        holders: the ranks that need all results.
    """

    def __init__(
        self, comm: Comm, calls: Sequence[NetworkCall], schedule: Schedule, holders: Sequence[int], device: torch.device
    ) -> None:
        self.results: dict[int, list[Tensor]] = {}
        self._comm, self._calls, self.holders, self.device = comm, calls, holders, device
        self._chains = [schedule.of(rank) for rank in range(comm.size)]
        self._rounds = schedule.rounds
        self._posted: list[Pending] = []
        self._arriving: dict[int, list[Tensor]] = {}

    def take(self, found: Mapping[int, Any]) -> None:
        """Take what this rank's network gave for some calls, and begin the rounds whose chain has been run.

        Raises:
            TilingError: it is not as planned.
        """
        self.results |= {number: _used(self._calls[number], result) for number, result in found.items()}
        mine = self._chains[self._comm.rank]
        while len(self._posted) < len(mine) and mine[len(self._posted)].calls[-1] in self.results:
            self._post()

    def _post(self) -> None:
        """Begin the next round."""
        sends: list[Message] = []
        receives: list[Message] = []
        for rank, chains in enumerate(self._chains):
            if len(self._posted) >= len(chains):
                continue
            chain = chains[len(self._posted)]
            if rank == self._comm.rank:
                sends = self._outgoing(chain)
            elif self._comm.rank in self.holders:
                receives += [(rank, buffer) for buffer in self._incoming(chain)]
        self._posted.append(self._comm.post(sends, receives))

    def _outgoing(self, chain: TileChain) -> list[Message]:
        others = [rank for rank in self.holders if rank != self._comm.rank]
        tensors = [flat(tensor) for call in chain.calls for tensor in self.results[call]] if others else []
        return [(rank, tensor) for rank in others for tensor in tensors]

    def _incoming(self, chain: TileChain) -> list[Tensor]:
        for call in chain.calls:
            self._arriving[call] = [
                torch.empty(spec.numel, dtype=spec.dtype, device=self.device) for spec in self._calls[call].specs
            ]
        return [buffer for call in chain.calls for buffer in self._arriving[call]]

    def finish(self) -> None:
        """Post what is left, wait until everything has arrived, and lay it out as it was where it was made.

        Which layout a device's convolution gives is not seen on shapes alone. The VAE's own code goes on with the
        result, and in another layout its sums may have other last bits.
        """
        while len(self._posted) < self._rounds:
            self._post()
        mine = {call: [memory_order(tensor) for tensor in tensors] for call, tensors in self.results.items()}
        orders = {call: order for rank in self._comm.all_gather_object(mine) for call, order in rank.items()}
        for pending in self._posted:
            pending.wait()
        for call, buffers in self._arriving.items():
            specs = self._calls[call].specs
            laid_out = orders.get(call, [spec.order for spec in specs])
            self.results[call] = [
                spec.laid(buffer, order) for spec, buffer, order in zip(specs, buffers, laid_out, strict=True)
            ]


def _used(call: NetworkCall, result: Any) -> list[Tensor]:
    """What the VAE goes on to use of a result, as it was planned."""
    leaves = pytree.tree_leaves(result)
    tensors = [(call.leaves[place], leaves[place]) for place in call.used]
    for spec, tensor in tensors:
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise TilingError(f"the network gave {tuple(tensor.shape)} {tensor.dtype} where {spec} was planned")
    return [tensor for _, tensor in tensors]
