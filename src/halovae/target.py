"""What is parallelized: the two halves of a VAE, and how to run one of them as the VAE itself would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halovae.config import HALVES
from halovae.errors import InputError, NotExactError
from halovae.trees import tensors_in

_OURS = "_halovae_call"
_MODULES = {"encode": "encoder", "decode": "decoder"}

PLAIN = (bool, int, float, str)
"""Types of values that say all about themselves."""

Call = Callable[..., Any]


class Target:
    """A VAE: an nn.Module with `encode` / `decode` methods, or else `encoder` / `decoder` modules.

    Args:
        vae: the module, or a pipeline that has one as `.vae`.
        halves: which of the two are meant.

    Raises:
        InputError: it has neither, or is parallelized already.
    """

    def __init__(self, vae: Any, halves: Sequence[str] = HALVES) -> None:
        vae = vae if isinstance(vae, nn.Module) else getattr(vae, "vae", None)
        if not isinstance(vae, nn.Module):
            raise InputError("there is no VAE: pass an nn.Module with encode or decode, or a pipeline with a .vae")
        self.vae: nn.Module = vae
        self.name = type(vae).__name__
        self._places = {half: place for half in halves if (place := self._find(half))}
        if not self._places:
            wanted = ", ".join([*halves, *(_MODULES[half] for half in halves)])
            raise InputError(f"{self.name} has none of {wanted}: it is not a VAE that can be run so")
        if any(hasattr(getattr(owner, name), _OURS) for owner, name in self._places.values()):
            raise InputError(f"{self.name} is parallelized already: call restore() on its handle first")
        self._own = {half: owner.__dict__.get(name) for half, (owner, name) in self._places.items()}
        self.originals: dict[str, Call] = {h: getattr(owner, name) for h, (owner, name) in self._places.items()}

    def _find(self, half: str) -> tuple[nn.Module, str] | None:
        if callable(getattr(self.vae, half, None)):
            return self.vae, half
        module = getattr(self.vae, _MODULES[half], None)
        return (module, "forward") if isinstance(module, nn.Module) else None

    def replace(self, half: str, call: Call) -> None:
        owner, name = self._places[half]
        setattr(call, _OURS, True)
        owner.__dict__[name] = call

    def restore(self) -> None:
        """Put back what the instance had: nothing, or what compilers and hooks had put there."""
        for half, (owner, name) in self._places.items():
            if hasattr(owner.__dict__.get(name), _OURS):
                owner.__dict__.pop(name)
                if self._own[half] is not None:
                    owner.__dict__[name] = self._own[half]

    def check_no_gradients(self, tensors: list[Tensor]) -> None:
        """Refuse to run where the un-parallel VAE would record a graph.

        Raises:
            InputError: gradients are on and an input or a parameter asks for them.
        """
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
            with self._untiled():
                return self.originals[half](*args, **kwargs)
        except NotImplementedError as error:
            if isinstance(error, NotExactError):
                raise
            raise NotExactError(f"{self.name}.{half} refuses to run without spatial tiles: {error}") from error

    @contextmanager
    def _untiled(self) -> Iterator[None]:
        """Within it, the VAE does not tile in space; what it does in time stays as configured."""
        before = getattr(self.vae, "use_tiling", None)
        if before:
            self.vae.use_tiling = False  # type: ignore[assignment]
        try:
            yield
        finally:
            if before:
                self.vae.use_tiling = before  # type: ignore[assignment]

    def settings(self) -> tuple[tuple[str, Any], ...]:
        """The plain attributes of the VAE: what it does in a call may depend on them."""
        return tuple(sorted((name, value) for name, value in vars(self.vae).items() if isinstance(value, PLAIN)))

    def kind(self, half: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What a call depends on besides the weights and the values of its tensors."""
        tensors = [(tuple(t.shape), t.dtype, t.device) for t in tensors_in((args, kwargs))]
        others = [*map(in_words, args), *((name, in_words(value)) for name, value in sorted(kwargs.items()))]
        return half, *tensors, *others, self.settings()

    def digest(self) -> str:
        """A fingerprint of architecture and weights; equal weights give equal digests on every device."""
        sums: list[Tensor] = []
        names: list[str] = []
        for name, tensor in self.vae.state_dict().items():
            names.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
            if not tensor.is_meta:
                sums.append(_bit_sum(tensor))
        config = getattr(self.vae, "config", None)
        settings = dict(config) if isinstance(config, Mapping) else {}
        settings = {name: value for name, value in settings.items() if not str(name).startswith("_")}
        config = json.dumps(settings, default=str, sort_keys=True)
        values = [total for group in _by_device(sums) for total in torch.stack(group).cpu().tolist()]
        return hashlib.sha256("\n".join([config, *names, *map(str, values)]).encode()).hexdigest()


def in_words(value: Any) -> str:
    """All of a plain value, of another one its type."""
    return repr(value) if value is None or isinstance(value, PLAIN) else type(value).__name__


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
