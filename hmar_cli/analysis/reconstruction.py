"""Held-out images of which a model is told a part: what it makes of the rest (HMAR supplement D, Figs 17 and 18).

Letters: B images, N of all of them, K scales, n_k tokens of scale k, L tokens of all scales, H W the image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hmar_cli.analysis.held_out import HeldOut, Subject
from hmar_cli.analysis.results import Cell, Row
from hmar_cli.analysis.scales import Task, draw_masks, predict
from hmar_cli.console import progress
from hmar_cli.data.frames import as_tensor
from hmar_cli.data.transforms import Pixels, to_tensor
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.measures import measure, metric_name
from hmar_cli.evaluation.observing import Observations, observe
from hmar_cli.models.scales import Scales
from hmar_cli.report import bar_figure, dress_axes, new_figure, to_uint8
from hmar_cli.sampling.images import autocast
from hmar_cli.sampling.next_scale import KeptTokens, sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import NextScaleSample
from hmar_cli.tokenizers.losses import psnr
from hmar_cli.tokenizers.msvq import MultiScaleVQ

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Fill = Callable[[slice], tuple[Tensor, Tensor]]
"""From a slice of the images to their tokens [B, L] int64 as a model completes them, and which of these it chose,
[B, L] bool; the others are the images' own."""


@dataclass(frozen=True)
class Version:
    """One way to complete images.

    Attributes:
        label: of its row of images.
        cells: what tells it from others, in the table.
        fill: how.
    """

    label: str
    cells: Mapping[str, Cell]
    fill: Fill


def known_scales(
    subject: Subject, held_out: HeldOut, settings: NextScaleSample, *, seed: int, precision: str
) -> list[Version]:
    """Sampling that starts from the true tokens of the first scales, none to all (Fig. 17).

    Args:
        subject: the model.
        held_out: images.
        settings: of the sampler.
        seed: of the random numbers; image i has those of (seed, i), at every scale the same whatever is known.
        precision: "auto" (bf16 on a GPU), "bf16" or "fp32".

    Raises:
        UserError: a class that the model does not know.
    """
    scales, labels = subject.model.scales, held_out.labels(subject.checkpoint)
    device = subject.device

    def fill_from(known: int) -> Fill:
        drawn = tuple(torch.full((n,), k >= known, device=device) for k, n in enumerate(scales.lengths))
        counts = tuple(n if k >= known else 0 for k, n in enumerate(scales.lengths))
        weight = torch.ones(scales.grid, device=device)

        @torch.inference_mode()
        def fill(part: slice) -> tuple[Tensor, Tensor]:
            tokens = held_out.tokens[part].to(device)
            kept = KeptTokens(tokens, drawn, counts, weight)
            noise = PhiloxNoise(seed, torch.arange(part.start, part.stop, device=device))
            with autocast(device, precision):
                found, _ = sample_next_scale(
                    subject.model,
                    subject.codec.quantizer,
                    labels[part].to(device),
                    settings,
                    noise,
                    kept=kept,
                )
            return found, torch.cat(drawn).expand_as(tokens)

        return fill

    return [
        Version(
            f"{subject.name}, {k} of {len(scales)} known",
            {"model": subject.name, "known_scales": k},
            fill_from(k),
        )
        for k in range(len(scales) + 1)
    ]


def half_masked(subjects: Sequence[Subject], held_out: HeldOut, *, share: float, seed: int) -> list[Version]:
    """What models make of true scales (Fig. 18), by their most probable tokens: nothing is drawn.

    First the tokenizer alone; then of each model next-scale prediction, which chooses every token of a scale given
    the true coarser scales; then of each with a masked branch masked prediction, which chooses a share of every
    scale's tokens given the others and the true coarser scales. Last, chance: the same tokens taken from the next
    image, if there is another. The first scale is never masked.

    Args:
        subjects: models of one tokenizer.
        held_out: images.
        share: of masked tokens.
        seed: of their places.

    Raises:
        UserError: a class that a model does not know.
    """
    scales, device = subjects[0].model.scales, subjects[0].device
    masks = draw_masks(scales, range(len(held_out.tokens)), seed, share)  # [N, L - n_1]
    branched = [subject for subject in subjects if subject.model.masked is not None]
    whole = Version(
        "tokenizer", {"model": "tokenizer", "task": "reconstruction"}, _as_they_are(held_out, device)
    )
    versions = [
        whole,
        *(_guess(subject, held_out, "next-scale", None) for subject in subjects),
        *(_guess(subject, held_out, "masked", masks) for subject in branched),
    ]
    if branched and len(held_out.tokens) > 1:
        about = {"model": "another image", "task": "chance"}
        versions.append(Version("from another image", about, _another(held_out, masks, device)))
    return versions


