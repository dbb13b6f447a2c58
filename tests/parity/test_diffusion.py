"""Diffusion tables, losses and samplers, and the fixed positions of the Transformer head."""

from pathlib import Path

import golden
import pytest
import torch
from torch import Tensor

from hmar_cli.models.diffusion import Diffusion, ancestral, evenly_spaced
from hmar_cli.models.heads import sincos_table


def close(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """The fixtures' metric: largest difference over largest value."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    assert ((actual.double() - expected.double()).abs().max() / scale).item() <= bound


@pytest.mark.parametrize("path", golden.fixtures_of("diffusion"), ids=golden.fixture_id)
def test_tables(path: Path) -> None:
    about, tensors = golden.load_fixture(path)
    exact = about["tables_float64"]
    for count in (5, 6, 25, 100, 250):
        assert evenly_spaced(count) == tensors[f"out.timestep_map_{count}"].tolist()
    for count, process in ((1000, Diffusion()), (100, Diffusion(evenly_spaced(100)))):
        name = f"alphas_cumprod_{count}"
        torch.testing.assert_close(
            torch.tensor(process.host["alphas_cumprod"], dtype=torch.float64),
            torch.tensor(exact[name], dtype=torch.float64),
            rtol=1e-10,  # betas of the last timesteps lose five digits to cancellation
            atol=0,
        )
    process = Diffusion(evenly_spaced(100))
    for name in (
        "log_betas",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "fixed_log_variance",
    ):
        torch.testing.assert_close(getattr(process, name), tensors[f"out.table.{name}_100"])


@pytest.mark.parametrize("path", golden.fixtures_of("diffusion"), ids=golden.fixture_id)
def test_training_terms(path: Path) -> None:
    _, tensors = golden.load_fixture(path)
    process, t = Diffusion(), tensors["in.learned.t"]
    start, noise = tensors["in.learned.x_start"], tensors["in.learned.noise"]
    predicted, value = tensors["in.learned.model_output"].chunk(2, dim=-1)
    state = process.q_sample(start, t, noise)
    close(state, tensors["out.learned.x_t"])
    mse = (noise - predicted).square().mean(dim=-1)
    close(mse, tensors["out.learned.mse"])
    variational = process.vlb_terms(predicted, value, start, state, t)
    close(variational, tensors["out.learned.vb"])
    close(mse + variational, tensors["out.learned.loss"])


@pytest.mark.parametrize("path", golden.fixtures_of("diffusion"), ids=golden.fixture_id)
@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_one_ancestral_step(path: Path, kind: str) -> None:
    """Each recorded index as the last but one step: the state after it is recorded, and index 0 ends the loop."""
    about, tensors = golden.load_fixture(path)
    whole = Diffusion(evenly_spaced(100))
    for row, index in enumerate(tensors["in.pmv.index"].tolist()):
        seen, states = [], []

        def predict(
            x: Tensor, t: int, row: int = row, seen: list[int] = seen, states: list[Tensor] = states
        ) -> tuple[Tensor, Tensor | None]:
            seen.append(t)
            states.append(x)
            noise, value = tensors["in.pmv.model_output"][row].chunk(2)
            return noise, value if kind == "learned" else None

        part = Diffusion(whole.timesteps[: index + 1])
        noise = tensors["rand.pmv.noise"][row]
        end = ancestral(
            predict,
            tensors["in.pmv.x"][row],
            part,
            lambda n, noise=noise: noise,
            about["config"]["temperature"],
        )
        assert seen[0] == tensors["out.pmv.model_timestep"][row]
        close((states[1] if index else end), tensors[f"out.{kind}.p_sample"][row])


@pytest.mark.parametrize("path", golden.fixtures_of("diffusion"), ids=golden.fixture_id)
def test_whole_loops(path: Path) -> None:
    about, tensors = golden.load_fixture(path)
    process = Diffusion(tensors["out.timestep_map_loop"].tolist())
    signal, temperature = Diffusion().host["alphas_cumprod"], about["config"]["temperature"]
    states: list[Tensor] = []

    def learned(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        states.append(x)
        return (1 - signal[t]) ** 0.5 * x, 0.3 * x.tanh()

    draws = tensors["rand.learned_loop.p_noise"]
    end = ancestral(learned, tensors["in.learned_loop.x_T"], process, lambda n: draws[n - 1], temperature)
    close(torch.stack([*states[1:], end]), tensors["out.learned_loop.x"])

    mask, tokens = tensors["in.reimpose.mask"].bool()[:, None], tensors["in.reimpose.tokens"]
    initial, again = tensors["in.reimpose.init_noise"], tensors["rand.reimpose.p_noise"]
    inputs: list[Tensor] = []

    def fixed(x: Tensor, t: int) -> tuple[Tensor, None]:
        inputs.append(x)
        return (1 - signal[t]) ** 0.5 * x, None

    def impose(x: Tensor, a: float) -> Tensor:
        return torch.where(mask, x, a**0.5 * tokens + (1 - a) ** 0.5 * initial)

    end = ancestral(fixed, initial, process, lambda n: again[n - 1], temperature, impose)
    close(torch.stack(inputs), tensors["out.reimpose.model_input"])
    close(end, tensors["out.reimpose.x"][-1])


@pytest.mark.parametrize("path", golden.fixtures_of("sincos"), ids=golden.fixture_id)
def test_fixed_positions(path: Path) -> None:
    about, tensors = golden.load_fixture(path)
    for grid in about["config"]["grids"]:
        expected = tensors[f"out.grid{grid}_dim64"]
        torch.testing.assert_close(sincos_table(grid, grid, 64), expected, rtol=0, atol=1e-6)
    statistics = about["dim512_grid16"]
    table = sincos_table(16, 16, 512).double()
    assert table.sum().item() == pytest.approx(statistics["sum"], rel=1e-6)
    for place, value in statistics["samples"].items():
        row, column = map(int, place.split(","))
        assert table[row, column].item() == pytest.approx(value, abs=1e-6)
