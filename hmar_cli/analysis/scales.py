"""Held-out loss and accuracy of every scale, and how hard each is to learn (HMAR supplement C, Figs 12, 16, 22).

Letters: B images, N of all of them, K scales, n_k tokens of scale k, L tokens of all scales.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hmar_cli.analysis.held_out import HeldOut, Subject
from hmar_cli.analysis.results import Row
from hmar_cli.models.scales import Scales
from hmar_cli.report import dress_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Task = Literal["next-scale", "masked"]

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, fill [0, 1) evenly however many there are."""


class LogNormal(NamedTuple):
    """A log-normal curve over scales: height / k exp(-(ln k - mean)^2 / (2 deviation^2)), k from 1.

    Attributes:
        height: factor.
        mean: of ln k.
        deviation: of ln k.
        r_squared: share of the losses' variance that the curve explains.
    """

    height: float
    mean: float
    deviation: float
    r_squared: float

    def at(self, k: float) -> float:
        """The curve at scale k, which may lie between scales."""
        return self.height / k * math.exp(-((math.log(k) - self.mean) ** 2) / (2 * self.deviation**2))

    @property
    def peak(self) -> float:
        """The scale at which the curve is highest."""
        return math.exp(self.mean - self.deviation**2)


def fit_log_normal(losses: Sequence[float]) -> LogNormal | None:
    """Fit a log-normal curve to a loss per scale (supplement C.1: "an approximately log-normal pattern").

    ln(k loss) is a parabola in ln k, which least squares give in closed form.

    Args:
        losses: K positive numbers.

    Returns:
        The curve; None where the parabola has no top (no log-normal curve is near), and with fewer than 4 scales,
        which any parabola fits.
    """
    if len(losses) < 4 or min(losses) <= 0:
        return None
    k = np.arange(1, len(losses) + 1, dtype=np.float64)
    y = np.array(losses, np.float64)
    a, b, c = np.polyfit(np.log(k), np.log(k * y), 2)
    if a >= 0:
        return None
    mean, deviation = -b / (2 * a), math.sqrt(-1 / (2 * a))
    height = math.exp(c - b * b / (4 * a))
    curve = LogNormal(height, float(mean), deviation, 0.0)
    left = float(np.square(y - [curve.at(each) for each in k]).sum())
    spread = float(np.square(y - y.mean()).sum())
    return curve._replace(r_squared=1 - left / spread if spread else 1.0)


def side_names(scales: Scales) -> list[str]:
    """The side of each scale in tokens: "8", or "8x12" for 8 rows of 12."""
    return [str(h) if h == w else f"{h}x{w}" for h, w in scales.grids]


def tasks(subject: Subject) -> tuple[Task, ...]:
    """What a model was trained to do: next-scale prediction, and with a masked branch masked prediction too."""
    return ("next-scale",) if subject.model.masked is None else ("next-scale", "masked")


def draw_masks(scales: Scales, images: range, seed: int, share: float | None) -> Tensor:
    """Masked positions of images, a function of (seed, image) alone.

    Args:
        scales: the token grids.
        images: numbers of the images.
        seed: of the positions.
        share: of the tokens of every scale but the first, rounded up; None is another one for each image, evenly
            over (0, 1) as in training.

    Returns:
        [B, L - n_1] bool; at least one token of every scale is masked.
    """
    rows = []
    for image in images:
        rng = np.random.default_rng([seed, image])
        ratio = (0.5 + image * GOLDEN) % 1 if share is None else share
        parts = []
        for n in scales.lengths[1:]:
            masked = np.zeros(n, bool)
            masked[rng.permutation(n)[: max(1, math.ceil(ratio * n - 1e-9))]] = True
            parts.append(masked)
        rows.append(np.concatenate([np.zeros(0, bool), *parts]))
    return torch.from_numpy(np.stack(rows))


