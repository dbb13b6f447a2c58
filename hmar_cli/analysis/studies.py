"""What the papers' sweeps vary, and their figures (HMAR supplement, Figs 20, 21; Hi-MAR, Figs 3 and 4, Table 5)."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from hmar_cli.analysis.results import Cell, Row
from hmar_cli.analysis.sweep import SECONDS, Outcome, full_batch
from hmar_cli.models.scales import Scales, Schedule, split_passes
from hmar_cli.report import bar_figure, dress_axes, new_figure
from hmar_cli.settings import MaskedAr, MaskedArSample, NextScale, Recipe, grid_name
from hmar_cli.sizes import model_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXTRA_PASS = "extra pass at scale"
"""What is varied where one scale at a time is sampled in one pass more; its value is the scale's number, from 1."""

TRAINING_SEED = "training seed"
"""What is varied where a recipe is trained several times; its value is the seed."""

AXES = {
    "cfg": "guidance",
    "refine_cfg": "guidance of the refining passes",
    "pivot_cfg": "guidance of phase 1",
    "steps": "autoregressive steps (of phase 2)",
    "pivot_steps": "autoregressive steps of phase 1",
    "head_steps": "diffusion steps of the dense head",
    "pivot_head_steps": "diffusion steps of the pivot head",
    "top_k": "candidates kept (top-k)",
    "top_p": "mass kept (top-p)",
}
"""Names of settings for people."""

# What is varied where the user does not say


def guidance_values(recipe: Recipe, schedule: Schedule = ()) -> dict[str, Sequence[Cell]]:
    """Guidance from none on (Fig. 21): 0 is none for VAR and HMAR, 1 for MAR and Hi-MAR, whose scales differ by 1.

    Hi-MAR's two phases are guided apart: the one that is not varied keeps its guidance.
    """
    none = 1.0 if isinstance(recipe.sample, MaskedArSample) else 0.0
    values = [none + extra for extra in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)]
    guided = getattr(recipe.model, "pivots", "none") != "none"
    return {"cfg": values, "pivot_cfg": values} if guided else {"cfg": values}


def speed_values(recipe: Recipe, schedule: Schedule = ()) -> dict[str, Sequence[Cell]]:
    """Autoregressive steps of MAR and of Hi-MAR's second phase (Fig. 3); a VAR or HMAR has its one speed.

    The paper's are 16 to 256 for the 256 tokens of MAR, and 1, 2, 4, 6, 8 for Hi-MAR.
    """
    if not isinstance(recipe.model, MaskedAr):
        return {}
    tokens = math.prod(recipe.grid)
    few = [steps for steps in (1, 2, 4, 6, 8) if steps <= tokens]
    return {"steps": few if recipe.model.pivots != "none" else _doubled(tokens)}


def phase_values(recipe: Recipe, schedule: Schedule = ()) -> dict[str, Sequence[Cell]]:
    """Autoregressive steps of Hi-MAR's phases, one at a time (Fig. 4); nothing for a model without phases."""
    if recipe.pivot_grid is None or getattr(recipe.model, "pivots", "none") == "none":
        return {}
    return {"pivot_steps": _doubled(math.prod(recipe.pivot_grid)), **speed_values(recipe)}


def _doubled(most: int) -> list[Cell]:
    """Five numbers of steps up to `most`, each twice the one before; fewer where they would fall below 1."""
    return [most >> i for i in reversed(range(5)) if most >> i]


def refinement_values(recipe: Recipe, schedule: Schedule) -> dict[str, Sequence[Cell]]:
    """The scales that have room for a pass more than `schedule` gives them (Fig. 20), by their numbers from 1."""
    scales = recipe.scales
    passes = [len(entry) for entry in schedule] or [1] * len(scales)
    return {EXTRA_PASS: [k + 1 for k in range(1, len(scales)) if passes[k] < scales.lengths[k]]}


