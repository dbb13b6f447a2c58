"""How a multi-scale tokenizer uses its codebook at each scale (HMAR supplement E.2, Fig. 23).

Letters: K scales, V codes, N tokens of one scale in all images.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hmar_cli.analysis.results import Row
from hmar_cli.analysis.scales import side_names
from hmar_cli.evaluation.codes import perplexity, usage
from hmar_cli.models.scales import Scales
from hmar_cli.report import dress_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FREQUENT = 10
"""Codes whose common share of the tokens is told."""

RANKS = 64
"""Most points of a curve of frequency against rank."""


def expected_usage(tokens: int, codes: int) -> float:
    """Share of V codes that N tokens show when all codes are equally likely: few tokens cannot show all codes."""
    return float(-np.expm1(tokens * np.log1p(-1 / codes))) if codes > 1 else 1.0


def codebook_rows(counts: Tensor, scales: Scales) -> list[Row]:
    """A row for each scale, and one for all together.

    "usage" is the share of the codes that occur at all, "even_usage" what it would be if all codes were equally
    likely, "perplexity" the number of equally likely codes that would be as hard to foretell, "top_share" the share
    of the tokens that are among the 10 most frequent codes.

    Args:
        counts: [K, V] int64, of `count_codes`.
        scales: the token grids.
    """
    names = side_names(scales)
    rows: list[Row] = []
    for name, own in [*zip(names, counts, strict=True), ("all", counts.sum(dim=0))]:
        total = int(own.sum())
        rows.append(
            {
                "scale": name,
                "tokens": total,
                "codes_used": int((own > 0).sum()),
                "usage": usage(own).item(),
                "even_usage": expected_usage(total, len(own)),
                "perplexity": perplexity(own).item(),
                "top_share": own.topk(min(MOST_FREQUENT, len(own))).values.sum().item() / total,
            }
        )
    return rows


def rank_curve(counts: Tensor) -> list[tuple[int, float]]:
    """Share of the tokens against a code's rank, from 1, the most frequent first; of codes that occur.

    Args:
        counts: [V] int64.

    Returns:
        At most `RANKS` points, evenly spaced on a logarithmic scale.
    """
    shares = (counts.double() / counts.sum()).sort(descending=True).values
    used = int((counts > 0).sum())
    ranks = np.unique(np.geomspace(1, used, min(RANKS, used)).round().astype(int))
    return [(int(rank), shares[rank - 1].item()) for rank in ranks]


def rank_curves(counts: Tensor, scales: Scales) -> dict[str, list[tuple[int, float]]]:
    """The `rank_curve` of each scale by its name, for counts [K, V]."""
    return {name: rank_curve(own) for name, own in zip(side_names(scales), counts, strict=True)}


def codebook_figure(counts: Tensor, rows: Sequence[Row], scales: Scales) -> "Figure":
    """Draw usage per scale, and frequency against rank."""
    from matplotlib import colormaps

    codes, names = counts.shape[1], side_names(scales)
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    own, place = [row for row in rows if row["scale"] != "all"], np.arange(len(scales))

    def values(key: str, factor: float = 100) -> list[float]:
        return [factor * float(row[key] or 0) for row in own]

    left.bar(place - 0.2, values("usage"), 0.4, color="#5c7fbf", label="codes in use")
    left.bar(place + 0.2, values("perplexity", 100 / codes), 0.4, color="#f2a65a", label="perplexity")
    left.plot(
        place - 0.2,
        values("even_usage"),
        "_",
        color="black",
        markersize=12,
        label="in use if all were equally likely",
    )
    dress_axes(
        left, f"codebook usage by scale, of {codes} codes", "scale, side in tokens", "share of the codes, %"
    )
    left.set_xticks(place, names)
    left.set_ylim(0, 118)
    left.set_yticks(range(0, 101, 20))
    left.legend(fontsize=7, frameon=False, ncols=3, loc="upper center")
    for k, (name, curve) in enumerate(rank_curves(counts, scales).items()):
        ranks, shares = zip(*curve, strict=True)
        colour = colormaps["viridis"](0.92 * k / max(1, len(scales) - 1))
        right.plot(ranks, [100 * share for share in shares], color=colour, linewidth=1.4, label=name)
    right.axhline(100 / codes, color="#888888", linewidth=0.8, linestyle="--", label="even")
    right.set_xscale("log")
    right.set_yscale("log")
    dress_axes(
        right,
        "frequency of codes by rank (Fig. 23)",
        "rank of the code in its scale",
        "share of the tokens, %",
    )
    right.legend(fontsize=7, edgecolor="none", title="scale", title_fontsize=7, loc="lower left", ncols=2)
    return figure
