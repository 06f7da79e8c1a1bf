"""`halovae image-to-video`: an image and a prompt to a video."""

from __future__ import annotations

from pathlib import Path

import typer

from halovae.app.generation import start
from halovae.cli import flags as options
from halovae.cli import generation_flags as flags


def image_to_video(
    context: typer.Context,
    model: flags.PipelineModel,
    image: flags.Image,
    last_image: flags.LastImage = None,
    output: flags.Output = Path("i2v_output.mp4"),
    prompt: flags.Prompt = None,
    negative_prompt: flags.NegativePrompt = None,
    height: flags.Height = None,
    width: flags.Width = None,
    num_frames: flags.NumFrames = None,
    seed: flags.Seed = None,
    fps: flags.Fps = 16,
    crf: flags.Crf = None,
    lossless: options.Lossless = False,
    num_inference_steps: flags.Steps = None,
    guidance_scale: flags.GuidanceScale = None,
    guidance_scale_high: flags.GuidanceScaleHigh = None,
    boundary_ratio: flags.BoundaryRatio = None,
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
    """Make a video from an image and a prompt, with any image-to-video pipeline of diffusers, on several devices."""
    return start(context, "image-to-video", locals())
