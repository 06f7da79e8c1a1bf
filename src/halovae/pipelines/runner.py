"""A pipeline at work on ranks: prepared once, then called for one video or picture after another."""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers.hooks import apply_group_offloading
from numpy.typing import NDArray
from torch import nn

from halovae.base.errors import InputError
from halovae.base.files import first_line
from halovae.base.options import CallReport
from halovae.base.quiet import all_quiet
from halovae.base.replaced import replaced
from halovae.comm import Comm
from halovae.comm.agreement import together
from halovae.pipelines.generation_settings import Generation, Setup, arguments
from halovae.pipelines.parallel_vae import in_pieces, parallel_vae
from halovae.pipelines.scheduler import check_steps, prepare_scheduler
from halovae.pipelines.stages import OTHER, PROBE, VAE_DECODE, StageTimeline, watched
from halovae.pipelines.transformers import degree, denoisers, prepare_denoisers, shared_sequences

OnStep = Callable[[int, int | None], None]
OnFrames = Callable[[NDArray[np.uint8]], object]
_CHECKS = {"check_inputs", "set_timesteps"}
"""The methods in which pipelines check their arguments, and schedulers theirs: their words are for the user."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one call made, and what it took on this rank."""

    frames: NDArray[np.uint8] | None
    """(frames, height, width, 3), RGB; on the first rank, unless they went to `on_frames`. Elsewhere None."""
    sizes: tuple[int, int, int]
    """Frames, height and width of all of them; on the first rank."""
    first_seconds: float
    """From the beginning until the first frames were there; likewise."""
    seed: int
    """That the noise was drawn with."""
    seconds: dict[str, float]
    """Of the stages in `stages.STAGES`, as far as there were any."""
    peak_memory: dict[str, int]
    """Bytes, of the stages: of the accelerator, or of the whole process on a CPU."""
    calls: list[tuple[str, CallReport]] = field(default_factory=list[tuple[str, CallReport]])
    """Half ("encode" or "decode") and report of each parallel call of the VAE."""


class _Given:
    """The frames of one run, on their way to `take`."""

    def __init__(self, take: OnFrames) -> None:
        self._take, self._started = take, time.perf_counter()
        self.is_streamed, self.first_seconds, self.sizes = False, 0.0, (0, 0, 0)

    def take(self, frames: NDArray[np.uint8]) -> None:
        self.first_seconds = self.first_seconds or time.perf_counter() - self._started
        count, height, width, _ = frames.shape
        self.sizes = self.sizes[0] + count, height, width
        self._take(frames)


