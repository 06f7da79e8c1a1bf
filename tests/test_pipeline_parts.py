"""The parts that a run of a pipeline is made of, one by one, without ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from pictures import raises
from threads import run_threads

import halovae
from halovae.app import dry_run
from halovae.base.errors import InputError
from halovae.comm import SoloComm
from halovae.pipelines.generation_settings import Generation, Setup, arguments, does
from halovae.pipelines.grid_sizes import TokenGrid, check_sizes, fill_in, grid_of
from halovae.pipelines.load import find_pipeline, load_pipeline, outline
from halovae.pipelines.parallel_vae import in_pieces, parallel_vae
from halovae.pipelines.runner import agreed_seed
from halovae.pipelines.scheduler import check_steps, shifted
from halovae.pipelines.stages import DENOISE, OTHER, VAE_DECODE, StageTimeline, watched
from halovae.pipelines.transformers import check_degrees, patch, shared_sequences

WAN = diffusers.WanImageToVideoPipeline
GRID = TokenGrid(ratio=8, period=4, step=4, patch_frames=1, patch_side=2)


# ---- signatures -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("WanImageToVideoPipeline", "image-to-video"),
        ("HunyuanVideoImageToVideoPipeline", "image-to-video"),
        ("LTXImageToVideoPipeline", "image-to-video"),
        ("CogVideoXImageToVideoPipeline", "image-to-video"),
        ("WanPipeline", "text-to-video"),
        ("QwenImageEditPipeline", "image-to-image"),
        ("FluxKontextPipeline", "image-to-image"),
        ("StableDiffusionImg2ImgPipeline", "image-to-image"),
    ],
)
def test_pipelines_say_what_they_do(name: str, task: str) -> None:
    assert does(getattr(diffusers, name), task)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("WanPipeline", "image-to-video"),
        ("WanAnimatePipeline", "image-to-video"),
        ("StableDiffusionPipeline", "image-to-image"),
        ("WanImageToVideoPipeline", "text-to-video"),
    ],
)
def test_pipelines_say_what_they_do_not(name: str, task: str) -> None:
    assert not does(getattr(diffusers, name), task)


def test_a_setting_that_a_call_does_not_take_is_refused() -> None:
    with raises(InputError, "--last-image can't be honoured: LTXImageToVideoPipeline takes no last_image"):
        arguments(diffusers.LTXImageToVideoPipeline, Generation(prompt="", image=1, last_image=2))
    with raises(InputError, "--prompt is missing"):
        arguments(WAN, Generation(image=1))
    with raises(InputError, "--image is missing"):
        arguments(WAN, Generation(prompt=""))


def test_what_is_set_is_passed_and_nothing_else() -> None:
    chosen = arguments(WAN, Generation(prompt="", image=1, seed=3, frame_rate=16, guidance_scale_2=2.0))
    assert chosen == {"prompt": "", "image": 1, "guidance_scale_2": 2.0}
    assert arguments(diffusers.LTXPipeline, Generation(prompt="", frame_rate=16))["frame_rate"] == 16


# ---- sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two experts", GRID),
        ("one frame", TokenGrid(ratio=16, period=4, step=4, patch_frames=1, patch_side=2)),
        ("edit", TokenGrid(ratio=2, period=0, step=0, patch_frames=1, patch_side=2)),
    ],
)
def test_the_grid_is_learnt_from_the_parts(name: str, expected: TokenGrid) -> None:
    assert grid_of(pipelines.build(name).components) == expected


def test_counts_of_frames_are_judged_by_the_vae() -> None:
    """Also where no rule of multiples tells them, and in a grid that has travelled by the rule as far as it goes."""
    for name, count, nearest, tokens in (("kvae_video", 37, "33 or 41", 9), ("cogvideox", 5, "1 or 9", 13)):
        vae = FAMILIES[name].build()
        grid = grid_of({"vae": vae})
        with raises(InputError, f"num_frames {count}: the VAE would change it, use {nearest}"):
            grid.check_count("num_frames", count)
        grid.check_count("num_frames", 49)
        TokenGrid(**grid.numbers()).check_count("num_frames", 49)
        assert grid.latent_frames(4 * tokens - 3) == tokens
        assert grid.nearest_count(40.2 if name == "kvae_video" else 8) == (41 if name == "kvae_video" else 9)
    uneven = grid_of({"vae": FAMILIES["minimax_h3"].build()})
    uneven.check_count("num_frames", 39)
    TokenGrid(**uneven.numbers()).check_count("num_frames", 39)


def test_latents_packed_into_channels_make_larger_patches() -> None:
    transformer = pipelines.build("edit").transformer
    assert patch({"transformer": transformer}, 4) == (1, 2)
    assert patch({"transformer": transformer}, 16) == (1, 1)


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), frames=st.integers(0, 20), parts=st.sampled_from([2, 3, 4, 8])
)
def test_what_a_refusal_proposes_is_accepted(height: int, width: int, frames: int, parts: int) -> None:
    asked = Generation(prompt="", height=16 * height, width=16 * width, num_frames=4 * frames + 1)
    setup = Setup(ulysses_degree=parts)
    try:
        check_sizes(WAN, GRID, asked, setup)
    except InputError as error:
        words = str(error).split("use --height ")[1].split()
        better = Generation(prompt="", height=int(words[0].rstrip(",")), width=16 * width, num_frames=4 * frames + 1)
        check_sizes(WAN, GRID, better, setup)
    else:
        assert GRID.tokens(16 * height, 16 * width, 4 * frames + 1) % parts == 0


def test_sizes_follow_the_image() -> None:
    filled = fill_in(WAN, GRID, Generation(), (400, 600))
    assert filled.height is not None
    assert filled.width is not None
    assert (filled.height % 16, filled.width % 16) == (0, 0)
    assert abs(filled.height * filled.width / (480 * 832) - 1) < 0.05
    assert abs(filled.width / filled.height - 1.5) < 0.05
    assert fill_in(WAN, GRID, Generation(height=64), (400, 600)).width == 96
    assert fill_in(WAN, GRID, Generation(width=96), (400, 600)).height == 64


# ---- the rest -------------------------------------------------------------------------------------------------------
def test_a_stage_within_a_stage_counts_for_itself() -> None:
    timeline = StageTimeline(torch.device("cpu"))
    with timeline.stage("outer"):
        time.sleep(0.02)
        with timeline.stage("inner"):
            time.sleep(0.2)
    assert timeline.seconds["inner"] >= 0.2
    assert 0.02 <= timeline.seconds["outer"] < 0.2


def test_a_pipeline_is_watched_and_left_as_it_was() -> None:
    class Vae:
        def encode(self) -> None: ...
        def decode(self) -> str:
            return "picture"

    class Pipeline:
        vae = Vae()

        def progress_bar(self, total: int) -> Any: ...

        def __call__(self) -> str:
            with self.progress_bar(total=2) as bar:
                for _ in range(2):
                    bar.update()
                bar.set_postfix(loss=1)
            return self.vae.decode()

    pipeline, timeline, steps = Pipeline(), StageTimeline(torch.device("cpu")), list[Any]()
    with watched(pipeline, timeline, lambda done, total: steps.append((done, total))), timeline.stage(OTHER):
        assert pipeline() == "picture"
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert {DENOISE, VAE_DECODE, OTHER} <= set(timeline.seconds)
    assert pipeline.__dict__ == {}
    assert pipeline.vae.__dict__ == {}


def test_all_ranks_take_the_first_ones_seed() -> None:
    drawn = run_threads(3, lambda comm: agreed_seed(comm, None))
    assert len(set(drawn)) == 1
    assert run_threads(2, lambda comm: agreed_seed(comm, 7)) == [7, 7]


def test_halves_that_are_none_are_refused() -> None:
    for halves in (["both"], [], "encode"):
        with raises(InputError, "give a list of 'encode', 'decode' or both"):
            halovae.parallelize(pipelines.build("edit").vae, halves=halves)


def test_a_vae_that_comes_tiled_is_left_so() -> None:
    """But where the un-tiled result is asked for."""
    vae = FAMILIES["minimax_h3"].build()

    def using(setup: Setup) -> tuple[str, bool]:
        vae.use_tiling = True
        mode = dry_run._vae(vae, GRID, Generation(), setup, 2)["mode"]
        with parallel_vae(vae, setup, SoloComm(), lambda half, report: None):
            return mode, vae.use_tiling

    for mode, used in ((None, "tile"), ("tile", "tile"), ("auto", "auto")):
        assert using(Setup(vae_mode=mode)) == (used, True)
    for mode in (None, "exact"):
        assert using(Setup(vae_mode=mode, vae_untiled=True)) == ("exact", False)
    with raises(InputError, "--vae-mode exact: AutoencoderKLMiniMaxH3 comes tiled, .* or add --vae-untiled"):
        using(Setup(vae_mode="exact"))
    with raises(InputError, "--vae-untiled is for exact mode, but --vae-mode is tile"):
        Setup(vae_mode="tile", vae_untiled=True)


def test_each_half_of_a_vae_has_its_own_dtype(demo_model: Path) -> None:
    """Whatever the pipeline casts to the one dtype of the VAE; the plan counts each weight once."""
    setup = Setup(dtype="bfloat16", vae_encode_dtype="float32")
    source = find_pipeline(str(demo_model), "image-to-video")
    vae = load_pipeline(source, setup).vae
    assert (vae.encoder.conv_in.weight.dtype, vae.decoder.conv_in.weight.dtype) == (torch.float32, torch.bfloat16)
    planned = next(row for row in dry_run._parts(outline(source, with_encoders=False), setup) if row["part"] == "vae")
    assert planned["bytes"] == sum(weight.nbytes for weight in vae.parameters())
    with torch.no_grad(), parallel_vae(vae, setup, SoloComm(), lambda half, report: None):
        latent = vae.encode(torch.zeros(1, 3, 1, 32, 32, dtype=torch.bfloat16)).latent_dist.mode()
        assert latent.dtype == torch.float32
        assert vae.decode(latent).sample.dtype == torch.bfloat16


def test_a_shift_goes_where_the_scheduler_has_one() -> None:
    assert shifted(pipelines.build("text").scheduler, 12.0).config.flow_shift == 12.0
    assert shifted(diffusers.FlowMatchEulerDiscreteScheduler(), 5.0).config.shift == 5.0
    for scheduler in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)):
        with raises(InputError, "--flow-shift can't be honoured"):
            shifted(scheduler, 5.0)


def walk(scheduler: Any, steps: int) -> torch.Tensor:
    """What denoising a single zero ends with."""
    scheduler.set_timesteps(steps)
    sample = torch.zeros(1, 1, 1, 1)
    for step in scheduler.timesteps:
        sample = scheduler.step(sample, step, sample, return_dict=False)[0]
    return sample


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:__array__ implementation")
@pytest.mark.parametrize(
    ("scheduler", "steps", "nearest"),
    [
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0), 400, 333),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=9.0), 400, 125),
        (diffusers.DDIMScheduler(), 1001, 1000),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 1, 2),
    ],
)
def test_steps_that_a_scheduler_can_not_take_are_refused(scheduler: Any, steps: int, nearest: int) -> None:
    before = scheduler.timesteps.clone()
    name = type(scheduler).__name__
    with raises(InputError, rf"--num-inference-steps {steps}: {name} can't take it, .*; use {nearest}\b"):
        check_steps(WAN, scheduler, Generation(num_inference_steps=steps))
    check_steps(WAN, scheduler, Generation(num_inference_steps=nearest))
    assert torch.equal(scheduler.timesteps, before)
    assert walk(scheduler, nearest).isfinite().all()
    with pytest.raises((AssertionError, IndexError, ValueError)):
        walk(scheduler, steps)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    """Pipelines round in their own ways: Stable Diffusion down, Flux up."""
    asked = Generation(num_inference_steps=3, strength=0.1)
    with raises(InputError, "--strength 0.1 of --num-inference-steps 3 leaves no step"):
        check_steps(diffusers.StableDiffusionImg2ImgPipeline, diffusers.DDIMScheduler(), asked)
    check_steps(diffusers.FluxImg2ImgPipeline, diffusers.FlowMatchEulerDiscreteScheduler(), asked)
    check_steps(
        diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.DDIMScheduler(),
        Generation(num_inference_steps=10, strength=0.1),
    )


def test_a_transformer_without_a_plan_is_refused_by_name() -> None:
    unet = torch.nn.Linear(1, 1)
    with raises(InputError, "has no plan to spread Linear"):
        check_degrees({"unet": unet}, Setup(ulysses_degree=2))
    with raises(InputError, "can't share evenly"), shared_sequences(2):
        raise AssertionError("Tensor size along dimension to be sharded must be divisible by mesh size")
    with raises(InputError, "--ulysses-degree and --ring-degree can't be honoured: the plan of"), shared_sequences(2):
        torch.zeros(2) + torch.zeros(3)


def test_weights_that_do_both_are_loaded_into_the_pipeline_that_is_asked_for(tmp_path: Path) -> None:
    parts = {name: ["diffusers", "X"] for name in ("vae", "transformer", "scheduler", "tokenizer", "text_encoder")}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **parts}))
    source = find_pipeline(str(tmp_path), "image-to-video")
    assert source.cls is WAN
    assert "loaded as WanImageToVideoPipeline" in source.notes[0]
    assert find_pipeline(str(tmp_path), "text-to-video").notes == ()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "vae": [None, None]}))
    with raises(InputError, "is a WanPipeline without a VAE"):
        find_pipeline(str(tmp_path), "text-to-video")


# ---- a video that is decoded late ------------------------------------------------------------------------------------
class _Pipeline:
    """Decodes two frames, and hands on what `then` makes of them."""

    def __init__(self, then: Any) -> None:
        self.vae, self.video_processor, self._then = torch.nn.Module(), diffusers.video_processor.VideoProcessor(), then
        self.vae.decode = lambda latents, return_dict=True: (latents * 2,)

    def __call__(self, latents: torch.Tensor) -> Any:
        return self.video_processor.postprocess_video(self._then(self.vae.decode(latents, return_dict=False)[0]), "np")


def test_a_video_goes_on_in_pieces_unless_a_pipeline_does_something_with_it() -> None:
    latents, found = torch.rand(1, 3, 2, 8, 8) / 2, list[Any]()

    def stream(latents: torch.Tensor, return_dict: bool = True) -> Generator[torch.Tensor]:
        yield from (latents * 2).split(1, 2)

    def take(pieces: Generator[torch.Tensor], show: Any) -> None:
        found.extend(map(show, pieces))

    wanted = _Pipeline(lambda video: video)(latents)
    for then, pieces in ((lambda video: video, 2), (lambda video: video[:, :, :1], 0), (lambda video: -video, 0)):
        pipeline = _Pipeline(then)
        with in_pieces(pipeline, stream, take):
            shown = pipeline(latents)
        assert len(found) == pieces
        if pieces:
            assert np.array_equal(np.concatenate(found, 1), wanted)
            assert shown.shape == (1, 1, 1, 1, 3)
        else:
            assert np.array_equal(shown, pipeline(latents))
        found.clear()
