"""The lower-level way: run any stack of modules on shards, without a VAE around it."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from halovae.base.errors import InputError, counted
from halovae.base.options import AllOptions, Axis
from halovae.base.trees import map_tensors
from halovae.comm import Group, connect
from halovae.exact.mesh import Mesh, plan_shards
from halovae.exact.run import check_whole, gather, scatter
from halovae.exact.shard_mode import ShardMode

T = TypeVar("T")


class Sharded(ShardMode):
    """Within it, torch functions treat what `scatter` returned as shards of a whole. Made by `sharded`."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._mesh = mesh

    def scatter(self, tensor: Tensor, ratio: int = 1) -> Tensor:
        """This rank's shard of `[..., height, width]`, which every rank has whole.

        Args:
            tensor: the whole.
            ratio: what the network divides height and width by; cuts fall on its multiples.

        Raises:
            InputError: the tensor is too small for all ranks.
        """
        height, width = tensor.shape[-2:]
        plan = plan_shards(height, width, ratio, self._mesh.size, self._mesh.shape)
        if plan.shape != self._mesh.shape:
            raise InputError(f"{height} x {width} is too small for {self._mesh.shape} shards: use fewer ranks")
        return scatter(self._mesh, tensor, plan.bounds)

    def gather(self, value: T) -> T:
        """The whole of a sharded tensor, or of every one in a structure, on every rank.

        Args:
            value: a result of the network on shards: a tensor, or anything that holds tensors.

        Raises:
            NotExactError: it holds a shard where none can be put together.
        """
        whole = map_tensors(lambda t: gather(self._mesh, t), value)
        check_whole(whole)
        return whole


def sharded(group: Group | None = None, *, axis: Axis = "height") -> Sharded:
    """A context manager that runs any modules on spatial shards, one per rank of the group.

    Args:
        group: the ranks; default: the world.
        axis: "height", "width", or (rows, columns) with rows * columns equal to the number of ranks.

    Raises:
        InputError: the grid has not one shard per rank.

    Examples:
        >>> with torch.no_grad(), halovae.sharded() as shards:
        ...     whole = shards.gather(network(shards.scatter(image)))
    """
    AllOptions(axis=axis)  # checks it
    comm = connect(group)
    shapes = {"height": (comm.size, 1), "width": (1, comm.size), "auto": (comm.size, 1)}
    shape = shapes[axis] if isinstance(axis, str) else axis
    if shape[0] * shape[1] != comm.size:
        raise InputError(
            f"axis {axis} makes {shape[0] * shape[1]} shards but the group has {counted(comm.size, 'rank')}"
        )
    return Sharded(Mesh(comm, shape))
