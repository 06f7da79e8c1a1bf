"""The default process group and the devices of this process."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from halovae.base.errors import InputError


def init_from_env(device: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Does nothing in a world of one, or when a group exists. The backend is the default one of the device.

    Raises:
        InputError: the environment names a world but not this process's place in it.
    """
    if launched_ranks() <= 1 or dist.is_initialized():
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"WORLD_SIZE is set but {', '.join(missing)} is not: start with torchrun or --ranks")
    kind = torch.device(device).type if device else default_device().type
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(dist.get_default_backend_for_device(kind), timeout=timeout)


def launched_ranks() -> int:
    """How many processes a launcher such as torchrun says that it has started; 1 where there is none."""
    said = os.environ.get("WORLD_SIZE", "1")
    return int(said) if said.isdecimal() else 1


def shutdown() -> None:
    """Leave the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """All ranks of the world as a grid with named dimensions. Called on every rank."""
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def default_device() -> torch.device:
    """The current accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random functions on `device` use when they are given none."""
    if device.type in ("cpu", "meta"):
        return torch.default_generator
    generators = torch.get_device_module(device).default_generators
    index: int | None = getattr(device, "index", None)  # None for "cuda", whatever its stub says
    return generators[torch.accelerator.current_device_index() if index is None else index]


def keeper_of_parts(module: torch.nn.Module) -> str | None:
    """What keeps the weights of a module in parts, one on each rank; None where each rank has them whole."""
    # Who has not imported these has none of them.
    tensors, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    weights = (weight for weights in (module.parameters(), module.buffers()) for weight in weights)
    if tensors and any(isinstance(weight, tensors.DTensor) for weight in weights):
        return "DTensor"
    if fsdp and any(isinstance(part, fsdp.FullyShardedDataParallel) for part in module.modules()):
        return "FullyShardedDataParallel"
    return None


def backend_name() -> str:
    """The default group's backend, or "none" in a world of one."""
    return str(dist.get_backend()) if dist.is_initialized() else "none"
