"""Names that torch does not promise to keep, each with what it is for. tests/test_private.py says what breaks without.

Those of torch.distributed are in `comm.backends`, and operators of torch are told by their schemas where they are used.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch import autograd as _autograd
from torch._subclasses import fake_tensor as _fake_tensor
from torch.utils import _device, _python_dispatch, _pytree

# ---- modes -----------------------------------------------------------------------------------------------------------

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Sees every operator, below autograd and autocast: shapes are run and counted there."""
without_modes = _python_dispatch._disable_current_modes
"""Within it, no mode sees an operator: what is repeated, timed or kept is not to be counted as well."""
without_functions: Any = torch._C.DisableTorchFunction
"""Within it, no function mode and no subclass sees a function: it is our own look at a shard, not the network's."""
no_functions: Any = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a subclass that is only to be seen as an operator's argument."""
function_modes: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack
"""The function modes around: somebody's own would not see what is not run again."""
DeviceContext = _device.DeviceContext
"""The function mode of a default device, which changes nothing but the device."""
FakeTensorMode = _fake_tensor.FakeTensorMode
"""Within it, tensors have a device, and no memory: torch is asked there what autocast casts."""
FAKE_LOGGER = _fake_tensor.__name__
"""Name of the logger that tells what fake tensors can't do."""
autocast_is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any type of device, without asking for each: it is asked for every operator."""

# ---- tensors ---------------------------------------------------------------------------------------------------------

pytree = _pytree
"""Takes structures of any types apart, those that diffusers and transformers have entered there too."""
wrapper: Callable[..., Any] = getattr(torch.Tensor, "_make_wrapper_subclass")  # noqa: B009
"""A tensor of a subclass that has a shape, strides, a dtype and a device, and no memory."""
version: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor, or another one in its memory, was written into."""
number_of_storage: Callable[[torch.UntypedStorage], int] = attrgetter("_cdata")
"""Tells storages apart also where they have no address, on the meta device."""
borrow_storage: Any = torch._C._construct_storage_from_data_pointer
"""A storage that does not own its memory: a graph reads it, and the allocator may give it to others."""


def changes(tensor: Tensor) -> int | None:
    """As `version`; None for tensors of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def release_pool(device: torch.device, pool: Any) -> None:
    """End the allocations of a capture that was broken off: else the memory of its graph is never given back."""
    torch._C._cuda_endAllocateToPool(device.index, pool)
    torch._C._cuda_releasePool(device.index, pool)


# ---- allocations -----------------------------------------------------------------------------------------------------


def profile_memory() -> None:
    """Begin to note every allocation on the CPU, which the public profiler only tells by operator."""
    settings = False, True, False, False, False  # memory only
    extra: Any = getattr(torch._C, "_profiler")._ExperimentalConfig()  # noqa: B009
    _autograd._enable_profiler_legacy(_autograd.ProfilerConfig(_autograd.ProfilerState.CPU, *settings, extra))


def allocations() -> list[int]:
    """Stop, and tell the bytes of each; of what was freed, negative."""
    threads: Any = _autograd._disable_profiler_legacy()
    return [e.cpu_memory_usage() for events in threads for e in events if e.kind() == "memory_alloc"]


# ---- modules ---------------------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Attributes of a module that hold what hears of its calls."""
BUFFERS = "_buffers"
"""Attribute of a module that holds its buffers: they are state, as its other attributes are."""
CONVOLUTION_PADDING = "_reversed_padding_repeated_twice"
"""What a convolution keeps beside its settings: a list that is no state."""
COMPILED_CALL = "_compiled_call_impl"
"""Attribute of a module that torch.compile was told to compile in its place."""
COMPILED_MODULE = "_orig_mod"
"""What torch.compile wraps a module as."""
any_global_hook: Callable[[], Any] = nn.modules.module._has_any_global_hook
"""Whether something hears of the calls of all modules."""


def registered(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    """A module's parameters and buffers by name, None among them: asked for at every replay, it has to be quick."""
    return module._parameters, module._buffers


def tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """All that a module holds by name: the modules in it, parameters, buffers, and attributes with these three."""
    return module._modules, module._parameters, module._buffers, vars(module)


def is_compiler_wrapped(module: nn.Module) -> bool:
    """Whether it is what torch.compile makes of a module."""
    return COMPILED_MODULE in module._modules


def is_given_to_compiler(module: nn.Module) -> bool:
    """Whether torch.compile was given the module, in its place or wrapped."""
    return module._compiled_call_impl is not None or is_compiler_wrapped(module)


def is_compiled_function(value: Any) -> bool:
    """Whether it is what torch.compile makes of a function, not torch.compiler.disable."""
    return hasattr(value, "_torchdynamo_orig_callable") and not getattr(value, "_torchdynamo_disable", False)


def hide_function(call: Any) -> None:
    """Take from what torch.compiler.disable made the way to the function itself, which a compiler would compile."""
    del call._torchdynamo_orig_callable


# ---- operators -------------------------------------------------------------------------------------------------------

schema: Callable[[Any], Any] = attrgetter("_schema")
"""What an operator reads, writes and makes."""


def decomposes(func: Any) -> bool:
    """Whether an operator is written as others, which inference mode leaves undone."""
    return func._can_decompose()
