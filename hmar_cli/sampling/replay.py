"""Batches as CUDA graphs: the kernels of a few images are shorter than the time a host needs to launch them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Replay:
    """Calls a function; what has the shapes of an earlier call is recorded at first, and replayed from then on.

    The first call of a shape is a plain one, in which everything is loaded and worked out that later ones use.

    Args:
        function: from tensors on a GPU to tensors, by the same kernels each time, without waiting for the GPU.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self.recordings: dict[tuple[torch.Size, ...], _Recording | None] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function gives; its memory is used again by the next call."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recordings:
            self.recordings[shapes] = None
            return self.function(*inputs)
        recording = self.recordings[shapes]
        if recording is None:
            recording = self.recordings[shapes] = self._record(inputs)
        for kept, given in zip(recording.inputs, inputs, strict=True):
            kept.copy_(given)
        recording.graph.replay()
        return recording.outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        kept = tuple(x.clone() for x in inputs)
        torch.cuda.empty_cache()  # the recording has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads write images
            outputs = self.function(*kept)
        return _Recording(graph, kept, outputs)
