"""One forward and backward pass, replayed as a CUDA graph on a GPU.

The network is small: on a GPU launching its kernels one by one takes several times longer than running them.
"""

from collections.abc import Callable

import torch

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Clips to (loss, mean squared error)."""


class Passes:
    """Adds the gradients of a loss to the parameters' `grad`, which must exist already."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._pool: tuple[int, int] | None = None
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}

    def run(self, clips: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of `clips`."""
        if not clips.is_cuda:
            return self._eager(clips)
        shape = tuple(clips.shape)
        if shape not in self._graphs:
            # Its own gradients come from the warm-up; a recording computes nothing.
            squared = self._warm_up(clips)
            self._graphs[shape] = self._record(clips)
            return squared
        graph, inputs, squared = self._graphs[shape]
        inputs.copy_(clips)
        graph.replay()
        return squared.clone()

    def _eager(self, clips: torch.Tensor) -> torch.Tensor:
        loss, squared = self._loss(clips)
        loss.backward()
        return squared

    def _warm_up(self, clips: torch.Tensor) -> torch.Tensor:
        """Let libraries choose their algorithms, off the default stream as recording asks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            squared = self._eager(clips)
        torch.cuda.current_stream().wait_stream(stream)
        squared = squared.clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return squared

    def _record(self, clips: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        graph, inputs = torch.cuda.CUDAGraph(), clips.clone()
        # One graph runs at a time, so they share their memory.
        with torch.cuda.graph(graph, pool=self._pool):
            squared = self._eager(inputs)
        self._pool = graph.pool()
        return graph, inputs, squared
