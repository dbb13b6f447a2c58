import dataclasses
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest

from hmar_cli.settings import Optim
from hmar_cli.training.schedules import learning_rate_factor, weight_decay

GOLDEN = Path(os.environ.get("HMAR_GOLDEN") or Path(__file__).parents[1] / "fixtures" / "golden")
RECORDED = json.loads((GOLDEN / "loss-weights.json").read_text())["schedules"]


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: entry["label"])
def test_matches_recorded_values(entry):
    settings = Optim(
        schedule=entry["schedule"],
        start_ratio=entry["wp0"],
        end_ratio=entry["wpe"],
        weight_decay=entry["weight_decay"],
        weight_decay_end=entry["weight_decay_end"] or None,
        warmup=entry["warmup_it"] / entry["max_it"],
    )
    assert len(entry["values"]) > 10
    for step, rate, decay in entry["values"]:
        factor = learning_rate_factor(settings, step, entry["max_it"])
        assert entry["peak_lr"] * factor == pytest.approx(rate, rel=1e-9)
        assert weight_decay(settings, step, entry["max_it"]) == pytest.approx(decay, rel=1e-9)


def test_recorded_schedules_cover_all_kinds():
    kinds = {entry["schedule"].rstrip("0123456789.") for entry in RECORDED}
    assert kinds == {"lin", "cos", "exp"}
    assert len(RECORDED) >= 13


def test_constant_stays_at_its_peak_after_the_warm_up():
    settings = Optim(schedule="constant", warmup=0.1, start_ratio=0.5)
    factors = [learning_rate_factor(settings, step, 100) for step in range(100)]
    assert factors[0] == 0.5
    assert factors[5] == pytest.approx(0.75)
    assert factors[10:] == [1.0] * 90


def test_a_warm_up_in_steps_goes_before_its_share():
    share = Optim(schedule="cos", warmup=0.1, start_ratio=0.0)
    in_steps = dataclasses.replace(share, warmup=0.5, warmup_steps=20)
    for step in range(200):
        assert learning_rate_factor(in_steps, step, 200) == learning_rate_factor(share, step, 200)
    assert learning_rate_factor(in_steps, 9, 10) == pytest.approx(
        9 / 20
    )  # a run that ends before its warm-up


@pytest.mark.parametrize("kind", ["lin0", "lin", "lin00", "lin0.3", "cos", "exp"])
def test_ends_at_the_end_ratio(kind):
    settings = Optim(schedule=kind, warmup=0.1, end_ratio=0.05)
    factors = [learning_rate_factor(settings, step, 200) for step in range(200)]
    assert factors[-1] == pytest.approx(0.05)
    assert max(factors) <= 1 + 1e-12
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(factors[20:]))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_very_short_runs_have_finite_rates(steps, warmup):
    for kind in ("lin0", "cos", "exp", "lin0.5", "constant"):
        settings = Optim(schedule=kind, warmup=warmup)
        for step in range(steps):
            assert 0 < learning_rate_factor(settings, step, steps) <= 1
            assert math.isclose(weight_decay(settings, step, steps), 0.05)


@pytest.mark.parametrize("kind", ["lin2", "linear", "cosine", "lin-1", ""])
def test_unknown_schedule_is_named(kind):
    with pytest.raises(ValueError, match="expected a schedule"):
        learning_rate_factor(Optim(schedule=kind), 50, 100)
