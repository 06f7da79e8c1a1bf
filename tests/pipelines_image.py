"""Tiny pipelines of diffusers that edit pictures, for the table in `pipelines`; see also `pipelines_video`."""

from __future__ import annotations

from typing import Any

import diffusers
import families_video
import transformers

from halovae.pipelines.demo import byte_tokenizer


def clip_text() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def t5_text() -> Any:
    config = transformers.T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return transformers.T5EncoderModel(config)


def image_vae(**changes: Any) -> Any:
    config = {
        "block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, **changes,
    }  # fmt: skip
    return diffusers.AutoencoderKL(**config)


def _flux_parts(**changes: Any) -> dict[str, Any]:
    vae = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "scaling_factor": 0.9}
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": image_vae(**vae, **changes),
        "text_encoder": clip_text(),
        "tokenizer": byte_tokenizer(77),
        "text_encoder_2": t5_text(),
        "tokenizer_2": byte_tokenizer(512),
        "transformer": diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
        ),
    }  # fmt: skip


def flux_edit() -> Any:
    return diffusers.FluxImg2ImgPipeline(**_flux_parts())


def flux_kontext() -> Any:
    """The picture to edit goes into the transformer as further tokens, a megapixel of them whatever its size."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.FluxKontextPipeline(**_flux_parts(block_out_channels=(4, 4, 8, 8), **blocks))


def stable_diffusion() -> Any:
    """A U-Net, which is not spread; the result has the size of the picture."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=32, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return diffusers.StableDiffusionImg2ImgPipeline(
        vae=image_vae(), text_encoder=clip_text(), tokenizer=byte_tokenizer(77), unet=unet,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


class _WithoutVideos(transformers.Qwen2_5_VLProcessor):
    """Its part for videos, which no edit uses, would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return argument_name == "video_processor" or super().check_argument_for_proper_class(argument_name, argument)


def qwen_edit() -> Any:
    """The text encoder sees the picture too, as tokens among the words."""
    tokenizer = byte_tokenizer(2048)
    tokenizer.add_tokens(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"], special_tokens=True)
    start, image, end, video = range(259, 263)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 263, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=start, image_token_id=image, vision_end_token_id=end, video_token_id=video,
    )  # fmt: skip
    # At most 16 patches of the picture: the edit itself sees them all, through the VAE.
    sizes = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    return diffusers.QwenImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLQwenImage(**families_video.WAN21 | {"base_dim": 4, "z_dim": 16}),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=_WithoutVideos(image_processor=transformers.Qwen2VLImageProcessor(size=sizes), tokenizer=tokenizer),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
