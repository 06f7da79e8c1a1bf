"""Frames as they come: a call in a thread of its own, which is at most one piece ahead of the reader."""

from __future__ import annotations

import contextvars
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaving:
    """That the reader of this rank wants no more pieces: it has closed its stream, left it behind, or failed."""

    is_closed: bool = True
    """By itself; else the loop around it is gone."""
    failure: tuple[str, str, str] | None = None
    """Of what it failed by: message, traceback and name of the class."""

    @classmethod
    def by(cls, error: BaseException) -> Leaving:
        text = "".join(traceback.format_exception(error))
        return cls(failure=(f"{type(error).__name__}: {error}", text, type(error).__name__))


Give = Callable[[Tensor], Leaving | None]
"""Hands a piece over; returns when the reader has taken the one before (None), or wants no more."""
_END = object()


class Stream(Iterator[Tensor]):
    """Pieces of frames `(batch, channels, frames, height, width)`, in order. Made by `Handle.decode_stream`.

    While the reader is at one piece, the next one is computed, and no more. Every rank of the group takes its own
    stream to the end, or closes it; who leaves a loop early closes it too. Closing waits until every rank has asked for
    its next piece or has closed; before the first one is asked for, it waits for nobody. An exception that leaves its
    `with` block is a failure: other ranks raise `RankFailedError` for it.

    Args:
        work: makes the pieces, in a thread.
        device: where they are made.
        forgo: tells the other ranks that it will not begin here.
    """

    def __init__(self, work: Callable[[Give], None], device: torch.device, forgo: Callable[[Leaving], None]) -> None:
        self._asked: SimpleQueue[Leaving | None] = SimpleQueue()
        self._asked.put(None)  # For the piece that is computed ahead.
        self._given: SimpleQueue[Any] = SimpleQueue()
        self._is_open, self._is_given = False, False
        self._start: Callable[[], threading.Thread] | None = lambda: _thread(work, self._asked, self._given, device)
        self._thread: threading.Thread | None = None
        self._ended_by: BaseException | None = None
        self._forgo = forgo

    @property
    def is_open(self) -> bool:
        """Whether it has begun and not ended."""
        return self._is_open

    def is_here(self) -> bool:
        """Whether the one who asks is the stream's own work."""
        return threading.current_thread() is self._thread

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Tensor:
        if self._start:
            start, self._start = self._start, None
            self._is_open, self._thread = True, start()
        elif not self._is_open:
            error, self._ended_by = self._ended_by, None
            raise error or StopIteration
        elif self._is_given:
            self._is_given = False
            self._asked.put(None)
        return self._take()

    def _take(self) -> Tensor:
        value = self._given.get()
        if isinstance(value, Tensor):
            self._is_given = True
            return value
        self._is_open = False
        self._given.put(_END)  # For who waits in another thread.
        if value is _END:
            raise StopIteration
        raise value

    def close(self) -> None:
        """End it on all ranks, after the piece that is under way. The handle can be used again; a second time does
        nothing."""
        self._leave(Leaving())

    def end(self, error: BaseException) -> None:
        """End it by a failure: other ranks learn of it, and who asks for another piece here gets the error."""
        if self._is_open:
            self._ended_by = error
            self._leave(Leaving.by(error))

    def _leave(self, leaving: Leaving) -> None:
        if self._start:
            self._start = None
            self._forgo(leaving)
        with suppress(StopIteration):
            while self._is_open and self._thread and self._thread.is_alive():  # In a forked child it is not.
                self._asked.put(leaving)
                self._take()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, GeneratorExit):
            self.close()
            return
        with suppress(Exception):  # What the block failed by says more.
            self._leave(Leaving.by(error))

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # Then the thread stands still.
            self._leave(Leaving(is_closed=False))


def _thread(
    work: Callable[[Give], None], asked: SimpleQueue[Leaving | None], given: SimpleQueue[Any], device: torch.device
) -> threading.Thread:
    """Begin the work, with what this thread has set for torch."""
    context, settings = contextvars.copy_context(), _settings(device)

    def give(piece: Tensor) -> Leaving | None:
        given.put(piece)
        del piece
        return asked.get()

    def run() -> None:
        try:
            with ExitStack() as stack:
                for enter in settings:
                    stack.enter_context(enter())
                work(give)
            given.put(_END)
        except BaseException as error:
            given.put(error)

    thread = threading.Thread(target=context.run, args=(run,), name="halovae stream", daemon=True)
    thread.start()
    return thread


def _settings(device: torch.device) -> list[Callable[[], AbstractContextManager[Any]]]:
    """What torch keeps for each thread, as it is in this one."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    settings: list[Callable[[], AbstractContextManager[Any]]] = [
        lambda: torch.inference_mode(inference),
        lambda: torch.set_grad_enabled(grad),
    ]
    for kind in {"cpu", device.type}:
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        settings.append(lambda k=kind, d=dtype, e=enabled: torch.autocast(k, d, e))
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "current_stream"):
        stream = module.current_stream(device)
        settings.append(lambda: module.device(device) if hasattr(module, "device") else nullcontext())
        settings.append(lambda: module.stream(stream))
    return settings