def _guess(subject: Subject, held_out: HeldOut, task: Task, masks: Tensor | None) -> Version:
    cells: dict[str, Cell] = {"model": subject.name, "task": task}
    return Version(f"{subject.name}, {task}", cells, _most_probable(subject, held_out, masks))


def _as_they_are(held_out: HeldOut, device: torch.device) -> Fill:
    def fill(part: slice) -> tuple[Tensor, Tensor]:
        tokens = held_out.tokens[part].to(device)
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)

    return fill


def _most_probable(subject: Subject, held_out: HeldOut, masks: Tensor | None) -> Fill:
    """The model's best guess at masked tokens (masks [N, L - n_1]), or by next-scale prediction at all."""
    labels, device, first = (
        held_out.labels(subject.checkpoint),
        subject.device,
        subject.model.scales.lengths[0],
    )

    @torch.inference_mode()
    def fill(part: slice) -> tuple[Tensor, Tensor]:
        tokens = held_out.tokens[part].to(device)
        mask = None if masks is None else masks[part].to(device)
        best = predict(subject, tokens, labels[part].to(device), mask).argmax(dim=-1)  # [B, L]
        if mask is None:
            return best, torch.ones_like(tokens, dtype=torch.bool)
        chosen = torch.cat([mask.new_zeros(len(mask), first), mask], dim=1)  # [B, L]
        return torch.where(chosen, best, tokens), chosen

    return fill


def _another(held_out: HeldOut, masks: Tensor, device: torch.device) -> Fill:
    """Masked tokens (masks [N, L - n_1]) of the image that follows: what chance would choose."""
    others, first = held_out.tokens.roll(-1, dims=0), held_out.tokens.shape[1] - masks.shape[1]

    def fill(part: slice) -> tuple[Tensor, Tensor]:
        mask = masks[part]
        chosen = torch.cat([mask.new_zeros(len(mask), first), mask], dim=1)  # [B, L]
        tokens = torch.where(chosen, others[part], held_out.tokens[part])
        return tokens.to(device), chosen.to(device)

    return fill


