"""Where a trained next-scale model looks (HMAR supplement B.2 and B.3, Figs 9 and 10).

Attention is that of next-scale prediction on true tokens: each scale given the true coarser ones.

Letters: B images, H heads, D head size, K scales, n tokens of one scale, L tokens of all, q queries, m keys.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hmar_cli.analysis.held_out import HeldOut, Subject
from hmar_cli.analysis.results import Row
from hmar_cli.analysis.scales import predict, side_names
from hmar_cli.models.layers import MAX_LOG_SCALE, ScaleAttention
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.report import dress_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHUNK = 1 << 27
"""Attention weights that are held at once (512 MiB)."""


class Patterns:
    """Sums of a model's attention over images.

    Args:
        scales: of the model.
        causal: whether tokens see earlier scales.
        blocks: of the model.
        heads: H.
        device: where attention is computed.

    Attributes:
        images: how many.
        mass: [blocks, H, K, K] float64, of each query scale and key scale the share of a query's attention, averaged
            over queries, summed over images.
        reach: the same times the distance from query to key, in sides of the image.
        matrix: [L, L] float32, the attention of every query to every key, averaged over blocks and heads, summed over
            images.
    """

    def __init__(self, scales: Scales, causal: bool, blocks: int, heads: int, device: torch.device) -> None:
        self.scales, self.causal, self.images = scales, causal, 0
        shape = (blocks, heads, len(scales), len(scales))
        self.mass = torch.zeros(shape, dtype=torch.float64, device=device)
        self.reach = torch.zeros(shape, dtype=torch.float64, device=device)
        self.matrix = torch.zeros(scales.total, scales.total, device=device)
        places = positions(scales).to(device)
        self.far = torch.cdist(places, places)  # [L, L]

    def keys(self, k: int) -> slice:
        """Places of the keys that queries of scale k see."""
        own = self.scales.slice(k)
        return slice(0 if self.causal else own.start, own.stop)

    def seen(self, k: int) -> range:
        """The scales that queries of scale k see."""
        return range(0 if self.causal else k, k + 1)

    def add(self, block: int, layer: ScaleAttention, x: Tensor) -> None:
        """Add the attention of a block, whose layer got x [B, L, C]."""
        for k in range(len(self.scales)):
            own, keys = self.scales.slice(k), self.keys(k)
            step = max(1, CHUNK // (len(x) * layer.heads * (keys.stop - keys.start)))
            for start in range(own.start, own.stop, step):
                queries = slice(start, min(start + step, own.stop))
                weights = attention_weights(layer, x, queries, keys)  # [B, H, q, m]
                self._add_queries(block, k, queries, weights.sum(dim=0))  # [H, q, m]

    def _add_queries(self, block: int, k: int, queries: slice, weights: Tensor) -> None:
        """Add attention [H, q, m], summed over images, of some queries of scale k."""
        keys = self.keys(k)
        self.matrix[queries, keys] += weights.mean(dim=0) / len(self.mass)
        for j in self.seen(k):
            part = self.scales.slice(j)
            seen = weights[..., part.start - keys.start : part.stop - keys.start]  # [H, q, n_j]
            for total, value in ((self.mass, seen), (self.reach, seen * self.far[queries, part])):
                total[block, :, k, j] += value.sum(dim=(1, 2)).double() / self.scales.lengths[k]

    def cpu(self) -> "Patterns":
        """The sums on the CPU, once all are taken: until then a GPU waits for none of them."""
        for name in ("mass", "reach", "matrix", "far"):
            setattr(self, name, getattr(self, name).cpu())
        return self

    def even(self) -> tuple[Tensor, Tensor]:
        """The mass and reach [K, K] float64 of attention that is the same to all keys that are seen."""
        mass = torch.zeros(self.mass.shape[2:], dtype=torch.float64)
        reach = torch.zeros_like(mass)
        for k in range(len(self.scales)):
            queries, keys = self.scales.slice(k), self.keys(k)
            for j in self.seen(k):
                mass[k, j] = self.scales.lengths[j] / (keys.stop - keys.start)
                reach[k, j] = mass[k, j] * self.far[queries, self.scales.slice(j)].mean().item()
        return mass, reach


def positions(scales: Scales) -> Tensor:
    """Centres of all tokens (down, right) as shares of the image's sides, [L, 2] float32."""
    found = []
    for h, w in scales.grids:
        down, right = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
        found.append(torch.cartesian_prod(down, right))  # [n, 2], row-major
    return torch.cat(found)


