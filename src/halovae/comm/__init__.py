"""The only door to torch.distributed: groups of ranks, exchanges of tensors, small agreements, and who has failed.

Ranks here are always indices in the group; only this package knows global ranks.
"""

from halovae.comm.environment import (
    backend_name,
    default_device,
    default_generator,
    init_from_env,
    keeper_of_parts,
    mesh,
    shutdown,
)
from halovae.comm.group import Group, GroupComm, connect, world
from halovae.comm.protocol import Comm, Forgone, GraphLane, Message, Pending, SoloComm, Start, Traffic, all_gather

__all__ = [
    "Comm",
    "Forgone",
    "GraphLane",
    "Group",
    "GroupComm",
    "Message",
    "Pending",
    "SoloComm",
    "Start",
    "Traffic",
    "all_gather",
    "backend_name",
    "connect",
    "default_device",
    "default_generator",
    "init_from_env",
    "keeper_of_parts",
    "mesh",
    "shutdown",
    "world",
]
