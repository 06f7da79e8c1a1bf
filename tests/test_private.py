"""What breaks when a name goes that libraries do not promise to keep: each is used here as the code uses it.

Versions that lack one fail here, with its purpose for a name, and not in the middle of a picture.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halovae.base import private_diffusers, private_torch


class Operators(private_torch.TorchDispatchMode):
    """Lists the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Counts the functions that it sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Shape(torch.Tensor):
    """A shape whose operators run on something else."""

    held: Tensor

    __torch_function__ = private_torch.no_functions

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(arg.held if isinstance(arg, Shape) else arg for arg in args), **(kwargs or {}))


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_operators_are_seen_and_passed_by() -> None:
    x = torch.ones(2)
    with Operators() as mode:
        x + 1
        with private_torch.without_modes():
            x * 2
    assert mode.seen == [torch.ops.aten.add.Tensor]


def test_functions_are_seen_and_passed_by() -> None:
    x = torch.ones(2)
    assert not private_torch.function_modes()
    with Functions() as mode, torch.device("cpu"):
        kinds = [type(found) for found in private_torch.function_modes()]
        before = mode.count
        with private_torch.without_functions():
            x + 1
        passed = mode.count
        x + 1
    assert kinds == [Functions, private_torch.DeviceContext]
    assert (passed - before, mode.count - passed) == (0, 1)


def test_a_mode_may_keep_the_compiler_out_of_its_way() -> None:
    """`Meter` overrides it: asked by torch under this name, else every operator of a prediction takes longer."""
    assert isinstance(inspect.getattr_static(private_torch.TorchDispatchMode, "_should_skip_dynamo"), classmethod)


