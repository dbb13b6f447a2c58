"""Gaussian diffusion of continuous tokens: the process, its training losses and the samplers of the heads.

One noise schedule (cosine, 1000 steps), a network that predicts the noise, and a variance that is either learned
between the two bounds of the posterior or fixed (Nichol and Dhariwal 2021; MAR section 3.1). A process may keep a
part of the timesteps only; the network always receives the original ones.

Letters: T timesteps kept, C channels, ... any dimensions before them, a = alpha_bar (share of signal variance).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

STEPS = 1000
"""Timesteps of the training process."""
LOWEST = -5.1
"""Half the logarithm of signal over noise that deterministic samplers start from."""

Predict = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""A head: the state x [..., C] and an original timestep to the noise [..., C] and, where the variance is learned,
its raw value [..., C]."""

Impose = Callable[[Tensor, float], Tensor]
"""Puts what is known into the state: (x, alpha_bar of the step about to be taken) to x."""

Method = Literal["ddpm", "ddim", "dpm++"]


def cosine_betas() -> Tensor:
    """Variances of the cosine schedule, float64 (Nichol and Dhariwal 2021, eq. 17)."""
    ends = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    signal = torch.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


def evenly_spaced(count: int) -> list[int]:
    """Choose `count` of the 1000 timesteps at even distances, the first and the last among them.

    Raises:
        ValueError: a count outside 1 to 1000.
    """
    _require_count(count)
    stride = (STEPS - 1) / (count - 1) if count > 1 else 1.0
    place, chosen = 0.0, []
    for _ in range(count):  # added up as the published code does, which the rounding of halves depends on
        chosen.append(round(place))
        place += stride
    return chosen


def evenly_resolved(count: int) -> list[int]:
    """Choose `count` timesteps at even distances of log(signal / noise), for the deterministic samplers.

    The cosine schedule ends in pure noise, where the predicted noise says nothing of the signal; the ratio is
    cut off at `LOWEST` (as DPM-Solver's authors advise for this schedule).

    Raises:
        ValueError: a count outside 1 to 1000.
    """
    _require_count(count)
    signal = (1 - cosine_betas()).cumprod(0)
    ratio = 0.5 * (signal.log() - (1 - signal).log())  # falls with the timestep
    usable = max(count, int((ratio >= LOWEST).sum()))
    if count == 1:
        return [usable - 1]
    wanted = torch.linspace(float(ratio[0]), float(ratio[usable - 1]), count, dtype=torch.float64)
    chosen = torch.searchsorted(-ratio, -wanted).tolist()
    for i in range(1, count):  # no timestep twice: push collisions up, then back below the end
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    return [min(t, usable - count + i) for i, t in enumerate(chosen)]


def _require_count(count: int) -> None:
    if not 1 <= count <= STEPS:
        raise ValueError(f"expected 1 to {STEPS} diffusion steps, got {count}")


