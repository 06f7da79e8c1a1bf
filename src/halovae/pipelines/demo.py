"""A complete image-to-video pipeline of a few megabytes, built from configs: the whole path runs anywhere, offline."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from halovae.errors import InputError
from halovae.files import check_new_folder, reason
from halovae.models import find
from halovae.pipelines.demo_weights import HEADS, WIDTH, build_still_transformer, still_map
from halovae.pipelines.quiet import quiet

CARD = """# halovae demonstration pipeline

An image-to-video pipeline in diffusers' format (`{pipeline}`) that is small enough to run anywhere, made by
`halovae make-demo-model`. It shows that a run works from the first flag to the mp4; it shows nothing of what a trained
model can do.

| part | what it is |
|---|---|
| VAE | the one that ships with halovae: trained, small, blurred (see its own card) |
| transformer | **not trained**: one block whose weights are set by construction, {parameters:.2f} million of them |
| text encoder | random weights (seed {seed}); the prompt moves colours by a little and means nothing |
| tokenizer | one token per byte |
| scheduler | UniPC on flow-matching noise levels; the transformer predicts the clean latents |

The transformer's attention finds, for every patch of every frame, the patch of the first latent frame at the same
place, and copies it. In later frames a linear map follows that turns a first latent frame into those of a picture
that stands still: fitted by least squares on {pictures} generated pictures. So the video is the image, standing still,
as the VAE sees it. Seed, guidance scale and last image change next to nothing.
"""
_SEED = 0
_PICTURES = 6


def make_demo_model(folder: Path) -> None:
    """Build the pipeline and save it to `folder`, which appears whole or not at all. A folder that exists is kept.

    Raises:
        InputError: `folder` is there already, or can't be written.
    """
    check_new_folder(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        with quiet():
            pipeline = build_demo_pipeline()
            pipeline.save_pretrained(draft)
        (draft / "README.md").write_text(_card(pipeline), encoding="utf-8")
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError as error:
        raise InputError(f"can't write {folder}: {reason(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def build_demo_pipeline() -> Any:
    """The pipeline in memory, in float32 on the CPU. Its weights are the same every time."""
    before = torch.get_rng_state()
    torch.manual_seed(_SEED)
    try:
        vae: Any = AutoencoderKLWan.from_pretrained(find(None).location, torch_dtype=torch.float32).eval()
        text_encoder = UMT5EncoderModel(_text_config()).eval()
        transformer: Any = WanTransformer3DModel(**_transformer_config(vae.config.z_dim)).eval()
        build_still_transformer(transformer, *still_map(vae, pictures=_PICTURES))
    finally:
        torch.set_rng_state(before)
    return WanImageToVideoPipeline(
        tokenizer=byte_tokenizer(),  # type: ignore[arg-type]  # The pipeline names a factory, which is no class of tokenizers.
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(  # type: ignore[arg-type]  # What checkpoints of this pipeline have too.
            prediction_type="sample", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
    )


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


def _text_config() -> UMT5Config:
    return UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)


def _transformer_config(latent_channels: int) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH,
        # Noisy latents, then four channels that tell which frames are given, then the given latents.
        "in_channels": 2 * latent_channels + 4,
        "out_channels": latent_channels,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 8 * latent_channels,
        "num_layers": 1,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }


def _card(pipeline: Any) -> str:
    count = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    return CARD.format(
        pipeline=type(pipeline).__name__, parameters=count / 1e6, seed=_SEED, pictures=_PICTURES
    )  # fmt: skip
