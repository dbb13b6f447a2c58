"""Diffusion: timesteps of the samplers, and samplers on data whose best noise prediction is known."""

import math

import pytest
import torch
from torch import Tensor

from hmar_cli.models.diffusion import (
    STEPS,
    Diffusion,
    Method,
    ancestral,
    evenly_resolved,
    evenly_spaced,
    multistep,
    process_for,
)

MEAN, DEVIATION = 1.5, 0.4
SIGNAL = Diffusion().host["alphas_cumprod"]


def perfect(x: Tensor, t: int) -> tuple[Tensor, None]:
    """Expected noise of data that are normal with MEAN and DEVIATION."""
    a = SIGNAL[t]
    variance = a * DEVIATION**2 + 1 - a
    return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / variance, None


@pytest.mark.parametrize("choose", [evenly_spaced, evenly_resolved])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 25, 100, 999, STEPS])
def test_timesteps_ascend_and_none_comes_twice(choose, count: int) -> None:
    chosen = choose(count)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 0 and chosen[-1] < STEPS
    assert count == 1 or chosen[0] == 0


@pytest.mark.parametrize("choose", [evenly_spaced, evenly_resolved])
@pytest.mark.parametrize("count", [0, STEPS + 1])
def test_impossible_counts(choose, count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to {STEPS} diffusion steps, got {count}"):
        choose(count)


def test_resolved_timesteps_stop_before_pure_noise() -> None:
    last = evenly_resolved(20)[-1]
    assert SIGNAL[last] / (1 - SIGNAL[last]) == pytest.approx(math.exp(-10.2), rel=0.3)


def draw(method: Method, steps: int, count: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    process = process_for(method, steps)
    if method == "ddpm":
        fresh = lambda n: torch.randn(count, 1, generator=generator, dtype=torch.float64)  # noqa: E731
        return ancestral(perfect, x, process, fresh)
    return multistep(perfect, x, process, 1 if method == "ddim" else 2)


@pytest.mark.parametrize(("method", "steps"), [("ddpm", 250), ("ddim", 100), ("dpm++", 20)])
def test_samplers_reach_the_data(method: Method, steps: int) -> None:
    drawn = draw(method, steps)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.05)


def test_second_order_needs_fewer_steps() -> None:
    """Both are deterministic: the exact flow maps x to mean + deviation x, as far as the first step is pure noise."""

    def error(method: Method, steps: int) -> float:
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        end = multistep(perfect, x, process_for(method, steps), 1 if method == "ddim" else 2)
        return (end - (MEAN + DEVIATION * x)).abs().max().item()

    assert error("dpm++", 10) < 0.5 * error("ddim", 10)
    assert error("dpm++", 40) < error("dpm++", 10)


def test_what_is_imposed_stays() -> None:
    known, initial = torch.tensor([True, False])[:, None], torch.randn(2, 3)
    tokens = torch.full((2, 3), MEAN)

    def impose(x: Tensor, a: float) -> Tensor:
        return torch.where(known, math.sqrt(a) * tokens + math.sqrt(1 - a) * initial, x)

    end = multistep(perfect, initial, process_for("dpm++", 20), 2, impose)
    assert (end[0] - MEAN).abs().max() < 0.02  # the last step starts from almost no noise


def test_variational_term_does_not_reach_the_noise() -> None:
    process, t = Diffusion(), torch.tensor([0, 5, 900])
    start, noise = torch.randn(3, 4), torch.randn(3, 4)
    predicted = torch.randn(3, 4, requires_grad=True)
    value = torch.randn(3, 4, requires_grad=True)
    process.vlb_terms(predicted, value, start, process.q_sample(start, t, noise), t).sum().backward()
    assert predicted.grad is None
    assert value.grad is not None and value.grad.abs().min() > 0