def with_extra_pass(schedule: Schedule, scales: Scales, number: int) -> Schedule:
    """A schedule with one pass more at scale `number` (from 1), whose tokens are shared anew by MaskGIT's cosine law.

    Args:
        schedule: tokens kept by each pass of each scale; empty is one pass each.
        scales: what it is for.
        number: of the scale.

    Raises:
        ValueError: no such scale, the first, which none refines, or one that has no token left for a pass more.
    """
    if not 2 <= number <= len(scales):
        raise ValueError(f"expected a scale from 2 to {len(scales)}, got {number}")
    entries = list(schedule or ((length,) for length in scales.lengths))
    entries[number - 1] = split_passes(scales.lengths[number - 1], len(entries[number - 1]) + 1)
    return tuple(entries)


# What is said of models


def describe_model(recipe: Recipe) -> dict[str, Cell]:
    """What tells the rows of an ablation apart (Hi-MAR's Table 5; for VAR and HMAR the supplement's Table 4)."""
    model = recipe.model
    about: dict[str, Cell] = {}
    if isinstance(model, MaskedAr):
        guided = model.pivots != "none"
        about = {
            "pivots": model.pivots,
            "head 1": model.pivot_head if guided else "none",
            "head 2": model.dense_head,
            "scale vector": model.scale_vector,
        }
    elif isinstance(model, NextScale):
        about = {
            "attention": model.pattern,
            "weighting": getattr(recipe.objective, "weighting", "none"),
            "masked branch": recipe.objective.kind == "masked",
        }
    return {**about, "parameters": model_parameters(recipe)}


