"""AdamW over the networks of an objective: groups, clipping, a guard against NaN, and moments by name."""

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hmar_cli.errors import UserError
from hmar_cli.settings import Optim
from hmar_cli.training.objective import Objective
from hmar_cli.training.schedules import learning_rate_factor, weight_decay

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (decoupled weight decay) with a recipe's schedules; gradients are clipped network by network.

    Each step decides on the device whether it may change the weights: `bad` is set, and stays set, from the
    first step whose loss or gradient is not finite, and no weight or moment changes as long as it is. So the
    host needs to read it only when it reads something anyway.

    Args:
        objective: its networks are trained.
        settings: the recipe's optimizer.
        batch_size: images a step, over all processes; the peak learning rate is base_lr * batch_size / 256.
        steps: optimizer steps of the whole run, for the schedules.

    Attributes:
        bad: float32 scalar on the device, 1 once a loss or gradient was not finite.
        bad_step: int64 scalar on the device, the step that set `bad`, else -1.

    Raises:
        ValueError: a trainable parameter of the objective is in no network.
    """

    def __init__(self, objective: Objective, settings: Optim, batch_size: int, steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.peak = settings.base_lr * batch_size / 256
        self.parameters = trainable_parameters(objective)
        self._networks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            self._networks.setdefault(name.split(".", 1)[0], []).append(parameter)
        decayed, undecayed = parameter_groups(objective)
        self.groups = {"decayed": list(decayed), "undecayed": list(undecayed)}
        groups = [{"params": list(group.values())} for group in (decayed, undecayed) if group]
        self._decays = [group is decayed for group in (decayed, undecayed) if group]
        self.adam = torch.optim.AdamW(groups, lr=self.peak, betas=settings.betas, fused=True)
        device = next(iter(self.parameters.values())).device
        self.bad = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rate, and weight decay of the decayed group, of the step after `step` others."""
        return (
            self.peak * learning_rate_factor(self.settings, step, self.steps),
            weight_decay(self.settings, step, self.steps),
        )

    def norms(self) -> dict[str, Tensor]:
        """Clip the gradients of each network, and return their norms before that."""
        found: dict[str, Tensor] = {}
        for network, own in self._networks.items():
            gradients = [p.grad for p in own if p.grad is not None]  # none while a discriminator rests
            norm = get_total_norm(gradients) if gradients else torch.zeros_like(self.bad)
            if self.settings.clip > 0:
                clip_grads_with_norm_(own, self.settings.clip, norm)
            found[network] = norm
        return found

    def judge(self, step: int, finite: Tensor) -> None:
        """Note on the device whether all that `step` computed is finite (a boolean scalar)."""
        self.bad = torch.maximum(self.bad, (~finite).float())
        first = (self.bad > 0) & (self.bad_step < 0)
        self.bad_step = torch.where(first, step, self.bad_step)

    def step(self, step: int, keep: bool = False) -> None:
        """Update the weights, unless something was not finite; drop the gradients.

        Args:
            step: optimizer steps done before this one.
            keep: set the gradients to 0 instead, where they are.
        """
        rate, decay = self.rates(step)
        for group, decayed in zip(self.adam.param_groups, self._decays, strict=True):
            group["lr"], group["weight_decay"] = rate, decay if decayed else 0.0
        self.adam.found_inf = self.bad  # type: ignore[attr-defined]  # what GradScaler uses: 1 skips
        self.adam.step()
        self.adam.zero_grad(set_to_none=not keep)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by "network.parameter.moment"."""
        return {
            f"{name}.{key}": self.adam.state[parameter][key]
            for name, parameter in self.parameters.items()
            if parameter in self.adam.state
            for key in MOMENTS
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UserError: moments of other parameters, or of other shapes.
        """
        known = {f"{name}.{key}" for name in self.parameters for key in MOMENTS}
        if strange := sorted(set(state) - known):
            raise UserError(
                f"the saved optimizer does not fit: {len(strange)} unknown entries, such as {strange[0]}"
            )
        for name, parameter in self.parameters.items():
            if f"{name}.step" not in state:
                continue
            moments = {key: state[f"{name}.{key}"].to(parameter.device) for key in MOMENTS}
            if moments["exp_avg"].shape != parameter.shape:
                found = tuple(moments["exp_avg"].shape)
                raise UserError(f"the saved optimizer has {name} of {found}, not {tuple(parameter.shape)}")
            self.adam.state[parameter] = moments


def trainable_parameters(objective: Objective) -> dict[str, nn.Parameter]:
    """All parameters that training changes, by "network.parameter".

    Raises:
        ValueError: there are none, or one is in no network of the objective.
    """
    found = {
        f"{network}.{name}": parameter
        for network, module in objective.networks.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    inside = {id(parameter) for parameter in found.values()}
    outside = [n for n, p in objective.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside or not found:
        raise ValueError(f"expected every trainable parameter in a network of the objective, got {outside}")
    return found


def parameter_groups(objective: Objective) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split the trainable parameters into those with and those without weight decay."""
    groups: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
    for name, parameter in trainable_parameters(objective).items():
        groups[objective.undecayed(name.split(".", 1)[1], parameter)][name] = parameter
    return groups
