"""The encode call of image editing pipelines, on all ranks: QwenImage-Edit and Flux Kontext.

An editing pipeline begins by encoding the picture to be edited. With halovae that runs on all ranks, like the decode at
the end:

    torchrun --nproc-per-node 2 examples/image_edit.py --mode exact
    torchrun --nproc-per-node 2 examples/image_edit.py --mode tile

Without a model's weights at hand, a small VAE of the same architecture with random weights stands in; the calls are
those of the pipelines. With weights, pass the pipeline itself:

    pipe = diffusers.FluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev").to("cuda")
    halovae.parallelize(pipe)

Each line says how far the result is from that of one rank: nothing but rounding in exact mode; in tile mode, nothing at
all from the VAE's own tiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

import halovae
from halovae import comm


def qwen_vae() -> Any:
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1)
    vae.enable_tiling(64, 64, 48, 48)
    return vae


def kontext_vae() -> Any:
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
    }
    vae = diffusers.AutoencoderKL(**blocks, norm_num_groups=4, latent_channels=16, sample_size=64)
    vae.enable_tiling()
    return vae


def encode_for_qwen_edit(vae: Any, image: Tensor) -> Tensor:
    """As `QwenImageEditPipeline._encode_vae_image`: a clip of one frame, and the mode, so that nothing is random."""
    return vae.encode(image.unsqueeze(2)).latent_dist.mode()


def encode_for_kontext(vae: Any, image: Tensor) -> Tensor:
    """As `FluxKontextPipeline._encode_vae_image`, then shifted and scaled."""
    latents = vae.encode(image).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


EDITS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "QwenImage-Edit": (qwen_vae, encode_for_qwen_edit),
    "Flux Kontext": (kontext_vae, encode_for_kontext),
}


def edit(name: str, mode: str) -> tuple[float, halovae.CallReport]:
    """Encode a picture on one rank and on all; the largest difference, and what the parallel call did."""
    build, encode = EDITS[name]
    torch.manual_seed(0)
    vae = build().eval().requires_grad_(False)
    image = torch.rand(1, 3, 120, 168) * 2 - 1
    vae.use_tiling = mode == "tile"
    alone = encode(vae, image)
    with halovae.parallelize(vae, mode=mode) as handle:
        parallel = encode(vae, image)
    assert handle.last is not None
    return (parallel - alone).abs().max().item(), handle.last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("exact", "tile"), default="exact")
    mode = parser.parse_args().mode
    torch.set_num_threads(1)
    comm.init_from_env("cpu")
    for name in EDITS:
        distance, report = edit(name, mode)
        if comm.world().rank == 0:
            print(f"{name}: {report}\n  largest difference from one rank: {distance:.1e}")
    comm.shutdown()


if __name__ == "__main__":
    main()
