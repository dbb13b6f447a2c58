"""A running average of a network's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average with a warm-up, so that a short run is not averaged with its first noise.

    The decay at update t = 0, 1, … is min(decay, (1 + t) / (10 + t)). Trained parameters and floating-point
    buffers are averaged, in place; frozen parameters and other buffers are the network's own.

    Args:
        model: the network, on its final device.
        decay: the highest decay, below 1.

    Attributes:
        updates: how many times `update` ran.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"expected a decay between 0 and 1, got {decay}")
        self.decay, self.updates, self.model = decay, 0, model
        persistent = model.state_dict(keep_vars=True)
        self.live = {
            name: tensor
            for name, tensor in persistent.items()
            if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
        }
        self.average = {name: tensor.detach().clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict with averaged weights."""
        return {**self.model.state_dict(), **self.average}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Take back a state dict and the count of updates behind it.

        Raises:
            KeyError: a weight is missing.
        """
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network its averaged weights while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            live = self.live[name].detach()
            held = live.clone()
            live.copy_(average)
            average.copy_(held)