class Bench:
    """What versions of images are judged by.

    Args:
        held_out: the images, with their pictures.
        codec: the tokenizer that decodes them.
        extractor: of the Fréchet distance to the pictures; None measures none.
        batch_size: images at once; changes nothing but rounding.
        shown: of each version the first images that are kept.
    """

    def __init__(
        self,
        held_out: HeldOut,
        codec: MultiScaleVQ,
        extractor: Extractor | None,
        *,
        batch_size: int,
        shown: int,
    ) -> None:
        assert held_out.images is not None
        self.held_out, self.codec, self.extractor = held_out, codec, extractor
        self.batch_size, self.shown = batch_size, min(shown, len(held_out.images))
        self.pictures = held_out.images
        self._reference: Observations | None = None

    def judge(self, version: Version) -> tuple[Row, list[Pixels]]:
        """Complete all images and compare them with the true ones.

        Returns:
            The version's cells; "accuracy", the share of the chosen tokens that are the true ones, None where none
            is chosen; "psnr" in dB against the pictures, a mean over images; with an extractor the Fréchet distance
            from the pictures under its own name, and of a classifier "class", the share of images whose class it
            finds. And the first images, [H, W, 3] uint8 each.
        """
        decibels: list[Tensor] = []
        tiles: list[Pixels] = []
        right = chosen = 0

        def completed() -> Iterator[Tensor]:
            nonlocal right, chosen
            for part in self._parts():
                tokens, mine = version.fill(part)  # [B, L] each
                right += int(((tokens.cpu() == self.held_out.tokens[part]) & mine.cpu()).sum())
                chosen += int(mine.sum())
                pixels = to_uint8(self.codec.decode_tokens(tokens))  # [B, H, W, 3]
                decibels.append(psnr(to_tensor(self.pictures[part]), to_tensor(pixels)))
                tiles.extend(pixels[: max(0, self.shown - part.start)])
                yield as_tensor(list(pixels))

        distances = self._look(completed(), version.label)
        numbers: Row = {
            "accuracy": right / chosen if chosen else None,
            "psnr": torch.cat(decibels).mean().item(),
        }
        return {**version.cells, **numbers, **distances}, tiles

    def _parts(self) -> Iterator[slice]:
        for start in range(0, len(self.pictures), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.pictures)))

    def _look(self, images: Iterator[Tensor], title: str) -> Row:
        """Go through images [B, 3, H, W] uint8; with an extractor, compare them with the pictures."""
        if self.extractor is None:
            with progress(title, len(self.pictures)) as bar:
                for batch in images:
                    bar.advance(len(batch))
            return {}
        if self._reference is None:
            true = (as_tensor(list(self.pictures[part])) for part in self._parts())
            self._reference = observe(
                true, self.extractor, count=len(self.pictures), name="originals", title="originals"
            )
        found = observe(
            images,
            self.extractor,
            count=len(self.pictures),
            labels=self.held_out.classes,
            name=title,
            title=title,
        )
        distance = measure(found, self._reference, ["fid"])["fid"]
        assert isinstance(distance, float)
        known: Row = {"class": found.right / found.count} if found.labelled else {}
        return {metric_name("fid", self.extractor, found.count): distance, **known}


def judge_all(bench: Bench, versions: Sequence[Version]) -> tuple[list[Row], dict[str, list[Pixels]]]:
    """Judge versions one after another: their rows, and the images to show by label, with the originals around."""
    rows, shown = [], {"original": list(bench.pictures[: bench.shown])}
    for version in versions:
        row, tiles = bench.judge(version)
        rows.append(row)
        shown[version.label] = tiles
    return rows, shown


def _panels(rows: Sequence[Row], chosen: str) -> dict[str, list[float | None]]:
    """What figures show: PSNR, accuracy of the `chosen` tokens and, where there is one, the Fréchet distance."""
    columns = {"PSNR, dB": ("psnr", 1.0), f"{chosen} tokens that are the true ones, %": ("accuracy", 100.0)}
    if name := next((key for key in rows[0] if key.startswith("FID")), None):
        columns[f"{name} from the true images"] = (name, 1.0)
    return {
        label: [None if row.get(key) is None else factor * float(row[key] or 0) for row in rows]
        for label, (key, factor) in columns.items()
    }


def known_scales_figure(rows: Sequence[Row], scales: Scales) -> "Figure":
    """Draw how close images come to the true ones as more scales are known, a line for each model (Fig. 17)."""
    panels = _panels(rows, "drawn")
    figure = new_figure(4.4 * len(panels), 3.8)
    for place, (label, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for model in dict.fromkeys(row["model"] for row in rows):
            points = [
                (int(row["known_scales"] or 0), value)
                for row, value in zip(rows, values, strict=True)
                if row["model"] == model and value is not None
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=model)
        dress_axes(axes, "", "known scales", label)
        axes.set_xticks(range(len(scales) + 1))
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle("images that start from the true tokens of the first scales (Fig. 17)", fontsize=9)
    return figure


def half_masked_figure(rows: Sequence[Row]) -> "Figure":
    """Draw how close reconstructions come to the true images, a bar for each version (Fig. 18)."""
    names = [
        str(row["model"]) if row["model"] == "tokenizer" else f"{row['model']}, {row['task']}" for row in rows
    ]
    colours = {"reconstruction": "#9aa0a6", "next-scale": "#5c7fbf", "masked": "#2a9d5c", "chance": "#c9b18a"}
    panels = {
        label: [[] if value is None else [value] for value in values]
        for label, values in _panels(rows, "chosen").items()
    }
    figure = bar_figure(names, panels, [colours[str(row["task"])] for row in rows])
    figure.suptitle("reconstruction from true coarser scales (Fig. 18)", fontsize=9)
    return figure
