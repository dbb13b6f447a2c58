"""Steps as CUDA graphs: a small model's kernels are shorter than the time a host needs to launch them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Losses = Callable[[Batch, Hashable], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    loss: Tensor
    metrics: dict[str, Tensor]


class GraphedStep:
    """Replays loss and gradients of a micro-batch; what was not met before runs once and is recorded.

    There is a recording for each shape. They share their memory, since one ends before the next begins. Gradients
    are added to `grad` of the parameters, which has to stay where it is; random numbers follow from the generators'
    state at each call, as they do without a recording.

    Args:
        losses: computes the loss and metrics of a batch under a shape, by the same kernels each time.
        parameters: what is trained.
        factor: of the loss, before it is differentiated.
    """

    def __init__(self, losses: Losses, parameters: list[torch.nn.Parameter], factor: float = 1.0) -> None:
        self.losses, self.parameters, self.factor = losses, parameters, factor
        self.pool = torch.cuda.graph_pool_handle()
        self.recordings: dict[Hashable, _Recording] = {}
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, batch: Batch, shape: Hashable) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of a batch to those of the parameters.

        Args:
            batch: tensors on the device or in pinned memory, of the same shapes for equal `shape`.
            shape: what `losses` is told.

        Returns:
            The loss and metrics; their memory is used again by the next call.
        """
        recording = self.recordings.get(shape)
        if recording is None:
            recording = self.recordings[shape] = self._record(batch, shape)
        for name, tensor in recording.batch.items():
            tensor.copy_(batch[name], non_blocking=True)
        recording.graph.replay()
        return recording.loss, recording.metrics

    def _run(self, batch: Batch, shape: Hashable) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.losses(batch, shape)
        (loss * self.factor).backward()
        return loss.detach(), metrics

    def _record(self, batch: Batch, shape: Hashable) -> _Recording:
        """Run once, so that all is compiled and loaded, then record; gradients and seeds stay as they were."""
        held = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        state = torch.cuda.get_rng_state()
        device = self.parameters[0].device
        batch = {name: tensor.to(device, non_blocking=True, copy=True) for name, tensor in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(batch, shape)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # another thread pins memory for the batches to come: only this one's calls are watched
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss, metrics = self._run(batch, shape)
        torch.cuda.set_rng_state(state)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        torch._foreach_copy_(gradients, held)
        return _Recording(graph, batch, loss, metrics)
