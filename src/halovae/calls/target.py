"""What is parallelized: the two halves of a VAE, and how to run one of them as the VAE itself would."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from halovae.base.errors import InputError, NotExactError
from halovae.base.functions import outside_modes
from halovae.base.options import HALVES, NETWORKS
from halovae.base.private_torch import COMPILED_MODULE, changes, is_compiler_wrapped
from halovae.base.replaced import replaced, value_here
from halovae.base.trees import tensors_in
from halovae.calls.module_facts import TELLING, ModuleFacts
from halovae.comm import keeper_of_parts
from halovae.kernels import autocast

_DEVICE = re.compile(r"\A([a-z]+):\d+\Z")
"""A device with its number, as text."""

Call = Callable[..., Any]


class Holder(Protocol):
    """Who has taken the place of halves of a VAE."""

    def release(self, half: str) -> None:
        """Give the VAE its own half back."""
        ...


class Substitute:
    """Stands in a module for one of its methods. Copies and pickles of the module have the method itself.

    Attributes:
        original: the method.
        own: what the module's `__dict__` had of that name before: nothing, or what compilers and hooks had put there.
        is_used: whether it still stands there, or in what others have wrapped around it.
    """

    def __init__(self, owner: nn.Module, name: str, call: Call, half: str, holder: Holder) -> None:
        self.original: Call = getattr(owner, name)
        functools.update_wrapper(self, self.original, updated=())  # A compiler would know a compiled one by its own.
        self.owner, self.name, self.half, self.holder = owner, name, half, holder
        self.own: Any = owner.__dict__.get(name)
        self.is_used = True
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)

    def put(self) -> None:
        self.owner.__dict__[self.name] = self
        self.owner.__dict__[_STATE] = functools.partial(_state_of, self.owner)

    def remove(self) -> None:
        """Does nothing where others have put something else in its place since."""
        self.is_used, attributes = False, self.owner.__dict__
        if attributes.get(self.name) is self:
            del attributes[self.name]
            if self.own is not None:
                attributes[self.name] = self.own
        if not any(isinstance(value, Substitute) for value in attributes.values()):
            attributes.pop(_STATE, None)


_STATE = "__getstate__"


def _state_of(module: nn.Module) -> Any:
    """What copies and pickles of a module get: as if nothing had taken the place of its methods."""
    inherited = getattr(type(module), _STATE, None)  # From Python 3.11 on every object has one.
    state = inherited(module) if inherited else module.__dict__
    if not isinstance(state, dict):
        return state
    found = cast("dict[str, Any]", state)
    own = {name: value.own for name, value in found.items() if isinstance(value, Substitute)}
    others = {name: value for name, value in found.items() if name not in (_STATE, *own)}
    return others | {name: value for name, value in own.items() if value is not None}


def substitutes(vae: Any) -> dict[str, Substitute]:
    """What stands in for the halves of a VAE (or of a pipeline's): of each half where something does.

    Raises:
        InputError: there is no VAE.
    """
    places = _places(_module_of(vae), HALVES)
    found = {half: _substitute(getattr(owner, name)) for half, (owner, name) in places.items()}
    return {half: value for half, value in found.items() if value is not None}


def _substitute(call: Any) -> Substitute | None:
    """What stands in for a method, also where something has been wrapped around it."""
    while call is not None:
        if isinstance(call, Substitute) and call.is_used:
            return call
        call = getattr(call, "__wrapped__", None)
    return None


def _module_of(vae: Any) -> nn.Module:
    module = vae if isinstance(vae, nn.Module) else getattr(vae, "vae", None)
    if not isinstance(module, nn.Module):
        raise InputError("there is no VAE: pass an nn.Module with encode or decode, or a pipeline with a .vae")
    # These wrap a module whose weights each rank has whole, or one that is to be compiled.
    while isinstance(module, (DistributedDataParallel, DataParallel)) or is_compiler_wrapped(module):
        module = cast("nn.Module", getattr(module, "module", None) or getattr(module, COMPILED_MODULE))
    return module


def _places(vae: nn.Module, halves: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
    """Module and name of the method that runs each half, where there is one."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for half in halves:
        module = getattr(vae, NETWORKS[half], None)
        if callable(getattr(vae, half, None)):
            found[half] = vae, half
        elif isinstance(module, nn.Module):
            found[half] = module, "forward"
    return found


class Target:
    """A VAE: an nn.Module with `encode` / `decode` methods, or else `encoder` / `decoder` modules.

    Args:
        vae: the module, or a pipeline that has one as `.vae`; of a data-parallel wrapper, what it wraps.
        halves: which of the two are meant.

    Attributes:
        originals: the VAE's own halves, whatever stands in for them now.
        facts: what is known of the VAE's modules.

    Raises:
        InputError: it has neither, or this rank has a part of its weights only.
    """

    def __init__(self, vae: Any, halves: Sequence[str] = HALVES) -> None:
        self.vae = _module_of(vae)
        self.name = type(self.vae).__name__
        if keeper := keeper_of_parts(self.vae):
            raise InputError(
                f"the weights of {self.name} are in parts on the ranks ({keeper}): halovae cuts the picture and needs "
                "them whole on each rank; load this VAE without FSDP or tensor parallelism"
            )
        self._places = _places(self.vae, halves)
        if not self._places:
            wanted = ", ".join([*halves, *(NETWORKS[half] for half in halves)])
            raise InputError(f"{self.name} has none of {wanted}: it is not a VAE that can be run so")
        self.facts = ModuleFacts(self.vae)
        self._standing: dict[str, Substitute] = {}
        self._digest: tuple[Any, str] | None = None
        self.originals: dict[str, Call] = {}
        for half, (owner, name) in self._places.items():
            call = getattr(owner, name)
            standing = _substitute(call)
            if standing is not None and standing is not call:
                raise InputError(
                    f"{self.name}.{half} is parallelized, and something is wrapped around it: "
                    "call halovae.restore(vae) before it is parallelized anew"
                )
            self.originals[half] = standing.original if standing else call

    def replace(self, half: str, call: Call, holder: Holder) -> None:
        """Let `call` stand in for a half, also where another one does so far."""
        owner, name = self._places[half]
        before = owner.__dict__.get(name)
        if isinstance(before, Substitute):
            before.holder.release(before.half)
        self._standing[half] = Substitute(owner, name, call, half, holder)
        self._standing[half].put()

    def restore(self, half: str) -> None:
        """Put back what the instance had: nothing, or what compilers and hooks had put there."""
        if half in self._standing:
            self._standing.pop(half).remove()

    @property
    def comes_tiled(self) -> bool:
        """Whether the VAE runs in tiles now as it did when it was made, before anybody could ask for it, or in no other
        way.

        Its tiles are then what its results mean: those without are other ones, which nobody has trained it for.
        """
        return (bool(getattr(self.vae, "use_tiling", False)) and self._was_made_tiled) or self.tiles_only

    @functools.cached_property
    def _was_made_tiled(self) -> bool:
        twin = _twin(self.vae)
        return not hasattr(self.vae, "enable_tiling") if twin is None else bool(getattr(twin, "use_tiling", False))

    @property
    def tiles_only(self) -> bool:
        """See `runs_in_tiles_only`."""
        return runs_in_tiles_only(self.vae)

    def check_exact(self, asked: str, otherwise: str) -> None:
        """Refuse exact mode where it would give another result than the VAE itself, and nobody has asked for that.

        Args:
            asked: how exact mode was asked for.
            otherwise: what to do for the un-tiled result.
        """
        if self.tiles_only:
            raise InputError(f"{asked}: {self.name} runs in tiles only, there is no un-tiled result; leave {asked} out")
        if self.comes_tiled:
            raise InputError(
                f"{asked}: {self.name} comes tiled, its tiles are its own result and the un-tiled one differs; leave "
                f"{asked} out for its own, or {otherwise}"
            )

    def check_no_gradients(self, tensors: list[Tensor]) -> None:
        """Refuse to run where the un-parallel VAE would record a graph."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return
        if any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.vae.parameters()):
            raise InputError(
                "halovae computes no gradients: call under torch.no_grad() or torch.inference_mode(), "
                "or call vae.requires_grad_(False)"
            )

    def run_untiled(self, half: str, *args: Any, **kwargs: Any) -> Any:
        """The un-parallel half without spatial tiles.

        Raises:
            NotExactError: the VAE knows no other way than tiles.
        """
        try:
            with self._tiled(False):
                return self.originals[half](*args, **kwargs)
        except NotImplementedError as error:
            if isinstance(error, NotExactError) or not self.needs_tiles(half, *args, **kwargs):
                raise
            raise NotExactError(f"{self.name}.{half} refuses to run without spatial tiles: {error}") from error

    @contextmanager
    def _tiled(self, on: bool) -> Iterator[None]:
        """Within it, the VAE tiles in space or does not, in this thread; what it does in time stays as configured."""
        with replaced(self.vae, "use_tiling", on, here=True) if hasattr(self.vae, "use_tiling") else nullcontext():
            yield

    def needs_tiles(self, half: str, *args: Any, **kwargs: Any) -> bool:
        """Whether what the VAE says not to implement is implemented in spatial tiles. Its network does not run."""
        return self._refuses(False, half, args, kwargs) and not self._refuses(True, half, args, kwargs)

    @outside_modes
    def _refuses(self, tiled: bool, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the VAE says that it is not implemented, before it has called its network."""
        network = dict(self.vae.named_children()).get(NETWORKS[half])
        if network is None or "use_tiling" not in vars(self.vae):
            return False

        def stop(module: nn.Module, args: Any) -> None:
            raise _Called

        hook = network.register_forward_pre_hook(stop)
        try:
            with self._tiled(tiled), replaced(self.vae, NETWORKS[half], network):  # Past what stands in for it.
                self.originals[half](*args, **kwargs)
        except NotImplementedError:
            return True
        except (_Called, Exception):  # Whatever a model's own method raises.
            return False
        finally:
            hook.remove()
        return False

    def settings(self) -> tuple[tuple[str, Any], ...]:
        """The plain attributes of the VAE: what it does in a call may depend on them."""
        plain = ((name, value_here(value)) for name, value in vars(self.vae).items() if isinstance(value, TELLING))
        return tuple(sorted(plain))

    def kind(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What a call depends on besides the weights and the values of its tensors."""
        tensors = [(tuple(t.shape), t.dtype, t.device) for t in tensors_in((args, kwargs))]
        others = [*map(in_words, args), *((name, in_words(value)) for name, value in sorted(kwargs.items()))]
        return half, *tensors, *others, self.settings(), autocast.state()

    def digest(self) -> str:
        """A fingerprint of architecture and weights; equal weights give equal digests on every device.

        All weights are read for it, unless torch knows that none has been written into since the last time.
        """
        weights: dict[str, Tensor] = self.vae.state_dict(keep_vars=True)
        marks = [(name, t.data_ptr(), t.device, changes(t)) for name, t in weights.items()]
        counted = all(changes is not None for *_, changes in marks)
        if self._digest is None or self._digest[0] != marks or not counted:
            self._digest = marks, self._digest_of(weights)
        return self._digest[1]

    def _digest_of(self, weights: Mapping[str, Tensor]) -> str:
        sums: list[Tensor] = []
        names: list[str] = []
        for name, tensor in weights.items():
            names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
            if not tensor.is_meta:
                sums.append(_bit_sum(tensor))
        config = getattr(self.vae, "config", None)
        settings = dict(config) if isinstance(config, Mapping) else {}
        settings = {name: value for name, value in settings.items() if not str(name).startswith("_")}
        values = [total for group in _by_device(sums) for total in torch.stack(group).cpu().tolist()]
        return hashlib.sha256("\n".join([told(settings), *names, *map(str, values)]).encode()).hexdigest()


_TILES_ONLY: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
"""By class, see `runs_in_tiles_only`."""


def runs_in_tiles_only(vae: nn.Module) -> bool:
    """Whether the code of a VAE's class says that nothing but tiles is implemented, whatever its halves are now."""
    if "use_tiling" not in vars(vae):
        return False
    if (cls := type(vae)) not in _TILES_ONLY:
        twin, picture = _twin(vae), torch.empty((1,) * 5, device="meta")
        _TILES_ONLY[cls] = twin is not None and any(Target(twin).needs_tiles(half, picture) for half in HALVES)
    return _TILES_ONLY[cls]


def tile_grid(vae: nn.Module) -> tuple[tuple[int, int], ...]:
    """Of a VAE that runs in tiles only and leaves out what whole tiles don't cover: the size of a tile and the step to
    the next one, in pixels, for frames, rows and columns. Empty for others."""
    kernel, stride = vars(vae).get("kernel"), vars(vae).get("stride")
    return tuple(zip(kernel, stride, strict=True)) if runs_in_tiles_only(vae) and kernel and stride else ()


def _twin(vae: Any) -> Any:
    """Another one of its class and config, which has shapes and no weights; None where that can't be made."""
    cls: Any = type(vae)
    try:
        known = inspect.signature(cls.__init__).parameters
        given = {name: value for name, value in dict(vae.config).items() if name in known}
        with torch.device("meta"):
            return cls(**given)
    except Exception:  # Whatever a constructor says that needs more than its config.
        return None


class _Called(BaseException):
    """The network is called."""


def in_words(value: Any) -> str:
    """All of a plain value, of another one its type; the same on all ranks."""
    return told(value) if value is None or isinstance(value, TELLING) else type(value).__name__


def told(value: Any) -> str:
    """A value in words that equal values have in every process: without addresses, orders of hashing, and the number
    of a device, which is each rank's own. Of an object, its type."""
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, str):
        return repr(_DEVICE.sub(r"\1", value))
    if value is None or isinstance(value, (bool, int, float, complex, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return f"{{{', '.join(sorted(f'{told(key)}: {told(item)}' for key, item in entries.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(told, cast('set[Any]', value))))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(told, cast('list[Any]', value)))}]"
    if isinstance(value, functools.partial):
        return told([cast("Any", value.func), value.args, value.keywords])
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _bit_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's elements read as integers: exact, so independent of order and device."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(integers[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return list(groups.values())
