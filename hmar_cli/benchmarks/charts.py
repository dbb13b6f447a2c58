"""Charts of the benchmarks, and of the supplement's figures on attention (HMAR supplement B, Figs 7, 8, 10, 11)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_cli.benchmarks.attention import BASELINE, Row
from hmar_cli.models.scales import Scales
from hmar_cli.report import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "masked": "#9aa0a6",
    "flex": "#f2a65a",
    "varlen": "#6aa9d8",
    "sdpa": "#5c7fbf",
    "triton": "#2a9d5c",
    "reference": "#c9b18a",
}
LABELS = {
    "masked": "masked SDPA",
    "sdpa": "SDPA per scale",
    "flex": "Flex Attention",
    "varlen": "varlen flash",
}
OTHER = "#8a6fb0"
LEGEND = "median, 10 % to 90 %; × masked SDPA's speed"


def _plain(axes: "Axes") -> None:
    """Leave out what carries no information."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


# Speed, Fig. 11


def speed_charts(rows: Sequence[Row], folder: Path, device: str) -> list[Path]:
    """Draw the measured times: a picture for each pattern, dtype, number of heads and normalisation.

    Args:
        rows: what was measured.
        folder: where the PNG files go.
        device: for the title.

    Returns:
        The files.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.times:
            case = row.case
            groups.setdefault((case.pattern, case.dtype, case.heads, case.normalised), []).append(row)
    written = []
    for (pattern, dtype, heads, normalised), own in groups.items():
        name = f"speed-{pattern}-{dtype}-h{heads}{'-normalised' if normalised else ''}.png"
        what = ", queries and keys normalised" if normalised else ""
        title = f"{pattern} attention, {dtype}, {heads} heads of {own[0].case.head_size}{what}, {device}"
        save_figure(_speed_chart(own, rows, title), folder / name)
        written.append(folder / name)
    return written


def _speed_chart(own: Sequence[Row], rows: Sequence[Row], title: str) -> "Figure":
    """Bars of one picture: a column for each scale list, a line for each direction."""
    shapes = list(dict.fromkeys((row.case.name, row.case.batch) for row in own))
    directions = list(dict.fromkeys(d for row in own for d in row.times))
    most = max(sum((row.case.name, row.case.batch) == shape for row in own) for shape in shapes)
    figure = new_figure(max((0.8 + 0.7 * most) * len(shapes), 4.0), 2.7 * len(directions) + 0.5)
    lines = "\n".join([*textwrap.wrap(title, int(11 * figure.get_figwidth())), LEGEND])
    figure.suptitle(lines, fontsize=9)
    for y, direction in enumerate(directions):
        for x, (name, batch) in enumerate(shapes):
            axes = figure.add_subplot(len(directions), len(shapes), y * len(shapes) + x + 1)
            drawn = [r for r in own if (r.case.name, r.case.batch) == (name, batch) and direction in r.times]
            axes.set_title(f"{name}, batch {batch}: {direction}", fontsize=9)
            _bars(axes, drawn, rows, direction)
            cases = {row.case for row in drawn}
            lost = [r for r in rows if r.case in cases and r.status not in ("ok", "unavailable")]
            text = "\n".join(f"{LABELS.get(r.implementation, r.implementation)}: {r.status}" for r in lost)
            axes.text(
                0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=7, color="#b03030"
            )
            if x == 0:
                axes.set_ylabel("ms", fontsize=8)
    return figure


def _bars(axes: "Axes", drawn: Sequence[Row], rows: Sequence[Row], direction: str) -> None:
    """The bars of one panel."""
    _plain(axes)
    medians = [row.times[direction].median for row in drawn]
    spread = [
        [max(row.times[direction].median - row.times[direction].p10, 0) for row in drawn],
        [max(row.times[direction].p90 - row.times[direction].median, 0) for row in drawn],
    ]
    colours = [COLOURS.get(row.implementation, OTHER) for row in drawn]
    bars = axes.bar(range(len(drawn)), medians, color=colours, yerr=spread, ecolor="#444444", capsize=2)
    labels = []
    for row, median in zip(drawn, medians, strict=True):
        speedup = None if row.implementation == BASELINE else row.speedup(direction, rows)
        labels.append(f"{median:.3g}" + (f"\n{speedup:.3g}×" if speedup else ""))
    axes.bar_label(bars, labels, fontsize=7, padding=2)
    axes.margins(y=0.22)
    names = [LABELS.get(row.implementation, row.implementation).replace(" ", "\n", 1) for row in drawn]
    axes.set_xticks(range(len(drawn)), names, fontsize=7)


def step_chart(rows: Sequence[Mapping[str, Any]], target: Path, device: str) -> None:
    """Draw whole training steps: a panel for each recipe, a bar for each implementation.

    Args:
        rows: of `hmar_cli.benchmarks.train_step`, as JSON, those that have a time.
        target: PNG file.
        device: for the title.
    """
    panels = list(dict.fromkeys((row["recipe"], row["batch"]) for row in rows))
    figure = new_figure(max(3.6 * len(panels), 4.0), 3.2)
    figure.suptitle(f"training step, {device}\nmedian, 10 % to 90 %; above: ms and GiB", fontsize=9)
    for place, (recipe, batch) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _plain(axes)
        own = [row for row in rows if (row["recipe"], row["batch"]) == (recipe, batch)]
        medians = [row["median_ms"] for row in own]
        spread = [
            [max(row["median_ms"] - row["p10_ms"], 0) for row in own],
            [max(row["p90_ms"] - row["median_ms"], 0) for row in own],
        ]
        colours = [COLOURS.get(row["implementation"], OTHER) for row in own]
        bars = axes.bar(range(len(own)), medians, color=colours, yerr=spread, ecolor="#444444", capsize=2)
        gib = [f"\n{row['peak_gib']:.3g} GiB" if row["peak_gib"] else "" for row in own]
        labels = [f"{m:.4g}{g}" for m, g in zip(medians, gib, strict=True)]
        axes.bar_label(bars, labels, fontsize=7, padding=2)
        axes.margins(y=0.2)
        names = [LABELS.get(r["implementation"], r["implementation"]).replace(" ", "\n", 1) for r in own]
        axes.set_xticks(range(len(own)), names, fontsize=7)
        axes.set_title(f"{recipe}, batch {batch}", fontsize=9)
        if place == 1:
            axes.set_ylabel("ms", fontsize=8)
    save_figure(figure, target)


# Sequence lengths, Figs 7 and 8


def length_chart(
    by_resolution: Sequence[Mapping[str, int]],
    by_steps: Mapping[int, Sequence[Mapping[str, int]]],
    target: Path,
) -> None:
    """Draw sequence length against resolution (Fig. 7) and against extra sampling steps (Fig. 8).

    Args:
        by_resolution: of `lengths_by_resolution`.
        by_steps: of `lengths_by_steps`, by resolution in pixels.
        target: PNG file.
    """
    panels = 1 + len(by_steps)
    figure = new_figure(3.9 * panels, 3.4)
    axes = figure.add_subplot(1, panels, 1)
    _plain(axes)
    pixels = [row["pixels"] for row in by_resolution]
    series = (
        ("next_scale", "next scale (VAR, HMAR)", "#5c7fbf"),
        ("next_token", "next token (AR)", "#f2a65a"),
    )
    for key, label, colour in series:
        lengths = [row[key] for row in by_resolution]
        axes.plot(pixels, lengths, marker="o", color=colour, label=label)
        for x, y in zip(pixels, lengths, strict=True):
            above = key == "next_scale"
            offset, align = ((-4, 4), "right") if above else ((4, -11), "left")
            axes.annotate(f"{y:,}", (x, y), offset, textcoords="offset points", ha=align, fontsize=7)
    axes.set_xticks(pixels, [f"{p}×{p}" for p in pixels])
    axes.set_xlabel("pixels", fontsize=8)
    axes.set_ylabel("tokens", fontsize=8)
    axes.set_title("sequence length by resolution (Fig. 7)", fontsize=9)
    axes.margins(x=0.12, y=0.12)
    axes.legend(fontsize=8, frameon=False)
    for place, (size, rows) in enumerate(by_steps.items(), start=2):
        _steps_panel(figure.add_subplot(1, panels, place), size, rows)
    save_figure(figure, target)


def _steps_panel(axes: "Axes", pixels: int, rows: Sequence[Mapping[str, int]]) -> None:
    """Sequence length against sampling steps at one resolution."""
    _plain(axes)
    steps = [row["steps"] for row in rows]
    axes.plot(steps, [row["var"] for row in rows], marker="o", markersize=4, color="#5c7fbf", label="VAR")
    axes.plot(steps, [row["hmar"] for row in rows], marker="s", markersize=4, color="#2a9d5c", label="HMAR")
    last, length = rows[-1], rows[0]["hmar"]
    axes.annotate(
        f"{last['var']:,}: VAR has no more", (last["steps"], last["var"]), (0, 6), textcoords="offset points",
        ha="right", fontsize=7,
    )  # fmt: skip
    axes.annotate(
        f"{length:,} at any number of steps", (last["steps"], length), (0, 6), textcoords="offset points",
        ha="right", fontsize=7,
    )  # fmt: skip
    axes.set_xlabel("sampling steps", fontsize=8)
    axes.set_title(f"sequence length by steps, {pixels} px (Fig. 8)", fontsize=9)
    axes.set_ylim(0, last["var"] * 1.12)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


# Attention patterns, Fig. 10


def pattern_chart(scales: Scales, name: str, shares: Mapping[str, float], target: Path) -> None:
    """Draw which keys each query sees, block-causal and block-diagonal (Fig. 10).

    Args:
        scales: the scale list.
        name: of the list, for the title.
        shares: visible share of all pairs, by pattern.
        target: PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    figure = new_figure(8.4, 4.6)
    total = scales.total
    figure.suptitle(f"which keys a query sees, scales {name}, {total:,} tokens", fontsize=9)
    for place, (pattern, share) in enumerate(shares.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        for k in range(len(scales)):
            own = scales.slice(k)
            size = own.stop - own.start
            for j in range(k + 1) if pattern == "causal" else (k,):
                seen = scales.slice(j)
                colour = colormaps["viridis"](0.15 + 0.75 * (j / max(1, len(scales) - 1)))
                corner = (seen.start, own.start)
                axes.add_patch(Rectangle(corner, seen.stop - seen.start, size, color=colour, linewidth=0))
        if total <= 64:
            lines = range(total + 1)
            axes.hlines(lines, 0, total, color="white", linewidth=0.6)
            axes.vlines(lines, 0, total, color="white", linewidth=0.6)
        axes.set_xlim(0, total)
        axes.set_ylim(total, 0)
        axes.set_aspect("equal")
        _scale_ticks(axes, scales)
        model = "VAR" if pattern == "causal" else "HMAR"
        axes.set_title(f"block-{pattern} ({model}): {share:.1%} of all pairs", fontsize=9)
        axes.set_xlabel("keys, by scale", fontsize=8)
        axes.set_ylabel("queries, by scale", fontsize=8)
    save_figure(figure, target)


def _scale_ticks(axes: "Axes", scales: Scales) -> None:
    """Name the scales that are large enough for a name, in their middle."""
    large = [k for k, n in enumerate(scales.lengths) if n >= scales.total / 12]
    middles = [scales.offsets[k] + scales.lengths[k] / 2 for k in large]
    names = ["{}×{}".format(*scales.grids[k]) for k in large]
    axes.set_xticks(middles, names, fontsize=7)
    axes.set_yticks(middles, names, fontsize=7)
