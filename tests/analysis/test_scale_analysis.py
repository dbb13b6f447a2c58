"""Loss and accuracy per scale: the same as training measures, whatever the batches; and the log-normal fit."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hmar_cli.analysis import scales as analysis
from hmar_cli.analysis.held_out import HeldOut, Subject
from hmar_cli.analysis.scales import (
    LogNormal,
    draw_masks,
    fit_log_normal,
    measure_scales,
    predict,
    scale_figure,
    summarize,
    tasks,
)
from hmar_cli.models.scales import Scales
from hmar_cli.training.next_scale import MaskedTraining, NextScaleTraining

Load = Callable[[str], Subject]
SCALES = Scales.of([1, 2, 3])


def column(rows: list[analysis.Row], key: str) -> Tensor:
    return torch.tensor([float(row[key] or 0) for row in rows])


@pytest.mark.parametrize("name", ["var", "hmar"])
def test_next_scale_numbers_are_those_of_training(name: str, load: Load, held_out: HeldOut) -> None:
    subject = load(name)
    rows = measure_scales(subject, held_out, "next-scale", batch_size=3, seed=0, share=None)
    objective = NextScaleTraining(subject.model, subject.codec.quantizer, label_drop=0.0).eval()
    batch = {"tokens": held_out.tokens, "label": held_out.labels(subject.checkpoint)}
    with torch.no_grad():
        metrics = objective(batch, 0.0)[1]
    for key in ("cross_entropy", "accuracy"):
        torch.testing.assert_close(column(rows, key), metrics[f"{key}_per_scale"], rtol=1e-5, atol=1e-6)
    total = summarize(rows, subject.model.scales)["totals"][0]
    assert total["cross_entropy"] == pytest.approx(metrics["cross_entropy"].item(), rel=1e-5)
    assert total["accuracy"] == pytest.approx(metrics["accuracy"].item(), rel=1e-5)


@pytest.mark.parametrize("name", ["masked", "leak-free"])
def test_masked_numbers_are_those_of_training(
    name: str, load: Load, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load(name)
    grids, labels = subject.model.scales, held_out.labels(subject.checkpoint)
    rows = measure_scales(subject, held_out, "masked", batch_size=3, seed=5, share=0.4)
    assert [row["scale"] for row in rows] == [2, 3, 4, 5, 6]
    objective = MaskedTraining(subject.model, subject.codec.quantizer, label_drop=0.0).eval()
    masks = draw_masks(grids, range(7), 5, 0.4)
    found = []
    for i in range(7):  # training has one mask a batch, the analysis one an image
        monkeypatch.setattr(objective, "draw_mask", lambda device, i=i: masks[i])
        with torch.no_grad():
            metrics = objective({"tokens": held_out.tokens[i : i + 1], "label": labels[i : i + 1]}, 0.0)[1]
        found.append(torch.stack([metrics["cross_entropy_per_scale"], metrics["accuracy_per_scale"]]))
    wanted = torch.stack(found).mean(dim=0)[:, 1:]  # [2, K - 1]
    torch.testing.assert_close(column(rows, "cross_entropy"), wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(column(rows, "accuracy"), wanted[1], rtol=1e-5, atol=1e-6)


def test_batches_change_nothing_and_the_error_is_that_of_the_mean(load: Load, held_out: HeldOut) -> None:
    several, one = (
        measure_scales(load("masked"), held_out, "masked", batch_size=size, seed=1, share=None)
        for size in (2, 7)
    )
    for key in ("cross_entropy", "accuracy", "cross_entropy_error"):
        torch.testing.assert_close(column(several, key), column(one, key), rtol=1e-5, atol=1e-6)
    parts = [
        HeldOut(
            held_out.tokens[i : i + 1],
            held_out.places[i : i + 1],
            held_out.class_names,
            None,
            held_out.about,
        )
        for i in range(7)
    ]
    subject = load("var")
    alone = torch.stack(
        [
            column(
                measure_scales(subject, part, "next-scale", batch_size=1, seed=0, share=None), "cross_entropy"
            )
            for part in parts
        ]
    )  # [N, K]
    rows = measure_scales(subject, held_out, "next-scale", batch_size=7, seed=0, share=None)
    wanted = alone.std(dim=0) / math.sqrt(7)
    torch.testing.assert_close(column(rows, "cross_entropy_error"), wanted, rtol=1e-4, atol=1e-6)
    single = measure_scales(subject, parts[0], "next-scale", batch_size=1, seed=0, share=None)
    assert math.isnan(float(single[0]["cross_entropy_error"] or 0))


def test_masks_are_functions_of_seed_and_image() -> None:
    masks = draw_masks(SCALES, range(5), 3, 0.5)
    assert masks.shape == (5, 13) and masks.dtype == torch.bool
    assert torch.equal(masks[2:4], draw_masks(SCALES, range(2, 4), 3, 0.5))
    assert not torch.equal(masks, draw_masks(SCALES, range(5), 4, 0.5))
    assert (masks[:, :4].sum(dim=1) == 2).all() and (masks[:, 4:].sum(dim=1) == 5).all()  # ceil(9 / 2)
    assert draw_masks(SCALES, range(3), 0, 1.0).all()
    assert (draw_masks(SCALES, range(3), 0, 0.0)[:, :4].sum(dim=1) == 1).all()  # at least one
    shares = draw_masks(Scales.of([1, 30]), range(400), 0, None).float().mean(dim=1).sort().values
    even = (torch.arange(400) + 0.5) / 400
    assert (shares - even).abs().max() < 0.01  # as U(0, 1), nearly without chance


def test_a_leak_free_branch_sees_nothing_of_masked_tokens(load: Load, held_out: HeldOut) -> None:
    labels = held_out.labels(load("leak-free").checkpoint)
    last = load("leak-free").model.scales.slice(5)
    mask = draw_masks(load("leak-free").model.scales, range(7), 0, 0.5)
    hidden = torch.cat([mask.new_zeros(7, 1), mask], dim=1)
    changed = held_out.tokens.clone()
    changed[:, last] = torch.where(hidden[:, last], (changed[:, last] + 100) % 256, changed[:, last])
    for name, blind in (("leak-free", True), ("masked", False)):
        with torch.no_grad():
            one, two = (
                predict(load(name), tokens, labels, mask)[:, last] for tokens in (held_out.tokens, changed)
            )
        assert torch.allclose(one, two, atol=1e-5) is blind, name


def test_what_a_model_is_asked(load: Load) -> None:
    assert tasks(load("hmar")) == ("next-scale",) and tasks(load("masked")) == ("next-scale", "masked")


def test_an_exact_log_normal_curve_is_found() -> None:
    curve = LogNormal(20.0, 1.8, 0.9, 1.0)
    found = fit_log_normal([curve.at(k) for k in range(1, 11)])
    assert found is not None
    assert found == pytest.approx(curve, rel=1e-9)
    places = [k / 100 for k in range(100, 1000)]
    assert found.peak == pytest.approx(max(places, key=found.at), abs=0.01)


def test_losses_without_a_middle_have_no_log_normal_curve() -> None:
    assert fit_log_normal([4.0, 2.0, 1.0, 2.0, 4.0, 8.0, 16.0]) is None
    assert fit_log_normal([1.0, 2.0, 1.0]) is None  # a parabola fits any three
    assert fit_log_normal([0.0, 2.0, 3.0, 1.0]) is None
    rough = fit_log_normal([1.0, 3.0, 2.0, 3.0, 1.0, 0.5])
    assert rough is not None and 0 < rough.r_squared < 1


def test_difficulty_is_the_least_loss_over_models(tmp_path: Path) -> None:
    def rows(model: str, losses: list[float]) -> list[analysis.Row]:
        return [
            {
                "model": model,
                "task": "next-scale",
                "scale": k,
                "cross_entropy": loss,
                "cross_entropy_error": 0.1,
                "accuracy": 0.1 * k,
                "accuracy_error": 0.01,
            }
            for k, loss in enumerate(losses, start=1)
        ]

    both = [*rows("a", [1.0, 5.0, 2.0]), *rows("b", [3.0, 4.0, 6.0])]
    found = summarize(both, SCALES)
    assert found["difficulty"]["least_cross_entropy"] == [1.0, 4.0, 2.0]
    assert found["totals"][0]["cross_entropy"] == pytest.approx((1 * 1 + 4 * 5 + 9 * 2) / 14)
    assert found["totals"][1]["accuracy"] == pytest.approx((1 * 0.1 + 4 * 0.2 + 9 * 0.3) / 14)
    labels = [text.get_text() for text in scale_figure(both, SCALES).legends[0].get_texts()]
    assert labels == ["a, next-scale", "b, next-scale"]
