"""What `hmar eval` found: a file with every setting, and when the numbers of two such files compare.

{"format": "hmar-eval", "version": 1,
 "metrics": {"fid": {"name": "FID-50k", "value": 2.31}, "is": {"name": "IS-50k", "value": 240.1, "spread": 3.2}},
 "settings": {what must be equal for numbers to compare: extractor, size, crop, count, reference, splits ...},
 "subject": {what was measured: folder or checkpoint, hashes, sampling settings},
 "made_with": {what should change nothing: device, processes, batch size, versions, images a second}}
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hmar_cli import __version__
from hmar_cli.console import console
from hmar_cli.errors import UserError
from hmar_cli.evaluation import measures
from hmar_cli.evaluation.measures import Protocol, measure, metric_name
from hmar_cli.evaluation.observing import Observations
from hmar_cli.files import read_json, write_json

FORMAT, VERSION = "hmar-eval", 1

OF_SCENES = frozenset({"colours", "shapes", "places", "all"})
"""Shares of images of `builtin:scenes` that show what their prompts say."""

HIGHER_IS_BETTER = (
    measures.HIGHER_IS_BETTER | {"accuracy", "psnr", "ssim", "clip_score", "clip_cosine"} | OF_SCENES
)
LOWER_IS_BETTER = {"fid", "sfid", "kid", "rfid", "l1", "lpips"}
OF_PICTURES = {"psnr", "ssim", "l1", "lpips", "usage", "latent_std", "posterior_std"}
"""Metrics of a tokenizer that need no extractor."""

INDEPENDENT = {
    "reference": measures.WITHOUT_REFERENCE | {"accuracy"},
    "extractor": OF_PICTURES,
    "lpips": OF_PICTURES - {"lpips"} | {"rfid"},
}
"""Metrics that compare whatever a setting is."""

SHARES = {"accuracy", "usage"} | OF_SCENES
"""Metrics that are shown in percent."""

ABSENT = "absent"
"""What stands for a setting that one report has and the other has not."""


@dataclass(frozen=True)
class Measured:
    """One number.

    Attributes:
        name: under which it is printed, with the extractor and the number of images: "FID-50k".
        value: the number, or the mean over parts.
        spread: standard deviation over parts, where the metric is a mean over some.
        more: what else is to be known, such as the size of the parts.
    """

    name: str
    value: float
    spread: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")

    def describe(self) -> dict[str, Any]:
        """The number as JSON has it."""
        spread = {} if self.spread is None else {"spread": self.spread}
        return {"name": self.name, "value": self.value, **spread, **self.more}


@dataclass(frozen=True)
class Report:
    """All numbers of one evaluation, and what they depend on; see the module's description."""

    metrics: Mapping[str, Measured]
    settings: Mapping[str, Any]
    subject: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "metrics": {key: number.describe() for key, number in self.metrics.items()},
            "settings": dict(self.settings),
            "subject": dict(self.subject),
            "about": dict(self.about),
            "made_with": dict(self.made_with),
        }

    def save(self, target: Path) -> None:
        """Write the report as JSON."""
        write_json(target, self.describe())


def measure_all(
    found: Observations, real: Observations | None, metrics: Sequence[str], protocol: Protocol | None = None
) -> dict[str, Measured]:
    """Measure images as `measure` does, each number under its full name; also the accuracy, where there is one.

    Args:
        found: what an extractor saw in generated images.
        real: what it saw in real ones; None where no metric compares.
        metrics: of `METRICS`.
        protocol: what else the numbers depend on.

    Raises:
        UserError: as `measure`.
    """
    numbers = {}
    for metric, value in measure(found, real, metrics, protocol).items():
        parts = dict(value) if isinstance(value, Mapping) else {"mean": value}
        name = metric_name(metric, found, found.count)
        numbers[metric] = Measured(name, parts.pop("mean"), parts.pop("std", None), parts)
    if found.labelled:
        numbers["accuracy"] = Measured(f"Accuracy[{found.extractor_name}]", found.right / found.count)
    return numbers


