"""Complete pipelines of a few megabytes, built from configs: the whole path of each task runs anywhere, offline."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from jinja2 import Template
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from halovae.base.errors import InputError
from halovae.base.files import check_new_folder, reason
from halovae.base.quiet import all_quiet
from halovae.media.models import find

HEADS = 8
WIDTH = 24
"""Of a head of attention: 8 numbers each for the position in time, height and width."""
WEIGHTS = Path(__file__).with_name("demo_weights.safetensors")
"""Of the transformers, what is not as they were drawn: `training/demo_weights.py` has made it."""
_CARD = WEIGHTS.with_name("demo_card.md")
_SEED = 0


def make_demo_model(folder: Path, task: str = "image-to-video") -> None:
    """Build a pipeline for a task and save it to `folder`, which appears whole or not at all and must be new."""
    check_new_folder(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        with all_quiet():
            pipeline = build_demo_pipeline(task)
            pipeline.save_pretrained(draft)
        card = Template(_CARD.read_text(encoding="utf-8"), keep_trailing_newline=True)
        millions = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6
        text = card.render(task=task, pipeline=type(pipeline).__name__, parameters=millions, seed=_SEED)
        (draft / "README.md").write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError as error:
        raise InputError(f"can't write {folder}: {reason(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def build_demo_pipeline(task: str = "image-to-video") -> Any:
    """The pipeline for a task in memory, in float32 on the CPU. Its weights are the same every time."""
    before = torch.get_rng_state()
    try:
        pipeline = untrained_pipeline(task)
    finally:
        torch.set_rng_state(before)
    kept = load_file(WEIGHTS)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if (places := kept.get(f"{task}/{name}/places")) is not None:
                parameter.zero_().view(-1)[places.long()] = kept[f"{task}/{name}/values"]
    return pipeline


def untrained_pipeline(task: str) -> Any:
    """The same with the transformer's weights as they are drawn. Seeds torch's generator, and leaves it there."""
    torch.manual_seed(_SEED)
    vae: Any = AutoencoderKLWan.from_pretrained(find(None).location, torch_dtype=torch.float32).eval()
    if task == "image-to-video":  # A video of the image.
        # Noisy latents, then four channels that tell which frames are given, then the given latents.
        return _wan(WanImageToVideoPipeline, vae, 2 * vae.config.z_dim + 4, "sample")
    if task == "text-to-video":  # A video of smooth noise.
        return _wan(WanPipeline, vae, vae.config.z_dim, "flow_prediction")
    return _soft(vae)


def _wan(pipeline: Any, vae: Any, in_channels: int, predicts: Literal["sample", "flow_prediction"]) -> Any:
    """A pipeline of this class, with a scheduler as checkpoints of it have."""
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    ).eval()
    transformer: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=in_channels,
        out_channels=vae.config.z_dim, text_dim=32, freq_dim=32, ffn_dim=8 * vae.config.z_dim, num_layers=1,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type=predicts, use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return pipeline(
        vae=vae,
        text_encoder=text_encoder,
        transformer=transformer.eval(),
        tokenizer=byte_tokenizer(),
        scheduler=scheduler,
    )


def _soft(vae: Any) -> Any:
    """The image, softer. Its pipeline takes any VAE of this kind; the one that it names is not there in small."""
    transformer: Any = QwenImageTransformer2DModel(
        in_channels=4 * vae.config.z_dim, out_channels=vae.config.z_dim, num_layers=1, attention_head_dim=WIDTH,
        num_attention_heads=HEADS, joint_attention_dim=32, axes_dims_rope=(8, 8, 8),
    ).eval()  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 259,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=0, image_token_id=0, vision_end_token_id=0, video_token_id=0,
    )  # fmt: skip
    text_encoder: Any = Qwen2_5_VLForConditionalGeneration(config).eval()
    tokenizer: Any = byte_tokenizer(2048)
    return QwenImageImg2ImgPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
        transformer=transformer,
    )  # fmt: skip


def byte_tokenizer(length: int = 512) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8: nothing to download, and no word is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )
