"""A small objective with two networks, random numbers and state, for tests of the trainer itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.settings import MsvqObjective, Optim, Recipe, Train
from hmar_cli.training.objective import Objective
from hmar_cli.training.trainer import Save, Weights

IMAGES = 41


class Toy(Objective):
    """Fits y = sin(x); a second network fits the first one's error. `poison` is a step whose loss is NaN."""

    def __init__(self, poison: int = -1, where: str = "loss", noise: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
        self.model.register_buffer("seen", torch.zeros(()))
        self.model.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.critic = nn.Linear(2, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.networks = {"model": self.model, "critic": self.critic}
        self.poison, self.where, self.noise = poison, where, noise
        self.usage, self.steps, self.calls = torch.zeros(2), [], 0

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"] + self.noise * torch.randn_like(batch["x"])
        out = self.model(x)
        self.usage += out.detach().sum(dim=0)
        error = (out - x.sin()[:, :2]).square().mean(dim=1, keepdim=True)
        loss = error.mean() + (self.critic(self.frozen(out.detach())) - error.detach()).square().mean()
        self.calls += 1
        if len(self.steps) == self.poison:  # a loss that is not finite, or a finite one whose gradient is not
            root = (self.model[0].weight.sum() * 0).sqrt()
            loss = loss * float("nan") if self.where == "loss" else loss + root
        return loss, {"per_scale": out.detach().mean(dim=0), "progress": torch.tensor(progress)}

    def on_step(self, step: int) -> None:
        self.steps.append(step)
        self.model.get_buffer("seen").add_(0.5)
        self.model.get_buffer("count").add_(1)
        with torch.no_grad():  # like the revival of codes: the model depends on what was counted
            self.model[0].bias.add_(1e-3 * self.usage.mean())

    def resume_state(self) -> dict[str, Tensor]:
        return {"usage": self.usage}

    def load_resume_state(self, state: dict[str, Tensor]) -> None:
        self.usage = state["usage"].clone()


def data() -> Tensor:
    return torch.randn(IMAGES, 3, generator=torch.Generator().manual_seed(5))


def batches(start: int, rank: int, world: int, size: int) -> Iterator[dict[str, Tensor]]:
    """As the real ones: a permutation an epoch, slices by process."""
    everyone = world * size
    length = IMAGES // everyone
    step = start
    while True:
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step // length))
        first = step % length * everyone + rank * size
        index = order[first : first + size]
        yield {"x": data()[index], "index": index}
        step += 1


def saver(recipe: Recipe) -> Save:
    def save(folder: Path, step: int, weights: Weights, training: Any) -> None:
        save_checkpoint(
            folder,
            recipe=recipe,
            weights=weights,
            class_names=["a"],
            step=step,
            tokenizer=None,
            tokenizer_hash="",
            training=training,
        )

    return save


def recipe(**train: object) -> Recipe:
    settings = {
        "batch_size": 8,
        "accumulate": 2,
        "steps": 6,
        "ema": 0.9,
        "log_every": 2,
        "save_every": 3,
        "sample_every": 3,
        "keep": 2,
    }
    return Recipe(
        name="toy",
        objective=MsvqObjective(),
        optim=Optim(base_lr=1.0, warmup=0.2),
        train=Train(**{**settings, **train}),
    )