def versions() -> dict[str, str]:
    """Of all that the numbers pass through."""
    ours = {"hmar-cli": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return ours | {name: version(name) for name in ("torch-fidelity", "pillow", "numpy")}


def made_with(
    device: torch.device | str, processes: int, count: int, seconds: float, **more: Any
) -> dict[str, Any]:
    """What should change nothing, of `count` images that were measured in that many seconds."""
    return {
        "device": str(device),
        "processes": processes,
        "images_per_second": round(count / seconds, 2) if seconds else None,
        **more,
        "versions": versions(),
    }


def publish(report: Report, out: Path | None, *, as_json: bool, show: Callable[[Report], None]) -> None:
    """Print a report, as JSON or as `show` does, then write it to its file, so that a full disk loses no number."""
    if as_json:
        print(json.dumps(report.describe(), indent=2, ensure_ascii=False))
    else:
        show(report)
    if out:
        report.save(out)
        console.print(f"report: {out}", highlight=False)


def read_report(path: Path) -> Report:
    """Read what `Report.save` wrote.

    Raises:
        UserError: no such file, or one of another kind.
    """
    hint = "give a file that `hmar eval … --out FILE.json` wrote"
    try:
        found: Any = read_json(path)
    except UserError as error:
        raise UserError(str(error), hint) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is no report of `hmar eval`", hint)
    if found.get("version") != VERSION:
        raise UserError(
            f"{path} has version {found.get('version')} of the format, this program reads {VERSION}",
            "update hmar-cli",
        )
    try:
        metrics = {key: _measured(**each) for key, each in found["metrics"].items()}
        parts = [dict(found[key]) for key in ("settings", "subject", "about", "made_with")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is no report of `hmar eval`: {type(error).__name__}: {error}", hint
        ) from error
    return Report(metrics, *parts)


def _measured(*, name: str, value: float, spread: float | None = None, **more: Any) -> Measured:
    return Measured(str(name), float(value), None if spread is None else float(spread), more)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting: {"extractor": {"name": "x"}} is {"extractor.name": "x"}; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Settings that are not equal in all, each with its values in the order given; `ABSENT` where there is none."""
    every = [flat(each) for each in settings]
    keys = dict.fromkeys(key for each in every for key in each)
    values = {key: [each.get(key, ABSENT) for each in every] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def comparable_metrics(reports: Mapping[str, Report], wanted: Sequence[str] = ()) -> list[str]:
    """The metrics by which reports compare.

    Args:
        reports: by a name for messages; two or more.
        wanted: metrics to compare by; none is all, and then each report must have the same.

    Raises:
        UserError: naming what differs: a metric that one lacks, or a setting on which the numbers depend.
    """
    names, first = list(reports), next(iter(reports.values()))
    metrics = list(wanted or first.metrics)
    for name, report in reports.items():
        missing = [metric for metric in metrics if metric not in report.metrics]
        more = [] if wanted else [metric for metric in report.metrics if metric not in metrics]
        if missing or more:
            shared = [
                each for each in first.metrics if all(each in other.metrics for other in reports.values())
            ]
            lacking, lacks = (name, missing) if missing else (names[0], more)
            raise UserError(
                f"{lacking} has no {', '.join(lacks)}, by which it was to be compared",
                f"compare by what all have: --metrics {','.join(shared)}"
                if shared
                else "they share no metric: compare what was measured alike",
            )
    if not metrics:
        raise UserError(f"{names[0]} holds no metric", "measure some with `hmar eval samples`")
    kept = [
        {
            key: value
            for key, value in report.settings.items()
            if not set(metrics) <= INDEPENDENT.get(key, set())
        }
        for report in reports.values()
    ]
    if apart := differences(kept):
        key, values = next(iter(apart.items()))
        other = next(i for i, value in enumerate(values) if value != values[0])
        raise UserError(
            f"{names[0]} and {names[other]} do not compare: {key} is {values[0]} and {values[other]}",
            "measure both with the same settings; `hmar eval samples` can measure kept images again",
            [f"{each}: {', '.join(map(str, found))}" for each, found in list(apart.items())[1:]],
        )
    return metrics


def as_text(metric: str, number: Measured) -> str:
    """A number for people: shares of images in percent, others with four digits and their spread."""
    return f"{number.value:.1%}" if _kind(metric) in SHARES else str(number)


def best(metric: str, values: Sequence[float]) -> float | None:
    """The best of some values; None where a metric has no direction."""
    if _kind(metric) in HIGHER_IS_BETTER:
        return max(values)
    return min(values) if _kind(metric) in LOWER_IS_BETTER else None


def _kind(metric: str) -> str:
    """What a metric measures: of T2I-CompBench's "color.clip_cosine" the part after its category."""
    return metric.rpartition(".")[2]