class Diffusion(nn.Module):
    """The coefficients of a diffusion process: float32 buffers for training, float64 numbers for the samplers.

    Args:
        timesteps: the original timesteps that are kept, ascending; by default all 1000. The variances between
            them follow from the kept alpha_bar.

    Attributes:
        host: all coefficients as lists of T numbers.
    """

    alphas_cumprod: Tensor
    log_betas: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    def __init__(self, timesteps: Sequence[int] | None = None) -> None:
        super().__init__()
        self.timesteps = tuple(range(STEPS) if timesteps is None else timesteps)
        a = (1 - cosine_betas()).cumprod(0)[list(self.timesteps)]  # [T] float64, as all below
        previous = torch.cat([a.new_ones(1), a[:-1]])
        betas = 1 - a / previous
        variance = betas * (1 - previous) / (1 - a)
        floor = variance[min(1, len(a) - 1), None]  # the first is 0, whose logarithm is not finite
        tables = {
            "alphas_cumprod": a,
            "log_betas": betas.log(),
            "posterior_log_variance_clipped": torch.cat([floor, variance[1:]]).log(),
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - a),
            "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - a),
            "fixed_log_variance": torch.cat([floor, betas[1:]]).log(),
        }
        self.host: dict[str, list[float]] = {name: table.tolist() for name, table in tables.items()}
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)  # [T]

    def q_sample(self, start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffuse `start` [..., C] to timestep indices t, of leading dimensions of `start`, by `noise` [..., C]."""
        a = _spread(self.alphas_cumprod[t], start)
        return a.sqrt() * start + (1 - a).sqrt() * noise

    def vlb_terms(self, noise: Tensor, value: Tensor, start: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """Terms of the variational bound that train the learned variance, in bits per dimension (MAR, as released).

        For t > 0 the divergence between the true posterior and the predicted one, for t = 0 the likelihood of
        `start` in bins of width 2 / 255.

        Args:
            noise: predicted noise [..., C]; no gradient goes there.
            value: raw variance value [..., C].
            start: what was diffused, [..., C].
            state: its noised version at t.
            t: timestep indices, of leading dimensions of `start`.

        Returns:
            Terms [...], averaged over channels.
        """
        a = _spread(self.alphas_cumprod[t], start)
        predicted = (state - (1 - a).sqrt() * noise.detach()) / a.sqrt()
        coef1, coef2 = (_spread(c[t], start) for c in (self.posterior_mean_coef1, self.posterior_mean_coef2))
        mean, true_mean = coef1 * predicted + coef2 * state, coef1 * start + coef2 * state
        true_log_variance = _spread(self.posterior_log_variance_clipped[t], start)
        share = (value + 1) / 2
        log_variance = share * _spread(self.log_betas[t], start) + (1 - share) * true_log_variance
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = -_binned_log_likelihood(start, mean, 0.5 * log_variance)
        terms = torch.where(_spread(t, start) == 0, likelihood, divergence)
        return terms.mean(dim=-1) / math.log(2)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1 until `values` broadcasts against `like` from the left."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin of width 2 / 255 around x under a Gaussian; the outermost bins are open."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = (-log_std).exp()
    upper, lower = cdf((x - mean + 1 / 255) * scale), cdf((x - mean - 1 / 255) * scale)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()


# Samplers: functions of a head, the initial noise and a process, largest timestep first


def process_for(method: Method, steps: int) -> Diffusion:
    """The process that a sampler runs on with that many steps."""
    return Diffusion(evenly_spaced(steps) if method == "ddpm" else evenly_resolved(steps))


def ancestral(
    predict: Predict,
    x: Tensor,
    process: Diffusion,
    noise: Callable[[int], Tensor],
    temperature: float = 1.0,
    impose: Impose | None = None,
) -> Tensor:
    """Ancestral sampling ("ddpm"; Ho et al. 2020, algorithm 2), with MAR's temperature.

    Args:
        predict: the head.
        x: initial noise [..., C].
        process: the process.
        noise: normal numbers of the n-th step, n from 1, [..., C]; not asked for the last one.
        temperature: factor of those numbers.
        impose: applied before each step.
    """
    host = process.host
    for n, i in enumerate(reversed(range(len(process.timesteps))), start=1):
        a = host["alphas_cumprod"][i]
        if impose is not None:
            x = impose(x, a)
        predicted, value = predict(x, process.timesteps[i])
        start = (x - math.sqrt(1 - a) * predicted) / math.sqrt(a)
        x = host["posterior_mean_coef1"][i] * start + host["posterior_mean_coef2"][i] * x
        if i == 0:
            break
        if value is None:
            deviation: float | Tensor = math.exp(0.5 * host["fixed_log_variance"][i])
        else:
            high, low = host["log_betas"][i], host["posterior_log_variance_clipped"][i]
            deviation = (0.5 * (low + (value + 1) / 2 * (high - low))).exp()
        x = x + deviation * temperature * noise(n)
    return x


def multistep(
    predict: Predict, x: Tensor, process: Diffusion, order: Literal[1, 2], impose: Impose | None = None
) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022, algorithm 2, multistep), deterministic; of order 1 it is DDIM.

    Args:
        predict: the head; a learned variance is not used.
        x: initial noise [..., C].
        process: the process, best of `evenly_resolved` timesteps.
        order: 1 or 2; the first and the last step are of order 1.
        impose: applied before each step.
    """
    signals = process.host["alphas_cumprod"]
    ratios = [0.5 * math.log(a / (1 - a)) for a in signals]
    before: Tensor | None = None
    for i in reversed(range(len(signals))):
        a = signals[i]
        if impose is not None:
            x = impose(x, a)
        predicted, _ = predict(x, process.timesteps[i])
        start = (x - math.sqrt(1 - a) * predicted) / math.sqrt(a)
        if i == 0:
            return start
        step = ratios[i - 1] - ratios[i]
        estimate = start
        if order == 2 and before is not None:
            r = (ratios[i] - ratios[i + 1]) / step
            estimate = start + (start - before) / (2 * r)
        a_next, before = signals[i - 1], start
        x = math.sqrt((1 - a_next) / (1 - a)) * x - math.sqrt(a_next) * math.expm1(-step) * estimate
    return x
