"""`halovae doctor`: the versions of an installation, and the proof that its ranks compute exactly."""

from __future__ import annotations

import platform
from dataclasses import replace

import torch
import typer
from torch import Tensor

from halovae import comm
from halovae.app import launch
from halovae.app.session import Session
from halovae.app.tables import columns, kept_verdicts
from halovae.base import verdicts
from halovae.base.errors import InputError, VerificationError
from halovae.base.files import reason
from halovae.comm.bandwidth import measure_all
from halovae.evaluation.report.page import version_of
from halovae.media.vae_limits import latent_of, sample_of

_PACKAGES = ("halovae", "torch", "diffusers", "safetensors", "av", "pillow", "numpy")
_LIMITS = {"float64": 1e-12, "float32": 1e-2}
"""Of the largest value. A missing or misplaced halo is off by the values themselves; in float32 an accelerator may
compute with the 10 bits of TF32, another algorithm for another shape."""


def versions() -> str:
    """Of what an installation is made of."""
    rows = [("python", platform.python_version()), ("system", f"{platform.platform()}, {launch.cores()} cores")]
    return columns([*rows, *((name, version_of(name)) for name in _PACKAGES), ("cache", kept_verdicts())])


def clear_cache() -> None:
    """Forget what trials have found out on this machine."""
    before = kept_verdicts()
    try:
        verdicts.clear()
    except OSError as error:
        raise InputError(f"can't empty {verdicts.folder()}: {reason(error)}") from error
    typer.echo(f"forgotten: {before}")


def prove(session: Session) -> None:
    """Measure the link between ranks, and compare them with one rank. Called on every rank."""
    links, count = measure_all(session.group, session.device), torch.accelerator.device_count()
    accelerator = torch.accelerator.current_accelerator() if count else None
    rows = [
        ("devices", "cpu" if accelerator is None else f"cpu, {count} {accelerator.type}"),
        ("ranks", f"{session.group.size} on {session.device.type}, backend {comm.backend_name()}"),
        *(("link", f"rank {one} to {one + 1}: {link}") for one, link in enumerate(links)),
    ]
    if session.is_first:
        typer.echo(columns(rows))
    errors, limit, shards = _exactness(session)
    if session.is_first:
        found = ", ".join(f"{half} {error:.1e}" for half, error in errors.items())
        typer.echo(columns([("exact", f"{found} of the largest value on {shards} shards, {limit:.0e} is allowed")]))
    worst = max(errors.values())
    if not worst <= limit:
        raise VerificationError(f"{session.group.size} ranks differ from one by {worst:.1e}, more than {limit:.0e}")


def _exactness(session: Session) -> tuple[dict[str, float], float, str]:
    """The shipped VAE on all ranks and on one: the largest difference of each half, what is allowed, the shards."""
    name = "float64" if session.device.type == "cpu" else "float32"
    vae = replace(session, dtype=getattr(torch, name)).load().vae
    generator = torch.Generator().manual_seed(0)
    # Sides that differ and don't divide evenly, so that no two dimensions can be mistaken for each other.
    clip = torch.randn(1, 3, 5, 32 * session.group.size, 40, generator=generator).to(session.device, vae.dtype)
    with torch.inference_mode():
        latents = latent_of(vae.encode(clip))
        sample = sample_of(vae.decode(latents))
        with session.parallel(vae) as handle:
            parallel_latents = latent_of(vae.encode(clip))
            parallel_sample = sample_of(vae.decode(latents))
    shards = "1x1" if handle is None else "x".join(map(str, handle.last.shape))
    errors = {"encode": _distance(parallel_latents, latents), "decode": _distance(parallel_sample, sample)}
    return errors, _LIMITS[name], shards


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def fallback(ranks: int) -> str | None:
    """The processor, which can prove an installation too, where there are accelerators, but not one for each rank."""
    return "cpu" if 0 < torch.accelerator.device_count() < ranks else None
