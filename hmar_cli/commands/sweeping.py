"""Sweeps of `hmar analyze`: their flags, what these come to, and the way from a plan to files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.flags import short_names, words
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hmar_cli.analysis.results import Cell, Row
    from hmar_cli.analysis.sweep import Judge, Outcome, Trial
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.evaluation.extractors import Extractor
    from hmar_cli.evaluation.observing import Observations
    from hmar_cli.models.scales import Schedule
    from hmar_cli.settings import MaskedArSample, NextScaleSample, Recipe


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How a sweep draws and measures; each field is a flag."""

    reference: Annotated[
        str, typer.Option(help="Real images, from any source, or an .npz of statistics.", show_default=False)
    ] = ""
    extractor: Annotated[
        str,
        typer.Option(help="inception, a classifier's run, open_clip:TOWER/TAG, torchscript:FILE, module:…."),
    ] = "inception"
    extractor_weights: drawing.ExtractorWeights = None
    metrics: Annotated[str, typer.Option(help="Of fid, sfid, is, kid, precision and recall.")] = ""
    count: Annotated[int, typer.Option(min=2, help="Images of each setting.")] = 2000
    crop: Annotated[Literal["adm", "var"], typer.Option(help="How real images are cut to size.")] = "adm"
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="A setting and its values, if the figure leaves them open."),
    ] = None
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of all samplers.")
    ] = None
    contents: drawing.Contents = drawing.Contents()  # noqa: RUF009
    loading: drawing.Drawing = drawing.Drawing()  # noqa: RUF009
    batch_size: drawing.BatchSize = 0
    device: drawing.Device = ""
    shown: Annotated[int, typer.Option(min=1, max=64, help="Images of each setting in the grid.")] = 8
    launch: drawing.Launch = 0
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files. [default: analysis/ and this name]")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured, and stop.")] = False
    as_json: drawing.AsJson = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """How recipes are trained before they are measured; each field is a flag."""

    train_set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of all recipes.")
    ] = None
    train_seeds: Annotated[str, typer.Option(help="Seeds of training, as 0,1. [default: the recipe's]")] = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A figure of the papers that is a sweep.

    Attributes:
        name: of the command and its files.
        metrics: what is measured by default.
        values: what is varied of a model by default: settings of its sampler and their values; none unless said.
        draw: the figure, of outcomes and of the metrics to show: their names and which direction is better.
        base: whether a model as it is has a row: "always", where nothing of it is varied ("alone"), or "never".
        start: settings that hold unless others are given.
        varies: whether `--vary` may say what is varied; else the figure has no place for it.
        row: of an outcome; None for its own.
        lacking: what a model has not of which nothing can be varied.
    """

    name: str
    metrics: str = "fid"
    values: "Callable[[Recipe, Schedule], Mapping[str, Sequence[Cell]]]" = lambda recipe, schedule: {}
    draw: "Callable[[Sequence[Outcome], Mapping[str, str]], Figure]"
    base: Literal["always", "alone", "never"] = "never"
    start: Mapping[str, str] = field(default_factory=dict)
    varies: bool = True
    row: "Callable[[Outcome], Row] | None" = None
    lacking: str = "settings to vary"


@dataclass(frozen=True)
class Entry:
    """A checkpoint to be measured: its name in tables, and what sets its training apart from others of that name."""

    name: str
    path: Path
    varied: str = ""
    value: int | None = None


def entries(checkpoints: Sequence[Path]) -> list[Entry]:
    """Checkpoints under names that differ."""
    return [Entry(*pair) for pair in zip(short_names(checkpoints), checkpoints, strict=True)]


def begin(flags: Flags) -> None:
    """Check the device, and start the processes that share the work."""
    from hmar_cli.launch import check_device, delegate

    check_device(flags.device)
    delegate(flags.launch, flags.device)


def carry_out(
    study: Study, chosen: Sequence[Entry], flags: Flags, reference: "Observations | None" = None
) -> None:
    """Plan, draw, measure, write and print; `reference` is what is known of the real images already.

    Raises:
        UserError: whatever the flags ask for and cannot have.
    """
    trials = plan(study, chosen, flags)
    if flags.dry_run:
        planned = [{**each.start, **each.job.describe()} for each in trials]
        print(json.dumps({"trials": planned}, indent=2))
        return
    begin(flags)
    from hmar_cli.analysis.results import analysis_folder
    from hmar_cli.analysis.sweep import sweep
    from hmar_cli.console import warn
    from hmar_cli.launch import join_processes, leave_processes

    out = analysis_folder(flags.out, study.name)
    judge = open_judge(study, flags, trials, reference)
    place = join_processes(flags.device)
    first = place.rank == 0
    for line in [*doubts(judge, flags.count), *few_batches(trials, place.world)] if first else ():
        warn(line)
    outcomes = sweep(trials, judge, out, device=flags.device, shown=flags.shown)
    leave_processes()
    if first:
        publish(study, judge, outcomes, out, flags)


def publish(study: Study, judge: "Judge", outcomes: "Sequence[Outcome]", out: Path, flags: Flags) -> None:
    """Write the files and print the table; where models were trained several times, also means and spreads."""
    from hmar_cli.analysis.results import publish_analysis
    from hmar_cli.analysis.studies import TRAINING_SEED, spreads, spreads_in_words
    from hmar_cli.evaluation.reports import versions

    columns = judge.columns(flags.count)
    rows = [study.row(each) if study.row else each.row for each in outcomes]
    repeated = any(each.trial.varied == TRAINING_SEED for each in outcomes)
    summary = spreads(outcomes) if repeated else {}
    models = {each.trial.candidate.checkpoint.folder: each.trial.candidate for each in outcomes}
    settings = {
        "judge": judge.describe(),
        "models": [each.about for each in models.values()],
        "trials": [{key: value for key, value in each.about.items() if key != "judge"} for each in outcomes],
        "versions": versions(),
    }
    publish_analysis(
        out,
        study.name,
        rows,
        settings,
        study.draw(outcomes, columns),
        as_json=flags.as_json,
        tiles={each.trial.title: list(each.shown) for each in outcomes},
        summary=summary,
        notes=spreads_in_words(summary),
    )


def rows_to_train(recipes: "Mapping[str, Recipe]", seeds: str, runs: Path) -> "dict[Entry, Recipe]":
    """The runs of some recipes, each with every seed, and their recipes.

    Args:
        recipes: by their names in tables, which are those of their folders, too.
        seeds: of training, by commas; empty for the recipes' own.
        runs: folder of the runs.

    Raises:
        UserError: seeds that are no numbers.
    """
    from hmar_cli.analysis import studies

    numbers = words(seeds)
    if not all(each.isdecimal() for each in numbers):
        raise UserError(f"--train-seeds {seeds}: expected numbers", "give some as 0,1")
    found = {}
    for title, recipe in recipes.items():
        if not numbers:
            found[Entry(title, runs / title)] = recipe
        for seed in map(int, numbers):
            entry = Entry(title, runs / f"{title}-seed{seed}", studies.TRAINING_SEED, seed)
            found[entry] = replace(recipe, train=replace(recipe.train, seed=seed))
    return found


def train_and_measure(study: Study, chosen: "Mapping[Entry, Recipe]", data: str, flags: Flags) -> None:
    """Train recipes one after another, in the folders of their entries, then carry out a study of them.

    Runs that are finished are kept, and one that was stopped goes on.

    Raises:
        UserError: as `carry_out`, before anything is trained where that can be known; and what training refuses.
    """
    settings_asked(study, flags)
    if flags.dry_run:
        done = [entry.path for entry, recipe in chosen.items() if is_finished(entry.path, recipe)]
        left = [entry.path for entry in chosen if entry.path not in done]
        found = {"finished": [*map(str, done)], "train": [*map(str, left)]}
        print(json.dumps({"data": data, **found}, indent=2))
        return
    begin(flags)
    reference = require_judge(study, chosen.values(), flags)
    from hmar_cli.console import console
    from hmar_cli.runs import Options, train

    for number, (entry, recipe) in enumerate(chosen.items(), start=1):
        out = entry.path
        console.print(f"training {out.name} ({number} of {len(chosen)})", highlight=False)
        resume = (out / "recipe.toml").is_file()
        outcome = train(recipe, Options(data=data, out=str(out), resume=resume, device=flags.device))
        if outcome.interrupted:
            raise KeyboardInterrupt  # the run has saved and goes on from there the next time
    carry_out(study, list(chosen), flags, reference)


def is_finished(run: Path, recipe: "Recipe") -> bool:
    """Whether a run has all its steps; whether it is one of this recipe shows when it goes on.

    Raises:
        UserError: it holds weights alone, so that nothing can go on.
    """
    from hmar_cli.checkpoints.store import list_steps, open_checkpoint

    if not list_steps(run):
        return False
    counters = open_checkpoint(run).counters()
    return bool(counters["step"] >= (recipe.train.steps or counters["steps"]))


# The plan


def plan(study: Study, chosen: Sequence[Entry], flags: Flags) -> "list[Trial]":
    """All settings of all models, checked; no weights are read.

    Raises:
        UserError: a setting that no model has, a value that one cannot follow, or a model that has nothing to vary.
    """
    fixed, varied = settings_asked(study, flags)
    bases = [basis(entry, flags) for entry in chosen]
    require_settings({**fixed, **varied}, [each.candidate.checkpoint.recipe for each in bases])
    return [trial for base in bases for trial in vary(study, base, fixed, varied)]


def settings_asked(study: Study, flags: Flags) -> tuple[dict[str, str], dict[str, str]]:
    """The settings of `--set` and of `--vary`, as they were written.

    Raises:
        UserError: one that is no setting, or anything to vary where the study says what is varied.
    """
    fixed, varied = pairs("--set", flags.overrides), pairs("--vary", flags.vary)
    if varied and not study.varies:
        raise UserError(
            f"--vary {next(iter(varied))}: the figure of `hmar analyze {study.name}` has no place for it",
            "vary it by `hmar analyze guidance`, or fix it: --set KEY=VALUE",
        )
    return fixed, varied


def require_settings(names: Iterable[str], recipes: Sequence["Recipe"]) -> None:
    """See that some model has each of the settings.

    Raises:
        UserError: none has one of them.
    """
    known = set[str]().union(*map(settings_of, recipes))
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"none of these models has a setting {unknown[0]!r}", f"they have {', '.join(sorted(known))}"
        )


def basis(entry: Entry, flags: Flags) -> "Trial":
    """The trial of a model as its recipe says.

    Raises:
        UserError: no such checkpoint, or labels or prompts that it cannot follow.
    """
    from hmar_cli.analysis.sweep import Candidate, Trial

    order = drawing.place_order(
        entry.path,
        {},
        flags.loading,
        labels=flags.contents.labels,
        prompts=flags.contents.prompts(),
        count=flags.count,
        batch_size=flags.batch_size,
    )
    opened = order.checkpoint
    opened.weights_file(flags.loading.weights)  # a mistake shows before the reference is looked at
    return Trial(
        candidate=Candidate(
            name=entry.name,
            checkpoint=opened,
            weights=flags.loading.weights,
            tokenizer=flags.loading.tokenizer,
        ),
        varied=entry.varied,
        value=entry.value,
        job=order.job(),
        labels=tuple(opened.class_names[c] for c in order.classes),
    )


def vary(study: Study, base: "Trial", fixed: Mapping[str, str], varied: Mapping[str, str]) -> "list[Trial]":
    """The trials of one model; settings that it has not are passed over, since another one may have them.

    Args:
        study: what is varied by default.
        base: the model as its recipe says.
        fixed: settings that are the same in all trials, as they were written.
        varied: settings and their values, as they were written; none for the study's.
    """
    checkpoint, own = base.candidate.checkpoint, settings_of(base.candidate.checkpoint.recipe)
    given = {
        **study.start,
        **{key: typed(checkpoint, key, text) for key, text in fixed.items() if key in own},
    }
    settings = drawing.resolve(checkpoint, given)
    values: Mapping[str, Sequence[Cell]] = {
        key: [typed(checkpoint, key, part) for part in split(key, text)]
        for key, text in varied.items()
        if key in own
    }
    if not varied:
        values = study.values(checkpoint.recipe, getattr(settings, "schedule", ()))
    trials = [
        replace(
            base,
            varied=key,
            value=value,
            job=replace(base.job, settings=changed(checkpoint, given, key, value)),
        )
        for key, several in values.items()
        for value in several
    ]
    if study.base == "always" or (study.base == "alone" and not trials):
        trials.insert(0, replace(base, job=replace(base.job, settings=settings)))
    if not trials:
        raise UserError(f"{checkpoint.folder} has no {study.lacking}", "say what to vary: --vary KEY=VALUES")
    return trials


def changed(
    checkpoint: "Checkpoint", given: Mapping[str, Any], key: str, value: Any
) -> "NextScaleSample | MaskedArSample":
    """The sampler's settings with one more, or with a pass more at a scale."""
    from hmar_cli.analysis.studies import EXTRA_PASS, with_extra_pass

    if key != EXTRA_PASS:
        return drawing.resolve(checkpoint, {**given, key: value})
    start = getattr(drawing.resolve(checkpoint, dict(given)), "schedule", ())
    longer = with_extra_pass(start, checkpoint.recipe.scales, value)
    return drawing.resolve(checkpoint, {**given, "schedule": json.dumps(longer)})