class Runner:
    """A pipeline, spread over the ranks as a `Setup` asks. Made, called and closed on every rank.

    Args:
        pipeline: of diffusers, loaded, on the CPU.
        setup: how to spread it.
        comm: the world.
        device: of this rank.

    Attributes:
        streams: encode and decode in pieces, as `Handle.encode_stream` and `decode_stream`; those that run on all
            ranks.

    Raises:
        InputError: this pipeline or this machine can't do what is asked.

    Examples:
        >>> with Runner(load_pipeline(source, setup), setup, comm.world(), device) as runner:
        ...     result = runner.run(Generation(prompt="a cup of coffee", image=image))
    """

    def __init__(self, pipeline: Any, setup: Setup, comm: Comm, device: torch.device) -> None:
        setup.check_ranks(comm.size)
        self.pipeline, self.setup, self.comm, self.device = pipeline, setup, comm, device
        self._calls: list[tuple[str, CallReport]] | None = None
        """Of the run that goes on. Those of `streams` come at any time, without an end."""
        self._timeline = StageTimeline(device)
        self._open = ExitStack()
        prepare_scheduler(pipeline, setup)
        prepare_denoisers(pipeline.components, setup, comm.size, device)
        place(pipeline, setup, device)
        self.streams = self._open.enter_context(parallel_vae(pipeline.vae, setup, comm, self.note))

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the VAE its own halves back."""
        self._open.close()

    def run(
        self, generation: Generation, on_step: OnStep = lambda done, total: None, on_frames: OnFrames | None = None
    ) -> Result:  # fmt: skip
        """Make one video or picture. Called on every rank with the same settings.

        Args:
            generation: what to make.
            on_step: called with the number of denoising steps done, and of all (None: unknown).
            on_frames: gets the frames on the first rank, (frames, height, width, 3), RGB, as soon as they are final:
                while later ones are decoded, where the VAE and the pipeline allow it. What it raises ends the run on
                all ranks. None: they are kept.

        Raises:
            InputError: the pipeline can't honour a setting, or refuses its values.
        """
        check_steps(type(self.pipeline), self.pipeline.scheduler, generation)
        generation = replace(generation, seed=agreed_seed(self.comm, generation.seed))
        assert generation.seed is not None
        chosen = arguments(type(self.pipeline), generation)
        calls, kept = list[tuple[str, CallReport]](), list[NDArray[np.uint8]]()
        self._timeline = StageTimeline(self.device)
        given = _Given(on_frames or kept.append)

        def in_stage(pieces: Generator[Any], show: Callable[[Any], Any]) -> None:
            with self._timeline.stage(VAE_DECODE):
                self._give(pieces, show, given)

        with all_quiet(), shared_sequences(degree(self.setup)), watched(self.pipeline, self._timeline, on_step):
            with in_pieces(self.pipeline, self.streams.get("decode"), in_stage), replaced(self, "_calls", calls):
                output = self._called(chosen, generation.seed)
            if not given.is_streamed:
                self._give((pictures for pictures in [output[0]]), lambda pictures: pictures, given)
        return Result(
            frames=np.concatenate(kept) if kept else None,
            sizes=given.sizes,
            first_seconds=given.first_seconds,
            seed=generation.seed,
            seconds=dict(self._timeline.seconds),
            peak_memory=dict(self._timeline.peak_memory),
            calls=calls,
        )

    def _give(self, pieces: Generator[Any], show: Callable[[Any], Any], given: _Given) -> None:
        """Let the first rank have what is shown of all pieces; where it can't take them, all ranks leave the run."""
        problem: Exception | None = None
        with closing(pieces):
            for piece in pieces:
                given.is_streamed = True
                try:
                    if self.comm.rank == 0:
                        given.take(to_frames(show(piece)))
                except Exception as error:
                    problem = error
                    break
                del piece
        with together(self.comm):
            if problem is not None:
                raise problem

    def _called(self, chosen: dict[str, Any], seed: int) -> Any:
        # On the CPU, so that a seed means the same noise on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            with self._timeline.stage(OTHER):
                return self.pipeline(**chosen, generator=generator, output_type="np")
        except ValueError as error:
            if _CHECKS & {frame.name for frame in traceback.extract_tb(error.__traceback__)}:
                raise InputError(f"{type(self.pipeline).__name__}: {first_line(error)}") from error
            raise

    def note(self, half: str, report: CallReport) -> None:
        """Take in the report of one parallel call of the VAE."""
        if self._calls is not None:
            self._calls.append((half, report))
        self._timeline.move(f"vae {half}", PROBE, report.phases.get("probe", 0.0))


def to_frames(pictures: Any) -> NDArray[np.uint8]:
    """A pipeline's first video (frames, height, width, 3) or all its pictures, of 0 to 1, in 8 bits."""
    values = np.asarray(pictures, dtype=np.float32)
    values = values[0] if values.ndim == 5 else values
    if not np.isfinite(values).all():
        raise InputError("the pipeline's output is not a number in places: try --dtype bfloat16 or --vae-dtype float32")
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def agreed_seed(comm: Comm, seed: int | None) -> int:
    """`seed`, or one that the first rank draws: with different ones, each rank would denoise another video."""
    return comm.all_gather_object(secrets.randbelow(2**31) if seed is None else seed)[0]


def place(pipeline: Any, setup: Setup, device: torch.device) -> None:
    """Put the pipeline's weights where `setup` wants them: on the device, or on the host until they are due."""
    if setup.layerwise_offload:
        _by_layer(pipeline, device)
    elif setup.cpu_offload:
        if device.type == "cpu":
            raise InputError(
                "--enable-cpu-offload needs an accelerator: on the CPU all weights are on the host already"
            )
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _by_layer(pipeline: Any, device: torch.device) -> None:
    """Group offload of every part; the next layer is fetched on a stream of its own where there are streams.

    Denoisers go block by block. The others go leaf by leaf: a VAE is called by `encode` and `decode`, which pass by
    the `forward` that blocks hang on. On the CPU the same hooks run and have nothing to move.
    """
    blocks = set(map(id, denoisers(pipeline.components).values()))
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        by_block = id(part) in blocks
        try:
            with all_quiet():
                apply_group_offloading(
                    part,
                    onload_device=device,
                    offload_device=torch.device("cpu"),
                    offload_type="block_level" if by_block else "leaf_level",
                    num_blocks_per_group=1 if by_block else None,
                    use_stream=device.type != "cpu",
                )
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--enable-layerwise-offload: {name} can't be offloaded: {first_line(error)}") from error