def test_fake_tensors_have_a_device_and_are_cast() -> None:
    with private_torch.FakeTensorMode():
        x = torch.empty(2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert private_torch.autocast_is_on()
            assert (x @ x).dtype == torch.bfloat16
    assert not private_torch.autocast_is_on()
    assert private_torch.FAKE_LOGGER in logging.root.manager.loggerDict


def test_structures_are_taken_apart_and_put_together() -> None:
    leaves, structure = private_torch.pytree.tree_flatten(({"a": 1}, [2, (3, None)]))
    assert private_torch.pytree.tree_leaves([leaves]) == leaves
    assert private_torch.pytree.tree_unflatten(leaves, structure) == ({"a": 1}, [2, (3, None)])


def test_a_shape_stands_for_a_tensor() -> None:
    shape = private_torch.wrapper(Shape, (2, 3), strides=(3, 1), dtype=torch.float64, device=torch.device("cpu"))
    shape.held = torch.ones(2, 3, dtype=torch.float64)
    assert (shape.shape, shape.stride(), shape.dtype, type(shape)) == ((2, 3), (3, 1), torch.float64, Shape)
    with Functions() as mode:  # Modes see it; the class itself has no say.
        result = shape + 1
    assert (mode.count, type(result)) == (1, Tensor)
    assert torch.equal(result, shape.held + 1)


def test_writes_are_counted_and_memory_told_apart() -> None:
    x = torch.zeros(4)
    before = private_torch.version(x)
    x[1:].add_(1)
    assert private_torch.version(x) == private_torch.changes(x) == before + 1
    with torch.inference_mode():
        assert private_torch.changes(torch.zeros(1)) is None
    number = private_torch.number_of_storage
    one, other = torch.empty(2, device="meta"), torch.empty(2, device="meta")
    assert number(one.untyped_storage()) == number(one[1:].untyped_storage()) != number(other.untyped_storage())


def test_memory_is_borrowed() -> None:
    x = torch.arange(4.0)
    storage = x.untyped_storage()
    borrowed = private_torch.borrow_storage(storage.data_ptr(), x.device, storage.nbytes())
    torch.empty(0).set_(borrowed, 1, (2,), (1,)).zero_()
    assert x.tolist() == [0, 0, 0, 3]


def test_a_broken_capture_gives_its_memory_back() -> None:
    """On a CPU there are only the names; tests/test_accelerators.py runs them."""
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert hasattr(torch._C, name) or not torch.backends.cuda.is_built()


def test_allocations_are_noted() -> None:
    private_torch.profile_memory()
    x = torch.empty(1000, dtype=torch.uint8)
    del x
    assert private_torch.allocations()[:2] == [1000, -1000]


def test_modules_keep_their_own_under_these_names() -> None:
    module = nn.Conv2d(1, 1, 3)
    module.register_buffer("kept", torch.ones(1))
    held = vars(module)
    assert {*private_torch.HOOKS, private_torch.BUFFERS, private_torch.CONVOLUTION_PADDING} <= held.keys()
    assert [*map(set, private_torch.registered(module))] == [{"weight", "bias"}, {"kept"}]
    assert held[private_torch.BUFFERS] is private_torch.registered(module)[1]
    handles = module.register_forward_hook(print), module.register_forward_pre_hook(print)
    assert all(held[name] for name in private_torch.HOOKS)
    for handle in handles:
        handle.remove()
    assert not private_torch.any_global_hook()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert private_torch.any_global_hook()
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of the compiler itself
def test_what_is_given_to_the_compiler_is_known() -> None:
    plain, in_place, wrapped = nn.Linear(1, 1), nn.Linear(1, 1), torch.compile(nn.Linear(1, 1))
    in_place.compile()
    assert private_torch.COMPILED_CALL in vars(in_place)
    assert isinstance(getattr(wrapped, private_torch.COMPILED_MODULE), nn.Linear)
    assert [*map(private_torch.is_given_to_compiler, (plain, in_place, wrapped))] == [False, True, True]
    assert [*map(private_torch.is_compiler_wrapped, (plain, in_place, wrapped))] == [False, False, True]

    def function(x: Tensor) -> Tensor:
        return x

    disabled: Callable[..., Any] = torch.compiler.disable(function)
    assert [*map(private_torch.is_compiled_function, (function, torch.compile(function), disabled))] == [0, 1, 0]
    private_torch.hide_function(disabled)
    assert disabled(torch.ones(1)) == 1


def test_operators_tell_what_they_make() -> None:
    assert private_torch.schema(torch.ops.aten.add_.Tensor).is_mutable
    assert private_torch.schema(torch.ops.aten.view.default).arguments[0].alias_info is not None
    assert private_torch.schema(torch.ops.aten.add.Tensor).returns[0].alias_info is None
    dropout = torch.ops.aten.dropout.default
    assert private_torch.decomposes(dropout)
    assert not private_torch.decomposes(torch.ops.aten.bernoulli.p)
    assert torch.equal(dropout.decompose(torch.ones(3), 0.5, False), torch.ones(3))


def test_groups_of_our_own() -> None:
    """`comm.backends` makes and coalesces them so for a device of its own; gloo shows that the names are there."""
    store = dist.HashStore()
    group = dist.ProcessGroup(store, 0, 1)
    backend = dist.ProcessGroupGloo(store, 0, 1, dist.default_pg_timeout)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    assert callable(group._start_coalescing)
    assert callable(group._end_coalescing)
    options = dist.distributed_c10d._DistributedBackendOptions()
    names = {"store", "group_rank", "group_size", "timeout", "group_id", "global_ranks_in_group"}
    assert names <= set(dir(options))
    assert isinstance(dist.Backend._plugins, dict)
    assert callable(dist.distributed_c10d._get_process_group_store)


# ---- diffusers and accelerate ----------------------------------------------------------------------------------------


def test_hooks_of_libraries_are_seen() -> None:
    module = nn.Linear(1, 1)
    own = module.forward
    assert not private_diffusers.has_library_hook(module)
    add_hook_to_module(module, ModelHook())
    assert vars(module).keys() >= {private_diffusers.HOOK_OF_ACCELERATE, private_diffusers.OLD_FORWARD, "forward"}
    assert getattr(module, private_diffusers.OLD_FORWARD) == own
    remove_hook_from_module(module)
    assert not private_diffusers.has_library_hook(module)
    apply_layerwise_casting(module, torch.bfloat16, torch.float32)
    assert private_diffusers.HOOK_OF_DIFFUSERS in vars(module)


def test_transformers_tell_how_they_are_shared_and_compiled() -> None:
    for cls in (diffusers.WanTransformer3DModel, diffusers.LTXVideoTransformer3DModel):
        assert "hidden_states" in str(private_diffusers.sharing_plan(cls))
        assert private_diffusers.repeats_blocks(cls)
    assert "hidden_states" in (private_diffusers.sharing_plan(diffusers.LTXVideoTransformer3DModel) or {})[""]
    assert private_diffusers.sharing_plan(nn.Linear) is None
    assert not private_diffusers.repeats_blocks(nn.Linear)


def test_attention_exchanges_by_a_setting_of_its_own() -> None:
    from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

    processor = LTXVideoAttnProcessor()
    processor._parallel_config = object()
    private_diffusers.leave_whole(processor)
    assert processor._parallel_config is LTXVideoAttnProcessor._parallel_config is None


def test_pipelines_tell_their_parts_and_siblings() -> None:
    import diffusers.pipelines.wan

    assert {"WanPipeline", "WanImageToVideoPipeline"} <= set(private_diffusers.siblings(diffusers.pipelines.wan))
    pipeline = diffusers.WanImageToVideoPipeline
    assert private_diffusers.needed_parts(pipeline) >= {"vae", "transformer", "scheduler", "text_encoder"}
    assert "image_encoder" in private_diffusers.optional_parts(pipeline)