def pairs(flag: str, texts: Sequence[str] | None) -> dict[str, str]:
    """Flags KEY=VALUE by their keys.

    Raises:
        UserError: one without a key or a value, or a key that comes twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        key, _, value = (part.strip() for part in text.partition("="))
        if not key or not value:
            raise UserError(f"{flag} {text}: expected KEY=VALUE", "such as cfg=1.5")
        if key in found:
            raise UserError(f"{flag} {key} comes twice", "give it once, with all its values")
        found[key.replace("-", "_")] = value
    return found


def split(key: str, text: str) -> list[str]:
    """The values of `--vary`, between commas; schedules have commas in them, and stand between semicolons."""
    parts = [part.strip() for part in text.split(";" if key == "schedule" else ",")]
    return [part for part in parts if part]


def settings_of(recipe: "Recipe") -> set[str]:
    """The settings of a recipe's sampler that mean something for its model."""
    names = {each.name for each in fields(recipe.sample)} - {"batch_size"}
    phases = recipe.sample.kind != "masked-ar" or getattr(recipe.model, "pivots", "none") != "none"
    return names if phases else {name for name in names if not name.startswith("pivot_")}


def typed(checkpoint: "Checkpoint", key: str, text: str) -> Any:
    """A value as it was written, checked by the setting's type; a schedule stays a text, of any spelling.

    Raises:
        UserError: a value of another type or out of range.
    """
    from hmar_cli.recipe import settings_from_dict, toml_value

    if key == "schedule":
        return text
    return getattr(settings_from_dict({key: toml_value(text)}, type(checkpoint.recipe.sample), "sample"), key)


