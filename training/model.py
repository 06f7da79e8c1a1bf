"""The demo VAE untrained, and the loss that it is trained with."""

from dataclasses import dataclass
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

Z_DIM = 16


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What each term of the loss counts."""

    squared: float = 5.0
    """Squared error against `absolute`: their gradients are alike near 30 dB."""
    absolute: float = 0.5
    kl: float = 1e-4
    """Times the mean KL per latent value: too small to cost quality, enough to keep latents near unit range."""


def build_vae() -> AutoencoderKLWan:
    """Return an untrained VAE with 8 x 8 x 4 compression and 2.7 million parameters."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        # The parameter-free shortcuts of residual blocks carry colour and layout from the first step on.
        is_residual=True,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    with torch.no_grad():
        # Start with little posterior noise; at log-variance 0 the decoder would first learn to ignore the latents.
        vae.quant_conv.bias[Z_DIM:] = -6.0
    return vae


def use_faster_norms(vae: AutoencoderKLWan) -> None:
    """Replace `F.normalize` and its backward: same numbers, a third of the time on a CPU, fewer kernels on a GPU."""
    for module in vae.modules():
        if isinstance(module, WanRMS_norm):
            module.forward = partial(_norm, module)


def _norm(norm: WanRMS_norm, features: torch.Tensor) -> torch.Tensor:
    mean_square = features.square().mean(dim=1, keepdim=True)
    return features * torch.rsqrt(mean_square + 1e-12) * norm.gamma


def loss_of(vae: AutoencoderKLWan, clips: torch.Tensor, weights: LossWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training loss and the mean squared error of clips `(n, 3, frames, height, width)` in [-1, 1]."""
    # A GPU computes in bfloat16 with float32 weights; a CPU in float32.
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.is_cuda, cache_enabled=False):
        posterior = vae.encode(clips).latent_dist
        decoded = _decode_unclamped(vae, posterior.sample())
    error = decoded.float() - clips
    squared = error.square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean()
    loss = weights.squared * squared + weights.absolute * error.abs().mean() + weights.kl * kl
    return loss, squared.detach()


def _decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Do what `vae.decode` does, less its final clamp, which has no gradient for overshooting pixels."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    chunks = []
    for index in range(latents.shape[2]):
        chunks.append(
            vae.decoder(
                latents[:, :, index : index + 1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=index == 0
            )
        )
    vae.clear_cache()
    return torch.cat(chunks, dim=2)
