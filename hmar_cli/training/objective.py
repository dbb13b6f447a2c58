"""What the trainer asks of a training objective.

Letters: K scales.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable

import torch
from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """A loss and the networks that it trains; the trainer knows nothing else about a model family.

    A subclass registers its modules as usual, names the trained ones in `networks`, and computes everything
    in one `forward`, since that call is what gets wrapped for several processes: terms of several networks (a
    generator and its discriminator) belong in the one returned loss, each on detached values of the other.

    Attributes:
        networks: the trained networks by name. The one called "model" is saved as the result and averaged;
            the others are only kept for resuming. Parameters not to be trained have `requires_grad` False.
        unused_parameters: True where a step may leave some trained parameter out of the loss, which costs a
            search of the graph when several processes train.
        graphable: True where steps can be CUDA graphs: every trained parameter gets a gradient in every step, and
            what differs between steps is on the device or told by `draw_shapes`.
        shared: generator on the CPU for what all processes draw alike; the trainer gives one for every micro-batch,
            and None, before, is PyTorch's own.
    """

    networks: dict[str, nn.Module]
    shared: torch.Generator | None = None
    unused_parameters: bool = False
    graphable: bool = False

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of one micro-batch.

        Args:
            batch: tensors whose first dimension is the micro-batch, on the device of the networks.
            progress: share of training that lies behind this step, in [0, 1).

        Returns:
            The scalar to differentiate, and detached metrics: scalars, or vectors with one number a scale
            (K,), finite, of names and shapes that are the same in every step. The trainer averages them over
            micro-batches, steps and processes; a "loss" is added where there is none.
        """

    def draw_shapes(self, progress: float) -> tuple[Hashable, dict[str, float]]:
        """Draw what a step's shapes depend on, for a step that is a CUDA graph.

        Args:
            progress: see `forward`.

        Returns:
            The shapes, of which there should be few, and numbers that join the batch as scalars on the device.
        """
        return (), {}

    def forward_shapes(self, batch: dict[str, Tensor], shapes: Hashable) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what `forward` does, under what `draw_shapes` drew."""
        return self(batch, 0.0)  # type: ignore[no-any-return]

    def prepare(self, batch: int, dtype: torch.dtype) -> list[str]:
        """Settle what depends on where training runs; called once, on the device, before networks are compiled.

        Args:
            batch: images of a micro-batch of this process.
            dtype: of matrix products.

        Returns:
            Lines that tell the user.

        Raises:
            UserError: the settings ask for what cannot run here.
        """
        return []

    def compile_networks(self) -> None:
        """Compile what `forward` calls; by default the network "model", called as a whole."""
        self.networks["model"].compile()

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter gets no weight decay; by default biases and all that has one dimension.

        Args:
            name: the parameter's name within its network, such as "blocks.0.attn.proj.weight".
            parameter: the parameter.
        """
        return parameter.ndim <= 1 or name.endswith("bias")

    def on_step(self, step: int) -> None:
        """Act after an optimizer step, on every process alike; `step` counts the steps done, from 1."""

    def resume_state(self) -> dict[str, Tensor]:
        """Tensors beyond the networks' state dicts that an exact continuation needs, e.g. usage counters."""
        return {}

    def load_resume_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `resume_state` gave; tensors come on the CPU."""
