"""What `hmar eval samples` does once its flags are understood: look at images and reference, measure, report."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_cli.commands.subjects import Subject, drawn_images, open_images
from hmar_cli.console import console, print_table, warn
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import Crop, height_width
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor, open_extractor
from hmar_cli.evaluation.measures import Protocol, needs_reference, require_same_cut
from hmar_cli.evaluation.observing import Observations, observe_together, require_features
from hmar_cli.evaluation.references import is_statistics, open_reference, read_reference, save_statistics
from hmar_cli.evaluation.reports import Report, as_text, made_with, measure_all
from hmar_cli.launch import Place, join_processes, leave_processes
from hmar_cli.report import image_grid, save_png

if TYPE_CHECKING:
    from hmar_cli.commands.drawing import Order

SHOWN = 64
"""Images in a grid, the first ones; a quarter of them where they are larger than `LARGE` pixels."""

LARGE = 256

FEW = 10
"""Images in a part of the Inception Score below which it says little."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how.

    Attributes:
        metrics: in the order of the table.
        extractor: its spelling.
        weights: a file for it.
        reference: its spelling, or a file of statistics; empty for none.
        count: of the first images; 0 is all.
        size: to which images are cut; None for the extractor's, or else for images as they are.
        crop: how.
        preset: where all this comes from; empty for flags.
        make_stats: where the statistics of the images go.
        batch_size: images at once.
    """

    metrics: tuple[str, ...]
    extractor: str
    weights: Path | None
    reference: str
    count: int
    size: int | None
    crop: Crop
    preset: str
    make_stats: Path | None
    batch_size: int

    def describe(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def outline(self) -> dict[str, str]:
        """The plan in a line each, for people."""
        size = f"cut to {self.size} px ({self.crop})" if self.size else f"crop {self.crop}"
        lines = {
            "measure": f"{', '.join(self.metrics) or 'accuracy'} of {self.count or 'all'} images, {size}",
            "extractor": self.extractor,
            "reference": self.reference,
            "writes": f"statistics, {self.make_stats}" if self.make_stats else "",
        }
        return {name: text for name, text in lines.items() if text}


def evaluate(
    subject: str, order: "Order | None", plan: Plan, *, keep: Path | None, device: str, grid: Path | None
) -> Report | None:
    """Draw if need be, look at the images and at the reference on all processes, and measure.

    Whatever can be wrong with extractor and reference is found before anything is drawn.

    Args:
        subject: spelling of the images, where none are drawn.
        order: what is drawn.
        plan: what is measured.
        keep: folder for what is drawn; None for one that is removed at the end.
        device: "cpu", "cuda" or "" for a GPU where there is one.
        grid: PNG file of the first images.

    Returns:
        The report in the first process, None in the others.

    Raises:
        UserError: images, extractor or reference that are not there or do not fit each other.
    """
    place = join_processes(device)
    network = open_extractor(plan.extractor, place.device, plan.weights)
    if order:
        require_a_number(plan, network, order.class_names)
        require_features(network, plan.metrics, plan.size or order.checkpoint.recipe.data.size)
    real = early_reference(plan, network, place.rank)
    if order and real:
        cut = plan.size or network.size
        drawn = height_width(cut or order.checkpoint.recipe.data.size)
        require_same_cut(drawn, plan.crop if cut else "none", real)
    looking: dict[str, Any] = {"metrics": plan.metrics, "crop": plan.crop, "batch_size": plan.batch_size}
    with contextlib.ExitStack() as stack:
        if order is None:
            images = open_images(subject, plan.size or network.size)
            require_a_number(plan, network, images.source.class_names)
        else:
            images = stack.enter_context(drawn_images(order, keep, device))
        require_count(plan, images.source.length)
        found = observe_together(
            images.source, network, size=plan.size, count=plan.count, shown=SHOWN if grid else 0, **looking
        )
        if plan.preset:  # else images that cannot be read are warned of, and the name says how many are left
            require_count(plan, found.count)
        if plan.reference and not is_statistics(Path(plan.reference)):
            real = open_reference(plan.reference, network, size=found.size, **looking)
        report = None if place.rank else conclude(images, found, real, network, plan, grid, place)
    leave_processes()
    return report


def early_reference(plan: Plan, network: Extractor, rank: int) -> Observations | None:
    """Statistics of the reference, which the first process alone reads; of images only see that they are there.

    Raises:
        UserError: nothing there, or statistics that do not fit the extractor and the metrics.
    """
    if not is_statistics(Path(plan.reference)):
        if plan.reference:
            open_source(plan.reference)
        return None
    return None if rank else read_reference(Path(plan.reference), network, plan.metrics, plan.batch_size)


def require_a_number(plan: Plan, network: Extractor, class_names: Sequence[str]) -> None:
    """See that there is a metric, statistics to write, or an accuracy to tell.

    Raises:
        UserError: there is none of them.
    """
    known = bool(class_names) and set(class_names) <= set(network.class_names)
    if not (plan.metrics or plan.make_stats or known):
        raise UserError(
            f"nothing to measure: {network.name} does not know the classes of these images",
            "give --reference SOURCE, or --metrics is",
        )


def require_count(plan: Plan, count: int | None) -> None:
    """See that there are as many images as a preset or `--count` measures.

    Raises:
        UserError: there are fewer.
    """
    if count is None or count >= plan.count:
        return
    if not plan.preset:
        raise UserError(
            f"--count {plan.count}: there are {count} images",
            "leave --count out to measure all, under a name that says their number",
        )
    raise UserError(
        f"{plan.preset} measures {plan.count} images, and {count} are there that can be read",
        "without --preset, flags such as --metrics measure any number, under a name that says it",
    )


def conclude(
    images: Subject,
    found: Observations,
    real: Observations | None,
    network: Extractor,
    plan: Plan,
    grid: Path | None,
    place: Place,
) -> Report:
    """Measure, write statistics and grid, and make the report; warnings go to standard error."""
    compared = [metric for metric in plan.metrics if needs_reference([metric])]
    for line in [*warnings(found, plan.metrics), *(warnings(real, compared) if real else ())]:
        warn(line)
    if not found.count:
        raise UserError(f"{found.source} has no images that can be read", found.error or "give more images")
    metrics = plan.metrics if real else tuple(metric for metric in plan.metrics if metric not in compared)
    protocol = Protocol()
    numbers = measure_all(found, real, metrics, protocol)
    if plan.make_stats:
        save_statistics(found, plan.make_stats, {"subject": images.about})
        console.print(f"statistics of {found.count} images in {plan.make_stats}", highlight=False)
    if grid:
        shown = found.shown if max(found.size or (0,)) <= LARGE else found.shown[: SHOWN // 4]
        save_png(image_grid(shown), grid)
        console.print(f"the first {len(shown)} images in {grid}", highlight=False)
    return Report(
        metrics=numbers,
        settings={
            "extractor": {"name": network.name, "fingerprint": network.fingerprint},
            "size": list(found.size or ()),
            "crop": plan.crop,
            "count": found.count,
            "reference": real and {"sha256": real.digest, "count": real.count or None},
            "protocol": asdict(protocol),
        },
        subject={**images.about, **found.describe()},
        about={
            "preset": plan.preset or None,
            "extractor": network.describe(),
            "reference": real and real.describe(),
        },
        made_with=made_with(
            place.device,
            place.world,
            found.count,
            found.seconds,
            batch_size=plan.batch_size,
            drawing=images.drawing,
        ),
    )


def warnings(found: Observations, metrics: Sequence[str]) -> list[str]:
    """What makes numbers of a set doubtful."""
    lines, width = [], found.statistics.mean.numel()
    if found.unreadable:
        lines.append(f"left out {found.unreadable} images of {found.source}; {found.error}")
    if found.enlarged and found.size:
        to = f"{found.size[1]} x {found.size[0]}"
        lines.append(
            f"{found.enlarged} images of {found.source} are smaller than {to} and were enlarged: blurred"
        )
    return [*lines, *few_images(found.count, width, found.source, metrics)]


def few_images(count: int, width: int, source: str, metrics: Sequence[str]) -> list[str]:
    """Which metrics say little of a set for its number of images.

    Args:
        count: of the images; 0 where a file does not say.
        width: features of an image.
        source: the set's name.
        metrics: that are measured.
    """
    lines, parts = [], Protocol().is_splits
    if "fid" in metrics and 0 < count <= width:
        lines.append(f"FID by {count} images of {source} says little: their covariance has {width} rows")
    if "is" in metrics and parts <= count < FEW * parts:
        lines.append(
            f"IS by {count} images of {source} says little: none of its {parts} parts can score above "
            f"the number of images in it, about {count // parts}"
        )
    return lines


def print_report(report: Report) -> None:
    """Print the numbers as a table, and below it what they are of."""
    found, real, network = report.subject, report.about["reference"], report.about["extractor"]
    table = [
        (number.name, as_text(metric, number), remark(metric, report))
        for metric, number in report.metrics.items()
    ]
    if real and "accuracy" in real:
        images = f"{real['right']} of {real['count']} images of the reference"
        table.append(("  of the reference", f"{real['accuracy']:.1%}", images))
    if table:  # not where statistics are made of images, and nothing is measured
        print_table({"metric": "left", "value": "right", "": "left"}, table)
    rows, columns = found["size"]
    lines = [f"{found['count']} images of {found['source']}, {columns} x {rows}"]
    if real:
        images = f"{real['count']} images" if real["count"] else "statistics"
        lines.append(f"reference: {images} of {real['source']} ({real['sha256'][:12]})")
    lines.append(f"extractor: {network['name']} ({network['fingerprint'][:12]})")
    print("\n".join(lines))


def remark(metric: str, report: Report) -> str:
    """What a reader has to know beside a number."""
    if metric == "accuracy":
        return f"{report.subject['right']} of {report.subject['count']} images assigned to their class"
    protocol, more = report.settings["protocol"], report.metrics[metric].more
    known = {
        "is": f"{protocol['is_splits']} parts of the images, shuffled by the seed {protocol['seed']}",
        "kid": f"lower is better; {protocol['kid_subsets']} subsets of {more.get('subset_size')} images",
        "precision": f"share of the images within the reference, k = {protocol['neighbours']}",
        "recall": f"share of the reference within the images, k = {protocol['neighbours']}",
    }
    return known.get(metric, "lower is better")
