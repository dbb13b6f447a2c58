"""What the papers' sweeps vary, and their figures."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hmar_cli.analysis.studies import (
    EXTRA_PASS,
    TRAINING_SEED,
    ablation_row,
    describe_model,
    draw_ablation,
    draw_curves,
    draw_refinement,
    draw_speed,
    guidance_values,
    phase_values,
    refinement_values,
    speed_values,
    spreads,
    spreads_in_words,
    with_extra_pass,
)
from hmar_cli.analysis.sweep import RATE, SECONDS, Candidate, Outcome, Painter, Trial
from hmar_cli.checkpoints.store import Checkpoint
from hmar_cli.models.scales import Scales, check_schedule
from hmar_cli.recipe import load_recipe
from hmar_cli.sampling.images import Job, Labels

FID, IS = "FID[judge]-64", "IS[judge]-64"
COLUMNS = {FID: "lower is better", IS: "higher is better"}


def test_an_extra_pass_is_at_one_scale_alone() -> None:
    scales = Scales.of([1, 2, 4])
    assert with_extra_pass((), scales, 2) == ((1,), (2, 2), (16,))
    start = ((1,), (1, 3), (16,))
    for number, passes in ((2, [1, 3, 1]), (3, [1, 2, 2])):
        longer = with_extra_pass(start, scales, number)
        assert [len(entry) for entry in longer] == passes
        assert check_schedule(longer, scales) == longer
    for number in (0, 1, 4):
        with pytest.raises(ValueError, match="expected"):
            with_extra_pass((), scales, number)
    with pytest.raises(ValueError, match="from 2 to 2, got 1"):  # the first scale is not refined
        with_extra_pass((), Scales.of([2, 4]), 1)


def test_scales_without_room_are_left_out() -> None:
    recipe = load_recipe("hmar-tiny-masked")
    count = len(recipe.scales)
    assert refinement_values(recipe, ()) == {EXTRA_PASS: list(range(2, count + 1))}
    full = tuple((1,) * length for length in recipe.scales.lengths)
    assert refinement_values(recipe, full[:2] + tuple((n,) for n in recipe.scales.lengths[2:])) == {
        EXTRA_PASS: list(range(3, count + 1))
    }


def test_values_are_those_of_the_papers() -> None:
    himar, mar, var = (load_recipe(name) for name in ("himar-b", "mar-b", "var-d16"))
    assert speed_values(himar) == {"steps": [1, 2, 4, 6, 8]}  # Hi-MAR, section 4.5
    assert speed_values(mar) == {"steps": [16, 32, 64, 128, 256]}
    assert speed_values(var) == {}
    assert phase_values(himar) == {"pivot_steps": [4, 8, 16, 32, 64], "steps": [1, 2, 4, 6, 8]}
    assert phase_values(mar) == {} == phase_values(var)
    assert guidance_values(var)["cfg"][0] == 0 and guidance_values(mar)["cfg"][0] == 1
    assert list(guidance_values(himar)) == ["cfg", "pivot_cfg"]
    few = load_recipe("himar-tiny")  # 16 tokens, 4 pivots
    assert phase_values(few) == {"pivot_steps": [1, 2, 4], "steps": [1, 2, 4, 6, 8]}


def test_what_tells_the_rows_of_table_5_apart() -> None:
    names = ["mar-cifar10", "himar-cifar10-visual", "himar-cifar10-mlp", "himar-cifar10-no-scale"]
    rows = [describe_model(load_recipe(name)) for name in (*names, "himar-cifar10")]
    table = [tuple(row.values())[:-1] for row in rows]
    assert table == [
        ("none", "none", "mlp", "none"),
        ("visual", "mlp", "mlp", "none"),
        ("conditional", "mlp", "mlp", "none"),
        ("conditional", "mlp", "transformer", "none"),
        ("conditional", "mlp", "transformer", "table"),
    ]
    assert all(isinstance(row["parameters"], int) for row in rows)
    weighted = describe_model(load_recipe("hmar-tiny"))
    assert (weighted["attention"], weighted["weighting"]) == ("diagonal", "lognormal")
    assert describe_model(load_recipe("hmar-tiny-masked"))["masked branch"] is True


def outcome(
    name: str, varied: str, value: Any, fid: float, seconds: float = 0.1, recipe: str = "himar-b"
) -> Outcome:
    """One as a sweep gives it, without a model."""
    resolved = load_recipe(recipe)
    checkpoint = Checkpoint(
        folder=Path("nowhere"),
        kind=resolved.trains,
        recipe=resolved,
        class_names=("a",),
        step=1,
        weights=("model",),
        licence="",
        source=None,
        tokenizer_hash="",
    )
    job = Job(settings=resolved.sample, conditions=Labels((0,)), count=64, seed=0, batch_size=128)
    trial = Trial(candidate=Candidate(name=name, checkpoint=checkpoint), varied=varied, value=value, job=job)
    cells = {FID: fid, IS: 100 - fid, f"{IS} ±": 1.0, SECONDS: seconds, RATE: 1 / seconds}
    return Outcome(trial, dict(cells), np.zeros((1, 4, 4, 3), np.uint8), {"device": "NVIDIA H100"})


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each line of a panel, by its name in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if hasattr(handle, "lines") else handle
        found[label] = [(float(x), float(y)) for x, y in line.get_xydata()]
    return found


def test_curves_have_a_panel_for_each_metric_and_setting() -> None:
    outcomes = [outcome("himar", "pivot_steps", n, 10 - n) for n in (1, 2, 4)]
    outcomes += [outcome(name, "steps", n, 20 - n) for name in ("himar", "mar") for n in (2, 8)]
    panels = draw_curves(outcomes, COLUMNS).axes
    assert len(panels) == 4
    assert lines(panels[0]) == {"himar": [(1, 9), (2, 8), (4, 6)]}  # the other model has none there
    assert lines(panels[1]) == {"himar": [(2, 18), (8, 12)], "mar": [(2, 18), (8, 12)]}
    assert lines(panels[3])["mar"] == [(2, 82), (8, 88)]
    assert panels[0].get_ylabel() == f"{FID} (lower is better)"
    assert panels[3].get_ylabel() == f"{IS} (higher is better)"
    assert panels[0].get_xlabel() == "autoregressive steps of phase 1" and panels[0].get_xscale() == "log"
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["1", "2", "4"]
    mixed = [outcome("var", "cfg", 0.0, 3, recipe="var-d16"), outcome("mar", "cfg", 1.0, 3, recipe="mar-b")]
    assert (
        draw_curves(mixed, {FID: ""}).axes[0].get_xlabel()
        == "guidance (VAR, HMAR: 0 is none; MAR, Hi-MAR: 1)"
    )
    assert draw_curves(mixed[1:], {FID: ""}).axes[0].get_xlabel() == "guidance (1 is none)"


def test_speed_is_metric_against_seconds() -> None:
    outcomes = [outcome("himar", "steps", n, 10 - n, seconds=n / 10) for n in (1, 4)]
    outcomes.append(outcome("var", "", None, 3, seconds=0.05, recipe="var-d16"))
    panel, *others = draw_speed(outcomes, {FID: "lower is better"}).axes
    assert not others
    assert lines(panel) == {
        "himar, autoregressive steps (of phase 2)": [(0.1, 9), (0.4, 6)],
        "var": [(0.05, 3)],
    }
    assert panel.get_xlabel() == "seconds per image (batch 64, NVIDIA H100)"  # all 64 images
    assert [text.get_text() for text in panel.texts] == ["1", "4", ""]


def test_refinement_stands_beside_the_schedule_as_it_is() -> None:
    rows = [outcome("hmar", "", None, 5.0, recipe="hmar-d16-masked")]
    rows += [outcome("hmar", EXTRA_PASS, k, 5 - k / 10, recipe="hmar-d16-masked") for k in (2, 3)]
    (panel,) = draw_refinement(rows, {FID: "lower is better"}).axes
    drawn = lines(panel)
    assert drawn["one more pass"] == [(2, 4.8), (3, 4.7)]
    assert {y for _, y in drawn["none more"]} == {5.0}
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["2\n2x2", "3\n3x3"]


def test_an_ablation_shows_means_and_every_seed() -> None:
    rows = [outcome("mar", TRAINING_SEED, seed, fid, recipe="mar-b") for seed, fid in ((0, 4.0), (1, 7.0))]
    rows.append(outcome("himar", TRAINING_SEED, 0, 2.0))
    found = spreads(rows)
    assert list(found["mar"]) == [FID, IS, SECONDS, RATE]  # no spread of a spread
    assert found["mar"][FID] == {"mean": 5.5, "spread": pytest.approx(math.sqrt(4.5)), "trials": 2}
    assert found["himar"][FID] == {"mean": 2.0, "spread": None, "trials": 1}
    mar, himar = spreads_in_words(found)
    assert mar.startswith(f"mar, mean of 2 trainings: {FID} 5.5 ± 2.1, {IS} 94.5 ± 2.1, ")
    assert himar.startswith(f"himar, mean of 1 training: {FID} 2, {IS} 98, ")
    undrawn = replace(rows[0], cells=rows[0].cells | {SECONDS: None})
    assert spreads([undrawn, rows[1]])["mar"][SECONDS] == {"mean": 0.1, "spread": None, "trials": 1}
    (panel,) = draw_ablation(rows, {FID: "lower is better"}).axes
    assert [bar.get_width() for bar in panel.patches] == [5.5, 2.0]
    assert [list(line.get_xdata()) for line in panel.lines] == [[4.0, 7.0]]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["mar", "himar"]
    row = ablation_row(rows[1])
    assert row["model"] == "mar" and row["head 2"] == "mlp" and row[TRAINING_SEED] == 1 and row[FID] == 7.0
    assert "seed" not in " ".join(ablation_row(replace(rows[1], trial=replace(rows[1].trial, varied=""))))


def test_speed_is_the_median_batch_after_the_first_two() -> None:
    job = outcome("x", "", None, 1.0).trial.job
    painter = Painter(None, None, None, torch.device("cpu"), [64.0, 32.0, 6.4, 12.8, 19.2])  # type: ignore[arg-type]
    assert painter.speed(job) == {SECONDS: pytest.approx(0.2), RATE: pytest.approx(5.0)}
    painter.seconds = [64.0]
    assert painter.speed(job)[SECONDS] == 1.0
    assert painter.speed(replace(job, batch_size=32))[SECONDS] == 2.0
    painter.seconds = []
    assert painter.speed(job) == {SECONDS: None, RATE: None}
