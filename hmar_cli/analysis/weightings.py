"""The weightings of the next-scale loss (HMAR supplement C.2, Fig. 13).

Letters: K scales, n_k tokens of scale k, L tokens of all scales.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from hmar_cli.analysis.results import Row
from hmar_cli.analysis.scales import side_names
from hmar_cli.models.scales import Scales
from hmar_cli.report import dress_axes, new_figure
from hmar_cli.settings import Weighting
from hmar_cli.training.weighting import scale_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
"""All that a recipe can ask for."""

LABELS = {
    "none": "unweighted",
    "equal": "equal",
    "linear": "linear",
    "sqrt": "square root",
    "exp-decay": "exponential decay",
    "lognormal": "log-normal",
}
"""What the supplement's Table 4 calls them."""


def weighting_rows(scales: Scales) -> list[Row]:
    """A row for each weighting and scale.

    "weight" is the scale's total weight in the loss, which its tokens share; "share" the same where all scales sum to
    1; "per_token" the weight of a token over that of the unweighted mean.
    """
    rows: list[Row] = []
    for weighting in WEIGHTINGS:
        weights = scale_weights(scales, weighting)
        for k, (name, n, weight) in enumerate(zip(side_names(scales), scales.lengths, weights, strict=True)):
            share = weight / sum(weights)
            cells: Row = {"weighting": weighting, "scale": k + 1, "side": name, "tokens": n}
            rows.append({**cells, "weight": weight, "share": share, "per_token": share * scales.total / n})
    return rows


def weighting_figure(rows: Sequence[Row], scales: Scales) -> "Figure":
    """Draw the share of each scale in the loss, and the weight of a token, a line for each weighting."""
    figure = new_figure(10.5, 4)
    left, right = figure.subplots(1, 2)
    markers = "osv^Dx"
    for marker, weighting in zip(markers, WEIGHTINGS, strict=True):
        own = [row for row in rows if row["weighting"] == weighting]
        for axes, key, factor in ((left, "share", 100), (right, "per_token", 1)):
            values = [factor * float(row[key] or 0) for row in own]
            axes.plot(
                range(len(own)), values, marker=marker, markersize=4, linewidth=1.3, label=LABELS[weighting]
            )
    dress_axes(
        left, "share of each scale in the loss (Fig. 13)", "scale, side in tokens", "share of the loss, %"
    )
    dress_axes(right, "weight of a token", "scale, side in tokens", "weight over the unweighted mean's")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xticks(range(len(scales)), side_names(scales))
    left.legend(fontsize=8, frameon=False)
    return figure