def predict(subject: Subject, tokens: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [B, L, V] of true images: each scale given the true coarser ones.

    Args:
        subject: the model.
        tokens: [B, L] int64, on its device.
        labels: [B] int64.
        mask: [B, L - n_1] bool, given to the masked branch; None asks for next-scale prediction.
    """
    model, quantizer = subject.model, subject.codec.quantizer
    inputs = quantizer.teacher_inputs(tokens)  # [B, L - n_1, Z]
    if mask is None:
        return model(labels, inputs)  # type: ignore[no-any-return]
    assert model.masked is not None
    seen = torch.cat([mask.new_ones(len(mask), model.scales.lengths[0]), ~mask], dim=1)  # [B, L]
    own = quantizer.own_inputs(tokens, seen if model.masked.leak_free else None)
    return model(labels, inputs, own, mask)  # type: ignore[no-any-return]


@torch.inference_mode()
def measure_scales(
    subject: Subject, held_out: HeldOut, task: Task, *, batch_size: int, seed: int, share: float | None
) -> list[Row]:
    """Cross-entropy and accuracy of every scale, each the mean over images of the mean over an image's tokens.

    Args:
        subject: the model.
        held_out: images that it was not trained on.
        task: "next-scale" judges all tokens, "masked" the masked ones, of all scales but the first.
        batch_size: images at once; changes nothing but rounding.
        seed: of the masks.
        share: of masked tokens, see `draw_masks`.

    Returns:
        A row for each scale, "cross_entropy" in nats, "accuracy" in [0, 1], and the standard error of both over
        images. Compare with other rows of the same data, tokenizer and task.

    Raises:
        UserError: a class that the model does not know.
    """
    scales, labels = subject.model.scales, held_out.labels(subject.checkpoint)
    numbers = []  # of each batch [2, B, K]
    for part in held_out.batches(batch_size, f"{subject.name}, {task}"):
        mask = draw_masks(scales, range(part.start, part.stop), seed, share) if task == "masked" else None
        numbers.append(_judge(subject, held_out.tokens[part], labels[part], mask).double().cpu())
    every = torch.cat(numbers, dim=1)  # [2, N, K]
    errors = every.std(dim=1) / math.sqrt(every.shape[1]) if every.shape[1] > 1 else every[:, 0] * math.nan
    means, first = every.mean(dim=1), 1 if task == "masked" else 0
    return [
        {
            "model": subject.name,
            "task": task,
            "scale": k + 1,
            "side": side_names(scales)[k],
            "tokens": scales.lengths[k],
            "cross_entropy": means[0, k].item(),
            "cross_entropy_error": errors[0, k].item(),
            "accuracy": means[1, k].item(),
            "accuracy_error": errors[1, k].item(),
        }
        for k in range(first, len(scales))
    ]


def _judge(subject: Subject, tokens: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-entropy and accuracy of each scale of each image, [2, B, K]; with a mask of masked tokens alone.

    Args:
        subject: the model.
        tokens: [B, L] int64, anywhere.
        labels: [B] int64.
        mask: [B, L - n_1] bool, or None.
    """
    tokens, labels = tokens.to(subject.device), labels.to(subject.device)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if mask is not None:
        mask = mask.to(subject.device)
        counted = torch.cat([mask.new_zeros(len(mask), tokens.shape[1] - mask.shape[1]), mask], dim=1)
    logits = predict(subject, tokens, labels, mask)  # [B, L, V]
    # one long batch: over a transposed dimension the logits would be copied
    entropy = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
    hits = (logits.argmax(dim=-1) == tokens).float()  # [B, L]
    return _per_scale(torch.stack([entropy, hits]), counted.float(), subject.model.scales)


def _per_scale(values: Tensor, counted: Tensor, scales: Scales) -> Tensor:
    """Average values [..., B, L] over the counted tokens (0 or 1, [B, L]) of each scale: [..., B, K]."""
    parts = zip((values * counted).split(scales.lengths, -1), counted.split(scales.lengths, -1), strict=True)
    return torch.stack([v.sum(dim=-1) / c.sum(dim=-1).clamp(min=1) for v, c in parts], dim=-1)


def summarize(rows: Sequence[Row], scales: Scales) -> dict[str, Any]:
    """What the rows of several models come to.

    Returns:
        "totals": for each model and task the cross-entropy and accuracy of a token, over all its scales together
        (supplement Figs 14, 15). "difficulty": the least next-scale cross-entropy of each scale over the models,
        and its log-normal fit (Fig. 12), or None.
    """
    totals = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        counts = [scales.lengths[int(row["scale"] or 0) - 1] for row in own]
        means = {
            key: float(np.average([float(row[key] or 0) for row in own], weights=counts))
            for key in ("cross_entropy", "accuracy")
        }
        totals.append({"model": model, "task": task, **means})
    least = least_losses(rows, len(scales))
    fit = fit_log_normal(least)
    return {
        "totals": totals,
        "difficulty": {
            "least_cross_entropy": least,
            "log_normal": fit and {**fit._asdict(), "peak": fit.peak},
        },
    }


def least_losses(rows: Sequence[Row], count: int) -> list[float]:
    """The least next-scale cross-entropy of each of K scales over all models."""
    own = [row for row in rows if row["task"] == "next-scale"]
    return [
        min(float(row["cross_entropy"] or 0) for row in own if row["scale"] == k + 1) for k in range(count)
    ]


def scale_figure(rows: Sequence[Row], scales: Scales) -> "Figure":
    """Draw loss and accuracy of every scale, a line for each model and task, and the difficulty of scales."""
    figure = new_figure(13, 4.2)
    left, middle, right = figure.subplots(1, 3)
    ticks = range(1, len(scales) + 1)
    lines = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    models = list(dict.fromkeys(model for model, _ in lines))
    for model, task in lines:
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        place = [int(row["scale"] or 0) for row in own]
        style: dict[str, Any] = {
            "color": f"C{models.index(model)}",
            "linestyle": "-" if task == "next-scale" else "--",
            "marker": "o" if task == "next-scale" else "s",
            "markersize": 4,
            "linewidth": 1.3,
            "capsize": 2,
            "label": f"{model}, {task}",
        }
        for axes, key, factor in ((left, "cross_entropy", 1), (middle, "accuracy", 100)):
            values = [factor * float(row[key] or 0) for row in own]
            error = [2 * factor * float(row[f"{key}_error"] or 0) for row in own]
            axes.errorbar(place, values, error, **style)
    least = least_losses(rows, len(scales))
    curve = fit_log_normal(least)
    right.bar(ticks, least, color="#c3cfe2", label="least over the models")
    if curve is None:
        right.plot([], [], " ", label="no log-normal curve is near")
    else:
        x = np.linspace(1, len(scales), 200)
        label = f"log-normal, peak at scale {curve.peak:.1f}, R² {curve.r_squared:.2f}"
        right.plot(x, [curve.at(each) for each in x], color="#2a9d5c", linewidth=1.5, label=label)
    side = "scale, side in tokens"
    dress_axes(left, "held-out loss (Fig. 16); bars: 2 standard errors", side, "cross-entropy, nats a token")
    dress_axes(middle, "held-out accuracy (Figs 16, 22)", side, "right tokens, %")
    dress_axes(
        right, "difficulty of next-scale prediction (Fig. 12)", side, "least cross-entropy, nats a token"
    )
    for axes in (left, middle, right):
        axes.set_xticks(ticks, side_names(scales))
        axes.set_ylim(bottom=0)
    right.set_ylim(0, max(least) * 1.25)
    right.legend(fontsize=7, frameon=False)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure
