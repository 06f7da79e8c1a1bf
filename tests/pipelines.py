"""Whole pipelines of diffusers, tiny and randomly initialised, and one run of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pipelines_image
import pipelines_video
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from halovae import comm
from halovae.base.quiet import all_quiet
from halovae.base.replaced import wrapped
from halovae.pipelines.demo import byte_tokenizer
from halovae.pipelines.generation_settings import Generation, Setup, parameters
from halovae.pipelines.runner import Result, Runner


def picture(seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    """Smooth and colourful."""
    noise = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(-2, 2) / 4 + 0.5
    return Image.fromarray((smooth[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def _wan_vae(**changes: Any) -> Any:
    config = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **changes}
    return diffusers.AutoencoderKLWan(**config)


def _wan_transformer(in_channels: int, **changes: Any) -> Any:
    config = {
        "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": in_channels, "out_channels": 16,
        "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, **changes,
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(**config)


def _wan_parts() -> dict[str, Any]:
    text = transformers.UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return {
        "tokenizer": byte_tokenizer(),
        "text_encoder": transformers.UMT5EncoderModel(text),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def wan_two_experts() -> Any:
    """As Wan 2.2 I2V A14B: two transformers, no image encoder."""
    return diffusers.WanImageToVideoPipeline(
        vae=_wan_vae(), transformer=_wan_transformer(36), transformer_2=_wan_transformer(36), boundary_ratio=0.8,
        **_wan_parts(),
    )  # fmt: skip


def wan_image_encoder() -> Any:
    """As Wan 2.1 I2V: the transformer also sees the image as tokens; it takes a last image."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    return diffusers.WanImageToVideoPipeline(
        vae=_wan_vae(),
        transformer=_wan_transformer(36, image_dim=32, added_kv_proj_dim=48, pos_embed_seq_len=10),
        image_encoder=transformers.CLIPVisionModel(vision),
        image_processor=transformers.CLIPImageProcessor(size=32, crop_size=32),
        **_wan_parts(),
    )


def wan_one_frame() -> Any:
    """As Wan 2.2 TI2V 5B: the image is encoded as one frame, and each token has its own noise level."""
    vae = _wan_vae(
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, decoder_base_dim=8
    )  # fmt: skip
    return diffusers.WanImageToVideoPipeline(
        vae=vae, transformer=_wan_transformer(16), expand_timesteps=True, **_wan_parts()
    )


def wan_text() -> Any:
    return diffusers.WanPipeline(vae=_wan_vae(), transformer=_wan_transformer(16), **_wan_parts())


BUILDERS: dict[str, Callable[[], Any]] = {
    "two experts": wan_two_experts,
    "last image": wan_image_encoder,
    "one frame": wan_one_frame,
    "text": wan_text,
    "ltx": pipelines_video.ltx,
    "cogvideox": pipelines_video.cogvideox,
    "hunyuan": pipelines_video.hunyuan,
    "edit": pipelines_image.flux_edit,
    "kontext": pipelines_image.flux_kontext,
    "qwen": pipelines_image.qwen_edit,
    "stable diffusion": pipelines_image.stable_diffusion,
}


NOT_SPREAD = {"cogvideox", "hunyuan", "stable diffusion"}
"""Diffusers has no plan for their denoisers."""
GRAINY = {"ltx"}
"""Random weights make grain of every pixel, of which a video codec makes something else when one level changes."""
SIZE = {"height": 64, "width": 64}
SIZES = {"ltx": {"height": 128, "width": 128}, "qwen": {"height": 64, "width": 96}}
"""Of those whose latents are fewer, or which choose the size of the picture that they encode."""


def build(name: str) -> Any:
    """The pipeline, with the same weights in every process."""
    torch.manual_seed(0)
    with all_quiet():
        pipeline = BUILDERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    # Faint pictures: a video codec makes something else of full noise when one level in it changes.
    next(pipeline.vae.decoder.conv_out.parameters()).mul_(0.3)
    return pipeline


def generation(name: str, pipeline: Any, **changes: Any) -> Generation:
    """What one run of that pipeline makes."""
    known = parameters(type(pipeline))
    settings: dict[str, Any] = {
        "prompt": "a cup",
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        **SIZES.get(name, SIZE),
    }
    if name != "text":
        settings["image"] = picture(0, settings["height"], settings["width"])
    if name == "last image":
        settings["last_image"] = picture(1)
    settings |= {"num_frames": 9, "strength": 0.9}
    return Generation(**{key: value for key, value in settings.items() if key in known}, seed=7, **changes)


def run(rank: int, name: str, setup: dict[str, Any], alone: bool = False) -> tuple[list[Tensor], Result]:
    """One run on this rank: the latents that were decoded, and what came of it."""
    group = comm.SoloComm() if alone else comm.world()
    pipeline, seen = build(name), list[Tensor]()
    runner = Runner(pipeline, Setup(dtype="float32", **setup), group, torch.device("cpu"))

    def noted(decode: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.clone())
        return decode(latents, *args, **kwargs)

    if decode := runner.streams.get("decode"):  # Of videos that go on as they come.
        runner.streams["decode"] = functools.partial(noted, decode)
    with runner, wrapped(pipeline.vae, "decode", noted):
        made = runner.run(generation(name, pipeline))
        for _, report in made.calls[:1]:
            known = sys.getrefcount(report)
            runner.note("decode", report)
            assert sys.getrefcount(report) == known, "a call beside runs is kept for good"
    return seen, made