def spreads(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean and sample standard deviation of each number over the trials of each model, by the models' names."""
    found: dict[str, Any] = {}
    for name, own in _by_model(outcomes).items():
        found[name] = {}
        for column in (key for key in own[0].cells if not key.endswith("±")):
            values = [float(cell) for each in own if (cell := each.cells.get(column)) is not None]
            if not values:
                continue
            spread = stdev(values) if len(values) > 1 else None
            found[name][column] = {"mean": mean(values), "spread": spread, "trials": len(values)}
    return found


def spreads_in_words(found: Mapping[str, Any]) -> list[str]:
    """What `spreads` found, a line a model."""

    def words(column: str, each: Mapping[str, Any]) -> str:
        spread = "" if each["spread"] is None else f" ± {each['spread']:.2g}"
        return f"{column} {each['mean']:.4g}{spread}"

    lines = []
    for name, own in found.items():
        trials = max(each["trials"] for each in own.values())
        numbers = ", ".join(words(column, each) for column, each in own.items())
        lines.append(f"{name}, mean of {trials} training{'s' * (trials > 1)}: {numbers}")
    return lines


def _by_model(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    names = dict.fromkeys(each.trial.candidate.name for each in outcomes)
    return {name: [each for each in outcomes if each.trial.candidate.name == name] for name in names}


# Figures; `columns` are the metrics to show: their name in the cells, and which direction is better


def draw_curves(outcomes: Sequence[Outcome], columns: Mapping[str, str]) -> "Figure":
    """A line of metric against value for each model: a row of panels a metric, a column a varied setting."""
    varied = list(dict.fromkeys(each.trial.varied for each in outcomes if each.trial.varied))
    figure = new_figure(max(4.2 * len(varied), 4.6), 3.0 * len(columns))
    for y, (column, better) in enumerate(columns.items()):
        for x, setting in enumerate(varied):
            axes = figure.add_subplot(len(columns), len(varied), y * len(varied) + x + 1)
            dress_axes(axes, "", _axis(setting, outcomes), f"{column} ({better})")
            for place, (name, own) in enumerate(_by_model(outcomes).items()):
                points = [each for each in own if each.trial.varied == setting]
                if not points:
                    continue
                values = [each.trial.value for each in points]
                error = [each.cells.get(f"{column} ±") for each in points]
                spread = None if None in error else error
                _line(axes, values, [each.cells[column] for each in points], name, spread, f"C{place}")
            if setting.endswith("steps"):
                _doubling_axis(axes, [each.trial.value for each in outcomes if each.trial.varied == setting])
            axes.legend(fontsize=7)
    return figure


def _line(
    axes: "Axes",
    x: Sequence[Any],
    y: Sequence[Any],
    name: str,
    spread: Sequence[Any] | None = None,
    color: str | None = None,
) -> None:
    axes.errorbar(
        x, y, yerr=spread, marker="o", markersize=3.5, linewidth=1.2, capsize=2, label=name, color=color
    )


def _axis(setting: str, outcomes: Sequence[Outcome]) -> str:
    """The name of a setting for people; of guidance, which value is none."""
    text = AXES.get(setting, setting.replace("_", " "))
    if setting == "cfg":
        kinds = {isinstance(each.trial.job.settings, MaskedArSample) for each in outcomes}
        none = ["1 is none" if masked else "0 is none" for masked in sorted(kinds)]
        text += f" ({none[0]})" if len(none) == 1 else " (VAR, HMAR: 0 is none; MAR, Hi-MAR: 1)"
    return text


def _doubling_axis(axes: "Axes", values: Sequence[Any]) -> None:
    """Numbers of steps on a logarithmic axis, each named."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_refinement(outcomes: Sequence[Outcome], columns: Mapping[str, str]) -> "Figure":
    """The metric with one more pass at each scale, beside that of the schedule as it is (Fig. 20)."""
    models = _by_model(outcomes)
    figure = new_figure(max(4.6 * len(models), 4.6), 3.0 * len(columns))
    for y, (column, better) in enumerate(columns.items()):
        for x, (name, own) in enumerate(models.items()):
            axes = figure.add_subplot(len(columns), len(models), y * len(models) + x + 1)
            dress_axes(axes, name, "scale with one more masked pass", f"{column} ({better})")
            grids = own[0].trial.candidate.checkpoint.recipe.scales.grids
            drawn = [each for each in own if each.trial.varied]
            numbers = [int(each.trial.value or 0) for each in drawn]
            _line(axes, numbers, [each.cells[column] for each in drawn], "one more pass")
            axes.set_xticks(numbers, [f"{k}\n{grid_name(grids[k - 1])}" for k in numbers])
            for base in (each for each in own if not each.trial.varied):
                axes.axhline(
                    float(base.cells[column] or 0),
                    color="0.4",
                    linestyle="--",
                    linewidth=1,
                    label="none more",
                )
            axes.legend(fontsize=7)
    return figure


def draw_speed(outcomes: Sequence[Outcome], columns: Mapping[str, str]) -> "Figure":
    """The metric against seconds an image, a line a model and setting, each point with its value (Hi-MAR, Fig. 3)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    job, device = outcomes[0].trial.job, outcomes[0].about["device"]
    figure = new_figure(5.2, 3.4 * len(columns))
    for y, (column, better) in enumerate(columns.items()):
        axes = figure.add_subplot(len(columns), 1, y + 1)
        place = f"seconds per image (batch {full_batch(job)}, {device})"
        dress_axes(axes, "", place, f"{column} ({better})")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.12)
        for name, own in _by_model(outcomes).items():
            for setting in dict.fromkeys(each.trial.varied for each in own):
                points = [each for each in own if each.trial.varied == setting and each.cells[SECONDS]]
                label = f"{name}, {AXES.get(setting, setting)}" if setting else name
                seconds = [each.cells[SECONDS] for each in points]
                _line(axes, seconds, [each.cells[column] for each in points], label)
                for each in points:
                    at = (float(each.cells[SECONDS] or 0), float(each.cells[column] or 0))
                    text = str(each.trial.value) if setting else ""
                    axes.annotate(text, at, (3, 4), textcoords="offset points", fontsize=7)
        axes.legend(fontsize=7)
    return figure


def draw_ablation(outcomes: Sequence[Outcome], columns: Mapping[str, str]) -> "Figure":
    """A bar a model with its number, of several trials their mean and each as a dot; a panel a metric."""
    models = _by_model(outcomes)
    panels = {
        f"{column} ({better})": [[float(each.cells[column] or 0) for each in own] for own in models.values()]
        for column, better in columns.items()
    }
    return bar_figure(list(models), panels)


def ablation_row(outcome: Outcome) -> Row:
    """The row of an outcome, with what tells its model apart."""
    trial = outcome.trial
    seed: dict[str, Cell] = {trial.varied: trial.value} if trial.varied else {}
    about = describe_model(trial.candidate.checkpoint.recipe)
    return {"model": trial.candidate.name, **about, **seed, **outcome.cells}