# The judge


def open_extractor(study: Study, flags: Flags) -> "tuple[tuple[str, ...], Extractor]":
    """What is measured, and what looks at the images.

    Raises:
        UserError: an unknown metric, no reference where one needs it, or an extractor that cannot be had.
    """
    from hmar_cli.evaluation import extractors
    from hmar_cli.evaluation.measures import needs_reference, parse_metrics
    from hmar_cli.launch import join_processes

    metrics = parse_metrics(flags.metrics or study.metrics)
    if needs_reference(metrics) and not flags.reference:
        raise UserError("--reference is missing", "give real images; only --metrics is does without")
    place = join_processes(flags.device).device
    return metrics, extractors.open_extractor(flags.extractor, place, flags.extractor_weights)


def require_judge(study: Study, recipes: Iterable["Recipe"], flags: Flags) -> "Observations | None":
    """See before the training what would be missed after it: settings, extractor, reference, and a place for files.

    Returns:
        The reference, where a file has statistics of it; images are only seen to be there.

    Raises:
        UserError: one of them cannot be had.
    """
    from hmar_cli.analysis.results import analysis_folder
    from hmar_cli.data.sources import open_source
    from hmar_cli.evaluation.measures import needs_reference
    from hmar_cli.evaluation.observing import require_features
    from hmar_cli.evaluation.references import is_statistics, open_reference

    trained = list(recipes)
    fixed, varied = settings_asked(study, flags)
    require_settings({**fixed, **varied}, trained)
    analysis_folder(flags.out, study.name)
    metrics, extractor = open_extractor(study, flags)
    require_features(extractor, metrics, trained[0].data.size)
    if not needs_reference(metrics):
        return None
    if is_statistics(Path(flags.reference)):
        return open_reference(flags.reference, extractor, metrics)
    open_source(flags.reference)
    return None


