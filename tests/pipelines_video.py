"""Tiny pipelines of diffusers that make videos of a picture, not of Wan's kind, for the table in `pipelines`."""

from __future__ import annotations

from typing import Any

import diffusers
import families_video
import transformers
from pipelines_image import clip_text, t5_text

from halovae.pipelines.demo import byte_tokenizer


def ltx() -> Any:
    """The first frame's tokens keep their noise level at zero."""
    return diffusers.LTXImageToVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLLTXVideo(**families_video.LTX),
        text_encoder=t5_text(),
        tokenizer=byte_tokenizer(128),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            num_layers=1, caption_channels=32,
        ),
    )  # fmt: skip


def cogvideox() -> Any:
    """Diffusers has no plan to spread its transformer."""
    blocks = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        **families_video.GROUPED,
    }  # fmt: skip
    return diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=byte_tokenizer(226),
        text_encoder=t5_text(),
        vae=diffusers.AutoencoderKLCogVideoX(**blocks),
        transformer=diffusers.CogVideoXTransformer3DModel(
            in_channels=8, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=1,
            time_embed_dim=8, text_embed_dim=32, sample_width=8, sample_height=8, sample_frames=9,
            use_rotary_positional_embeddings=True, use_learned_positional_embeddings=False,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )  # fmt: skip


def hunyuan() -> Any:
    """The text encoder sees the picture too, as 576 tokens; diffusers has no plan to spread the transformer."""
    tokenizer = byte_tokenizer(2048)
    tokenizer.add_tokens(["<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "vocab_size": 263, "model_type": "llama",
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "image_size": 48, "patch_size": 2, "model_type": "clip_vision_model",
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, pad_token_id=0, image_token_index=image, image_seq_length=576
    )
    return diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=transformers.LlavaForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=4, attention_head_dim=16, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6), guidance_embeds=False, image_condition_type="latent_concat",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(**families_video.GROUPED),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=clip_text(),
        tokenizer_2=byte_tokenizer(77),
        image_processor=transformers.CLIPImageProcessor(size=48, crop_size=48),
    )  # fmt: skip
