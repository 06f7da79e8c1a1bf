"""`halovae image-to-image`: an image and a prompt to another image."""

from __future__ import annotations

from pathlib import Path

import typer

from halovae.app.generation import start
from halovae.cli import flags as options
from halovae.cli import generation_flags as flags


def image_to_image(
    context: typer.Context,
    model: flags.PipelineModel,
    image: flags.Image,
    output: flags.PictureOutput = Path("i2i_output.png"),
    prompt: flags.Prompt = None,
    negative_prompt: flags.NegativePrompt = None,
    height: flags.Height = None,
    width: flags.Width = None,
    strength: flags.Strength = None,
    seed: flags.Seed = None,
    num_inference_steps: flags.Steps = None,
    guidance_scale: flags.GuidanceScale = None,
    true_cfg_scale: flags.TrueCfgScale = None,
    flow_shift: flags.FlowShift = None,
    ranks: options.Ranks = None,
    ulysses_degree: flags.Ulysses = 1,
    ring_degree: flags.Ring = 1,
    vae_mode: flags.VaeModeOption = None,
    vae_untiled: flags.VaeUntiled = False,
    vae_use_tiling: flags.VaeUseTiling = False,
    vae_use_slicing: flags.VaeUseSlicing = False,
    vae_encode: flags.VaeEncode = True,
    vae_decode: flags.VaeDecode = True,
    vae_patch_parallel_size: flags.VaeSize = None,
    axis: options.Axis = "auto",
    enable_layerwise_offload: flags.LayerwiseOffload = False,
    enable_cpu_offload: flags.CpuOffload = False,
    dtype: options.DtypeOption = None,
    vae_dtype: flags.VaeDtype = None,
    vae_encode_dtype: options.VaeEncodeDtype = None,
    vae_decode_dtype: options.VaeDecodeDtype = None,
    attention_backend: flags.AttentionBackend = None,
    compile: flags.Compile = False,
    device: options.Device = None,
    dry_run: flags.DryRun = False,
    json: options.Json = None,
    report: options.ReportFolder = None,
) -> int:
    """Edit an image after a prompt, with any image-to-image pipeline of diffusers, on several devices."""
    return start(context, "image-to-image", locals())