def open_judge(
    study: Study, flags: Flags, trials: "Sequence[Trial]", reference: "Observations | None"
) -> "Judge":
    """The extractor, and what it sees in the real images, unless that is known.

    Raises:
        UserError: one of them cannot be had, images of several sizes where the extractor takes any, or statistics
            of images that were cut in another way.
    """
    from hmar_cli.analysis.sweep import Judge
    from hmar_cli.data.transforms import height_width
    from hmar_cli.evaluation.measures import needs_reference, require_same_cut
    from hmar_cli.evaluation.references import open_reference

    metrics, extractor = open_extractor(study, flags)
    sizes = list(dict.fromkeys(height_width(each.candidate.checkpoint.recipe.data.size) for each in trials))
    if extractor.size is None and len(sizes) > 1:
        drawn = ", ".join(f"{width}x{height}" for height, width in sizes)
        raise UserError(f"the models draw images of several sizes: {drawn}", "measure them one by one")
    size = extractor.size or sizes[0]
    if reference is None and needs_reference(metrics):
        reference = open_reference(flags.reference, extractor, metrics, size=size, crop=flags.crop)
    if reference:
        require_same_cut(height_width(size), flags.crop, reference)
    return Judge(extractor=extractor, metrics=metrics, reference=reference, size=size, crop=flags.crop)


def doubts(judge: "Judge", count: int) -> list[str]:
    """What makes the numbers of `count` images a setting doubtful, to be said before they are drawn."""
    from hmar_cli.commands.evaluating import few_images, warnings
    from hmar_cli.evaluation.measures import needs_reference

    real, compared = judge.reference, [each for each in judge.metrics if needs_reference([each])]
    if real is None:
        return few_images(count, 0, "each setting", judge.metrics)
    width = real.statistics.mean.numel()
    return [*few_images(count, width, "each setting", judge.metrics), *warnings(real, compared)]


def few_batches(trials: "Sequence[Trial]", processes: int) -> list[str]:
    """For which batch sizes a process draws too few batches to time one that neither loads, compiles nor records."""
    from hmar_cli.analysis.sweep import SECONDS, full_batch
    from hmar_cli.sampling.images import WARM_UPS

    found = {full_batch(each.job): each.job.count for each in trials}
    timed = {size: -(-(count // size) // processes) for size, count in found.items()}
    return [
        f"{SECONDS} by full batches of {size} says little: a process has {number}, "
        f"and the first {WARM_UPS} load, compile and record"
        for size, number in timed.items()
        if number <= WARM_UPS
    ]