def attention_weights(layer: ScaleAttention, x: Tensor, queries: slice, keys: slice) -> Tensor:
    """Attention of some queries to the keys that they see, [B, H, q, m] float32, as the layer computes it.

    Args:
        layer: of a model.
        x: [B, L, C], its input.
        queries: places of queries, all of one scale.
        keys: places of all keys that these see.
    """
    weight, bias = layer.qkv.weight.chunk(3), layer.q_bias
    q = F.linear(x[:, queries], weight[0], bias).unflatten(-1, (layer.heads, -1)).float()  # [B, q, H, D]
    k = F.linear(x[:, keys], weight[1]).unflatten(-1, (layer.heads, -1)).float()  # [B, m, H, D]
    temperature = layer.log_scale.clamp(max=MAX_LOG_SCALE).exp().float()  # [H]
    q = F.normalize(q, dim=-1) * temperature[:, None]
    scores = torch.einsum("bqhd,bmhd->bhqm", q, F.normalize(k, dim=-1))
    return scores.softmax(dim=-1)


@contextlib.contextmanager
def watch_inputs(
    model: NextScaleTransformer, see: Callable[[int, ScaleAttention, Tensor], None]
) -> Iterator[None]:
    """Call `see(block, layer, input)` for every attention layer of next-scale prediction inside the block."""
    layers = [block.get_submodule("attention") for block in model.blocks]

    def hook(i: int) -> Any:
        return lambda layer, arguments: see(i, layer, arguments[0])

    handles = [layer.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def measure_attention(subject: Subject, held_out: HeldOut, batch_size: int) -> Patterns:
    """Sum up where every head looks.

    Args:
        subject: a VAR or HMAR.
        held_out: images as tokens.
        batch_size: images at once; changes nothing but rounding.

    Raises:
        UserError: a class that the model does not know.
    """
    model, labels = subject.model, held_out.labels(subject.checkpoint)
    causal = model.pattern == "causal"
    patterns = Patterns(model.scales, causal, len(model.blocks), model.heads, subject.device)
    with watch_inputs(model, patterns.add):
        for part in held_out.batches(batch_size, f"attention of {subject.name}"):
            tokens = held_out.tokens[part].to(subject.device)
            predict(subject, tokens, labels[part].to(subject.device), None)
            patterns.images += len(tokens)
    return patterns.cpu()


def attention_rows(name: str, patterns: Patterns) -> list[Row]:
    """The numbers of a model: a row for every block, head, query scale and key scale that is seen.

    "share" is the part of a query's attention that falls on the key scale, "distance" the mean distance to where it
    looks there, in sides of the image; "even_share" and "even_distance" are those of attention that is the same to
    all keys that are seen. Blocks and heads count from 0, scales from 1.
    """
    (blocks, heads, *_), even = patterns.mass.shape, patterns.even()
    return [
        {"model": name, "block": block, "head": head, **cells}
        for block in range(blocks)
        for head in range(heads)
        for cells in _pair_cells(patterns, even, patterns.mass[block, head], patterns.reach[block, head])
    ]


def scale_pairs(name: str, patterns: Patterns) -> list[Row]:
    """The same, averaged over blocks and heads: a row for every query scale and key scale that is seen."""
    means = patterns.mass.mean(dim=(0, 1)), patterns.reach.mean(dim=(0, 1))  # 2 x [K, K]
    return [{"model": name, **cells} for cells in _pair_cells(patterns, patterns.even(), *means)]


def _pair_cells(
    patterns: Patterns, even: tuple[Tensor, Tensor], mass: Tensor, reach: Tensor
) -> Iterator[Row]:
    """Cells of every query scale and key scale that is seen, from sums [K, K] over images, beside even attention."""
    even_mass, even_reach = even
    for k in range(len(mass)):
        for j in patterns.seen(k):
            yield {
                "query_scale": k + 1,
                "key_scale": j + 1,
                "share": (mass[k, j] / patterns.images).item(),
                "even_share": even_mass[k, j].item(),
                "distance": (reach[k, j] / mass[k, j].clamp(min=1e-12)).item(),
                "even_distance": (even_reach[k, j] / even_mass[k, j]).item(),
            }


def relative_reach(patterns: Patterns) -> Tensor:
    """How far each head looks, over the same of even attention: [blocks, H] float64, a mean over all queries.

    1 is as far as even attention, 0 no farther than the query's own place.
    """
    weights = torch.tensor(patterns.scales.lengths, dtype=torch.float64)  # queries of each scale
    reach = (patterns.reach.sum(dim=3) / patterns.images * weights).sum(dim=2)  # [blocks, H]
    return reach / (patterns.even()[1].sum(dim=1) * weights).sum().clamp(min=1e-12)


def attention_by_distance(patterns: Patterns, k: int) -> tuple[list[float], list[float]]:
    """Attention within scale k against distance.

    Returns:
        Distances in tokens of that scale, in steps of one; and for each the mean attention of a query to a key there,
        over that of even attention to the keys it sees.
    """
    own, keys = patterns.scales.slice(k), patterns.keys(k)
    ratio = patterns.matrix[own, own].double() / patterns.images * (keys.stop - keys.start)  # [n, n]
    side = max(patterns.scales.grids[k])
    steps = (patterns.far[own, own].double() * side).round().long()  # [n, n]
    sums = torch.zeros(int(steps.max()) + 1, dtype=torch.float64)
    means = sums.scatter_add(0, steps.flatten(), ratio.flatten()) / steps.flatten().bincount()
    there = means.isfinite()
    return there.nonzero()[:, 0].double().tolist(), means[there].tolist()


def attention_figure(found: dict[str, Patterns]) -> "Figure":
    """Draw where models look, a line of panels for each."""
    figure = new_figure(17, 4.4 * len(found))
    panels = figure.subplots(len(found), 4, squeeze=False, width_ratios=[1, 1.15, 1, 1])
    for line, (name, patterns) in zip(panels, found.items(), strict=True):
        _pair_panel(line[0], name, patterns)
        _matrix_panel(line[1], name, patterns)
        _distance_panel(line[2], name, patterns)
        _head_panel(line[3], name, patterns)
    top = max(line[2].get_ylim()[1] for line in panels)
    for line in panels:
        line[2].set_ylim(0, top)
    return figure


def _pair_panel(axes: "Axes", name: str, patterns: Patterns) -> None:
    """Shares of attention by scale."""
    share = (patterns.mass.mean(dim=(0, 1)) / patterns.images * 100).numpy()  # [K, K]
    seen = np.array([[j in patterns.seen(k) for j in range(len(share))] for k in range(len(share))])
    axes.imshow(np.where(seen, share, np.nan), cmap="Blues", vmin=0, vmax=100)
    for k, j in np.argwhere(seen):
        colour = "white" if share[k, j] > 60 else "black"
        axes.text(j, k, f"{share[k, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    names = side_names(patterns.scales)
    dress_axes(
        axes, f"{name}: attention by scale, %", "key scale, side in tokens", "query scale, side in tokens"
    )
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)


def _matrix_panel(axes: "Axes", name: str, patterns: Patterns) -> None:
    """Attention of every query to every key, over even attention."""
    from matplotlib.colors import LogNorm

    scales, ratio = patterns.scales, np.full((patterns.scales.total,) * 2, np.nan)
    matrix = patterns.matrix.numpy() / patterns.images
    for k in range(len(scales)):
        own, keys = scales.slice(k), patterns.keys(k)
        ratio[own, keys] = matrix[own, keys] * (keys.stop - keys.start)
    image = axes.imshow(ratio, cmap="viridis", norm=LogNorm(0.1, 10), interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.8, extend="both").ax.tick_params(labelsize=7)
    dress_axes(axes, f"{name}: mean attention over even attention", "keys, by scale", "queries, by scale")
    large = [k for k, n in enumerate(scales.lengths) if n >= scales.total / 16]
    middles = [scales.offsets[k] + scales.lengths[k] / 2 - 0.5 for k in large]
    axes.set_xticks(middles, [side_names(scales)[k] for k in large])
    axes.set_yticks(middles, [side_names(scales)[k] for k in large])
    for offset in scales.offsets[1:]:
        axes.axhline(offset - 0.5, color="white", linewidth=0.4)
        axes.axvline(offset - 0.5, color="white", linewidth=0.4)
    axes.grid(visible=False)


def _distance_panel(axes: "Axes", name: str, patterns: Patterns) -> None:
    """Attention within a scale against distance."""
    from matplotlib import colormaps

    scales = patterns.scales
    shown = [k for k in range(len(scales)) if scales.lengths[k] >= 9]
    for k in shown:
        colour = colormaps["viridis"](0.9 * (k - shown[0]) / max(1, shown[-1] - shown[0]))
        x, y = attention_by_distance(patterns, k)
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.2, color=colour, label=side_names(scales)[k])
    axes.axhline(1, color="#888888", linewidth=0.8, linestyle="--", label="even")
    title = f"{name}: attention within a scale (Fig. 9)"
    dress_axes(axes, title, "distance, tokens of the scale", "attention over even attention")
    axes.legend(fontsize=7, frameon=False, title="side in tokens", title_fontsize=7)


def _head_panel(axes: "Axes", name: str, patterns: Patterns) -> None:
    """How far each head looks."""
    values = relative_reach(patterns).numpy()  # [blocks, H]
    image = axes.imshow(values, cmap="magma", vmin=0, vmax=max(1.2, float(values.max())), aspect="auto")
    axes.figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    dress_axes(axes, f"{name}: distance over that of even attention", "head", "block")
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    axes.grid(visible=False)
