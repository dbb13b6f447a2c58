"""How codes are used, and how scales are weighted."""

import math
from collections.abc import Callable

import pytest
import torch

from hmar_cli.analysis.codebook import codebook_figure, codebook_rows, expected_usage, rank_curve, rank_curves
from hmar_cli.analysis.held_out import Subject
from hmar_cli.analysis.weightings import WEIGHTINGS, weighting_figure, weighting_rows
from hmar_cli.evaluation.codes import count_codes, perplexity, usage
from hmar_cli.models.scales import Scales
from hmar_cli.training.next_scale import NextScaleTraining

SCALES = Scales.of([1, 2])


def test_codes_are_counted_by_scale() -> None:
    tokens = torch.tensor([[3, 0, 0, 1, 2], [3, 0, 0, 0, 2]])
    counts = count_codes(tokens, SCALES, 4)
    assert counts.tolist() == [[0, 0, 0, 2], [5, 1, 2, 0]]
    assert usage(counts).tolist() == [0.25, 0.75]
    entropy = -sum(p * math.log(p) for p in (5 / 8, 1 / 8, 2 / 8))
    assert perplexity(counts).tolist() == pytest.approx([1.0, math.exp(entropy)])
    assert perplexity(torch.full((9,), 3)).item() == pytest.approx(9)


def test_rows_have_every_scale_and_all_together() -> None:
    counts = torch.zeros(2, 40, dtype=torch.long)
    counts[0, :2] = torch.tensor([3, 1])
    counts[1, :20] = 4
    first, second, every = codebook_rows(counts, SCALES)
    assert [row["scale"] for row in (first, second, every)] == ["1", "2", "all"]
    assert (first["tokens"], first["codes_used"], first["usage"], first["top_share"]) == (4, 2, 0.05, 1.0)
    assert (second["tokens"], second["codes_used"], second["top_share"]) == (80, 20, 0.5)
    assert (every["tokens"], every["codes_used"]) == (84, 20)
    assert every["top_share"] == pytest.approx((7 + 5 + 8 * 4) / 84)


def test_usage_of_even_codes_is_what_chance_would_show() -> None:
    assert expected_usage(1, 10) == pytest.approx(0.1)
    assert expected_usage(2, 2) == pytest.approx(0.75)
    assert expected_usage(5, 1) == 1
    drawn = torch.randint(50, (4000, 60), generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([len(row.unique()) / 50 for row in drawn])
    assert expected_usage(60, 50) == pytest.approx(seen.mean().item(), abs=4 * seen.std().item() / 4000**0.5)


def test_rank_curves_fall_from_the_most_frequent_code_to_the_last() -> None:
    counts = torch.tensor([0, 5, 1, 10, 4])
    assert rank_curve(counts) == [(1, 0.5), (2, 0.25), (3, 0.2), (4, 0.05)]
    many = rank_curve(torch.arange(1, 4097))
    assert len(many) <= 64 and (many[0][0], many[-1][0]) == (1, 4096)
    assert [share for _, share in many] == sorted((share for _, share in many), reverse=True)
    both = torch.stack([counts, counts])
    figure = codebook_figure(both, codebook_rows(both, SCALES), SCALES)
    assert [line.get_label() for line in figure.axes[1].lines] == ["1", "2", "even"]
    assert list(rank_curves(both, SCALES)) == ["1", "2"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_those_of_training(weighting: str, load: Callable[[str], Subject]) -> None:
    subject = load("hmar")
    scales = subject.model.scales
    objective = NextScaleTraining(subject.model, subject.codec.quantizer, weighting=weighting)  # type: ignore[arg-type]
    wanted = [part.double().sum().item() for part in objective.weights.split(scales.lengths)]
    rows = [row for row in weighting_rows(scales) if row["weighting"] == weighting]
    assert [row["weight"] for row in rows] == pytest.approx(wanted, rel=1e-6)
    assert sum(float(row["share"] or 0) for row in rows) == pytest.approx(1)
    tokens = sum(float(row["per_token"] or 0) * int(row["tokens"] or 0) for row in rows)
    assert tokens == pytest.approx(scales.total)
    if weighting == "none":
        assert [row["per_token"] for row in rows] == pytest.approx([1.0] * 6)


def test_the_figure_names_all_weightings() -> None:
    labels = [line.get_label() for line in weighting_figure(weighting_rows(SCALES), SCALES).axes[0].lines]
    assert len(labels) == len(WEIGHTINGS) == 6 and labels[0] == "unweighted" and labels[-1] == "log-normal"
