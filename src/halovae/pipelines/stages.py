"""Where a pipeline's time and memory go: its stages, seen from outside."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from halovae.base.memory import PeakMemory
from halovae.base.replaced import replaced, wrapped
from halovae.base.timeline import note

TEXT_ENCODE, VAE_ENCODE, DENOISE, VAE_DECODE, OTHER = "text encode", "vae encode", "denoise", "vae decode", "other"
PROBE = "vae probe"
"""What only the first call of each half does: exact mode's comparison."""
LOAD, WRITE = "load", "write"
"""Before and after a pipeline's call."""
_SPANS = {TEXT_ENCODE: "text", VAE_ENCODE: "encode", DENOISE: "denoise", VAE_DECODE: "decode"}
"""What these are called in a timeline of all ranks."""
STAGES = (TEXT_ENCODE, VAE_ENCODE, DENOISE, VAE_DECODE, PROBE, OTHER)


class StageTimeline:
    """Seconds and peak memory of the stages of one run on this rank. A stage within a stage counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}
        """Bytes: of the accelerator's memory, or of the whole process on a CPU."""
        self._device = device
        self._open: list[str] = []
        self._since = 0.0
        self._memory: PeakMemory | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._turn()
            self._open.pop()
            if name in _SPANS:
                note(_SPANS[name], started)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count `seconds` of one stage for another."""
        if not seconds:
            return
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def _turn(self) -> None:
        """Close the account of the innermost stage, and open a new one."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            peak = self._memory.read() if self._memory else None
            if peak is not None:
                self.peak_memory[name] = max(peak, self.peak_memory.get(name, 0))
        self._since, self._memory = now, PeakMemory(self._device)


@contextmanager
def watched(pipeline: Any, timeline: StageTimeline, on_step: Callable[[int, int | None], None]) -> Iterator[None]:
    """Within it, the pipeline's calls are accounted for; `on_step` is called with the number of denoising steps done
    and of all (None: unknown)."""

    def timed(stage: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with timeline.stage(stage):
            return original(*args, **kwargs)

    stages = (pipeline.vae, "encode", VAE_ENCODE), (pipeline.vae, "decode", VAE_DECODE)
    with ExitStack() as stack:
        if callable(getattr(pipeline, "encode_prompt", None)):
            stages += ((pipeline, "encode_prompt", TEXT_ENCODE),)
        for owner, name, stage in stages:
            stack.enter_context(wrapped(owner, name, functools.partial(timed, stage)))
        stack.enter_context(replaced(pipeline, "progress_bar", functools.partial(_Bar, timeline, on_step)))
        yield


class _Bar:
    """Stands for the progress bar that pipelines hold around their denoising loop."""

    def __init__(
        self,
        timeline: StageTimeline,
        on_step: Callable[[int, int | None], None],
        iterable: Any = None,
        total: int | None = None,
    ) -> None:
        self._stage = timeline.stage(DENOISE)
        self._on_step, self._iterable, self._done = on_step, iterable, 0
        self._total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)

    def __enter__(self) -> _Bar:
        self._stage.__enter__()
        self._on_step(0, self._total)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stage.__exit__(*exception)

    def __iter__(self) -> Iterator[Any]:
        with self:
            for value in self._iterable:
                yield value
                self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        self._on_step(self._done, self._total)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """What else a bar can do (set_postfix, write, ...) is not shown."""
        return lambda *args, **kwargs: None
