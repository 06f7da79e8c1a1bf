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
_SEED = 0
CARD = """# halovae demonstration pipeline

A pipeline for {task} in diffusers' format (`{pipeline}`) that is small enough to run anywhere, made by
`halovae make-demo-model`. It shows that a run works from the first flag to the last file; it shows nothing of what a
trained model can do.

| part | what it is |
|---|---|
| VAE | the one that ships with halovae: trained, small, blurred (see its own card) |
| transformer | **not trained**: one block whose weights are set by construction, {parameters:.2f} million of them |
| text encoder | random weights (seed {seed}); {prompt} |
| tokenizer | one token per byte |
| scheduler | {scheduler} |

{what}
"""
_WHAT = {
    "image-to-video": """The transformer's attention finds, for every patch of every frame, the patch of the first \
latent frame at the same
place, and copies it. In later frames a linear map follows that turns a first latent frame into those of a picture
that stands still: fitted by least squares on 6 generated pictures. So the video is the image, standing still,
as the VAE sees it. Seed, guidance scale and last image change next to nothing.""",
    "text-to-video": """The transformer's attention takes, for every patch, the mean of what is around it in time, \
height and width, and
noise flows towards it. So the video is clouds of colour that change slowly. The seed gives other clouds.""",
    "image-to-image": """The transformer takes the differences within each patch of 2 x 2 latents for noise, and \
takes them away. So the
result is the image in coarse squares: the higher the strength, the more noise is left in their colours.""",
}
_PROMPTS = {
    "image-to-video": "the prompt moves colours by a little and means nothing",
    "text-to-video": "the prompt moves colours and means nothing",
    "image-to-image": "the prompt changes nothing",
}
_SCHEDULERS = {
    "image-to-video": "UniPC on flow-matching noise levels; the transformer predicts the clean latents",
    "text-to-video": "UniPC on flow-matching noise levels; the transformer predicts their direction",
    "image-to-image": "Euler on flow-matching noise levels; the transformer predicts their direction",
}


def make_demo_model(folder: Path, task: str = "image-to-video") -> None:
    """Build a pipeline for a task and save it to `folder`, which appears whole or not at all and must be new."""
    check_new_folder(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        with all_quiet():
            pipeline = build_demo_pipeline(task)
            pipeline.save_pretrained(draft)
        (draft / "README.md").write_text(_card(pipeline, task), encoding="utf-8")
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
    return {"image-to-video": _still, "text-to-video": _clouds, "image-to-image": _soft}[task](vae)


def _still(vae: Any) -> Any:
    """A video of the image."""
    # Noisy latents, then four channels that tell which frames are given, then the given latents.
    return _wan(WanImageToVideoPipeline, vae, 2 * vae.config.z_dim + 4, "sample")


def _clouds(vae: Any) -> Any:
    """A video of smooth noise."""
    return _wan(WanPipeline, vae, vae.config.z_dim, "flow_prediction")


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


def _card(pipeline: Any, task: str) -> str:
    count = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    return CARD.format(
        task=task, pipeline=type(pipeline).__name__, parameters=count / 1e6, seed=_SEED, prompt=_PROMPTS[task],
        scheduler=_SCHEDULERS[task], what=_WHAT[task],
    )  # fmt: skip
