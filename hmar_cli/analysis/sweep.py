"""Quality over settings: many settings of one or several models, each drawn and measured by one judge.

Images are drawn, looked at and forgotten batch by batch; the reference is looked at once. What is measured of a trial
is kept in OUT/trials at once, under a name that stands for all that it depends on, so that a sweep which was stopped,
or is widened, measures only what is new.

Letters: B images of a batch, H W their rows and columns, S images that are shown.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hmar_cli.analysis.results import Cell, Row
from hmar_cli.builders import Model, Tokenizer, load_model
from hmar_cli.checkpoints.store import Checkpoint
from hmar_cli.data.transforms import Crop, Pixels
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.measures import HIGHER_IS_BETTER, metric_name
from hmar_cli.evaluation.observing import Observations, gather, observe
from hmar_cli.evaluation.reports import measure_all
from hmar_cli.files import read_json, write_json
from hmar_cli.launch import join_processes, wait_for_processes
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Side
from hmar_cli.report import save_png, to_uint8
from hmar_cli.sampling.images import Job, Sampler, resolve_precision, select_attention, steady

SECONDS, RATE = "s/image", "images/s"
"""Cells of a row that say how fast its images were drawn, without the time of measuring them."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model whose images are measured.

    Attributes:
        name: in tables and legends.
        checkpoint: where it lies.
        weights: "model" or "ema"; "" for the latter where it exists.
        tokenizer: where that lies; None for the one that the checkpoint carries.
    """

    name: str
    checkpoint: Checkpoint
    weights: str = ""
    tokenizer: Path | None = None

    @cached_property
    def about(self) -> dict[str, Any]:
        """The model, for the record.

        Raises:
            UserError: the checkpoint has no such weights.
        """
        return {"name": self.name, **self.checkpoint.describe(self.weights)}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A setting of a model, to be measured.

    Attributes:
        candidate: the model.
        varied: which setting differs from those that the model has otherwise; empty for none.
        value: its value.
        job: what is drawn.
        labels: class names of the images, in turn; none where they have no classes.
    """

    candidate: Candidate
    varied: str
    value: Cell
    job: Job
    labels: tuple[str, ...] = ()

    @property
    def start(self) -> dict[str, Cell]:
        """What its row begins with."""
        return {"model": self.candidate.name, "varied": self.varied, "value": self.value}

    @property
    def title(self) -> str:
        """The trial in a few words."""
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return f"{self.candidate.name}, {self.varied} {value}" if self.varied else self.candidate.name


@dataclass(frozen=True, kw_only=True)
class Judge:
    """By what all trials of a sweep are measured.

    Attributes:
        extractor: the network that looks at images.
        metrics: of `hmar_cli.evaluation.measures.METRICS`.
        reference: what was found in the real images; None where no metric needs them.
        size: to which images are cut, in pixels; None for what the extractor wants.
        crop: how.
    """

    extractor: Extractor
    metrics: tuple[str, ...]
    reference: Observations | None
    size: Side | None = None
    crop: Crop = "adm"

    def describe(self) -> dict[str, Any]:
        """All that numbers depend on besides the images."""
        return {
            "extractor": self.extractor.describe(),
            "metrics": self.metrics,
            "reference": self.reference.describe() if self.reference else None,
            "size": self.size,
            "crop": self.crop,
        }

    def columns(self, count: int) -> dict[str, str]:
        """The names of the metrics of `count` images, and which direction is better."""
        directions = {True: "higher is better", False: "lower is better"}
        return {
            metric_name(metric, self.extractor, count): directions[metric in HIGHER_IS_BETTER]
            for metric in self.metrics
        }

    def cells(self, found: Observations) -> dict[str, Cell]:
        """The numbers of images under their full names, such as "FID-50k" or "IS[classifier-cifar10]-2k"."""
        cells: dict[str, Cell] = {}
        for number in measure_all(found, self.reference, self.metrics).values():
            cells[number.name] = number.value
            if number.spread is not None:
                cells[f"{number.name} ±"] = number.spread
        return cells


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial: the trial.
        cells: its numbers by their names.
        shown: its first images, [S, H, W, 3].
        about: all that the numbers depend on, for the record.
    """

    trial: Trial
    cells: dict[str, Cell]
    shown: Pixels
    about: dict[str, Any]

    @property
    def row(self) -> Row:
        """The outcome as a table has it."""
        return {**self.trial.start, **self.cells}


def sweep(
    trials: Sequence[Trial], judge: Judge, out: Path, *, device: str = "", shown: int = 8
) -> list[Outcome]:
    """Draw and measure the images of trials, in their order; a bar shows how far each is.

    Several processes share the images of each trial; the numbers are those of one process.

    Args:
        trials: the settings; two that come to the same are measured once. Those of a model should lie together, as
            one model is held at a time.
        judge: what measures them.
        out: folder of the analysis; what was measured is kept in its folder "trials".
        device: "cpu", "cuda" or "" for a GPU where there is one.
        shown: of the first images of each trial that are kept, as the judge sees them.

    Returns:
        One outcome a trial, in every process.

    Raises:
        UserError: weights that are broken, and whatever `measure` refuses.
    """
    place, rank, world = join_processes(device)
    painter: Painter | None = None
    outcomes = []
    for number, trial in enumerate(trials, start=1):
        about = record(trial, judge, place, shown)
        kept = Kept.of(out / "trials", about)
        there = kept.path.exists()
        wait_for_processes()  # all have seen whether it is there before it may come
        if not there:
            if painter is None or painter.candidate is not trial.candidate:
                painter = None  # its memory is free before the next model is loaded
                painter = Painter.load(trial.candidate, place)
            title = f"{trial.title} ({number} of {len(trials)})"
            cells, tiles = measure_trial(painter, trial, judge, shown, title, (rank, world))
            if rank == 0:
                kept.save(cells, tiles)
            wait_for_processes()
        outcomes.append(Outcome(trial, *kept.read(), about))
    return outcomes


def record(trial: Trial, judge: Judge, device: torch.device, shown: int) -> dict[str, Any]:
    """All that the numbers, the speed and the shown images of a trial depend on, as JSON values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    about = {
        "weights_sha256": trial.candidate.about["weights_sha256"],
        "tokenizer": trial.candidate.checkpoint.tokenizer_hash or str(trial.candidate.tokenizer),
        **trial.job.describe(),
        "precision": resolve_precision(device, trial.job.precision),
        "compile": trial.job.compiles(device),
        "batch_size": trial.job.batch_size,
        "device": name,
        "judge": judge.describe(),
        "shown": shown,
    }
    plain: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return plain


@dataclass(frozen=True)
class Kept:
    """Where the numbers and the first images of a trial are kept: KEY.json and KEY.png; the first is written last."""

    path: Path
    about: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, about: dict[str, Any]) -> "Kept":
        """The place for what all of `about` led to."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return cls(folder / f"{digest[:16]}.json", about)

    def save(self, cells: dict[str, Cell], shown: Pixels) -> None:
        """Keep the numbers, and images [S, H, W, 3] as one picture, side by side."""
        save_png(Image.fromarray(np.concatenate(list(shown), axis=1)), self.path.with_suffix(".png"))
        write_json(self.path, {"cells": cells, "images": len(shown), "about": self.about})

    def read(self) -> tuple[dict[str, Cell], Pixels]:
        """The numbers and the images [S, H, W, 3] again.

        Raises:
            UserError: the file is broken.
        """
        try:
            found = read_json(self.path)
            with Image.open(self.path.with_suffix(".png")) as strip:
                tiles = np.split(np.asarray(strip), found["images"], axis=1)
            return dict(found["cells"]), np.stack(tiles)
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path} is broken: {error}", "delete it: what it held is measured again"
            ) from error


@dataclass
class Painter:
    """A model that draws on a device, and how long it took; seconds are those of full batches."""

    candidate: Candidate
    model: Model
    tokenizer: Tokenizer
    device: torch.device
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def load(cls, candidate: Candidate, device: torch.device) -> "Painter":
        """Load a model and its tokenizer.

        Raises:
            UserError: see `load_model`.
        """
        model, tokenizer, _ = load_model(candidate.checkpoint.folder, candidate.weights, candidate.tokenizer)
        return cls(candidate, model.to(device), tokenizer.to(device), device)

    def draw(self, job: Job, share: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:
        """Yield the images of a job, uint8 [B, 3, H, W] on the CPU, and note how long each full batch took.

        Args:
            job: what is drawn.
            share: this process and how many there are. Batches of the others come as [B, 3, 1, 1], undrawn: `observe`
                with the same share only counts them.
        """
        if isinstance(self.model, NextScaleTransformer):
            select_attention(self.model, job, resolve_precision(self.device, job.precision))
        sampler = Sampler(self.model, self.tokenizer, job, self.device)
        self.seconds.clear()
        for number, first in enumerate(range(0, job.count, job.batch_size)):
            indices = range(first, min(first + job.batch_size, job.count))
            if number % share[1] != share[0]:
                yield torch.zeros(len(indices), 3, 1, 1, dtype=torch.uint8)
                continue
            start = time.perf_counter()
            images, _ = sampler(indices)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            if len(indices) == full_batch(job):
                self.seconds.append(time.perf_counter() - start)
            yield torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)  # B H W 3 -> B 3 H W

    def speed(self, job: Job) -> dict[str, Cell]:
        """Seconds an image and its inverse, of this process alone, as `steady` has it of full batches.

        Of one or two that is the last, which may have loaded, compiled or recorded; of none it is None.
        """
        if not self.seconds:
            return {SECONDS: None, RATE: None}
        seconds = steady(self.seconds) / full_batch(job)
        return {SECONDS: seconds, RATE: 1 / seconds}


def full_batch(job: Job) -> int:
    """Images of every batch of a job but the last."""
    return min(job.batch_size, job.count)


def measure_trial(
    painter: Painter, trial: Trial, judge: Judge, shown: int, title: str, share: tuple[int, int] = (0, 1)
) -> tuple[dict[str, Cell], Pixels]:
    """Draw and measure one trial: its numbers, and its first images [S, H, W, 3] as the judge sees them."""
    found = observe(
        painter.draw(trial.job, share),
        judge.extractor,
        metrics=judge.metrics,
        size=judge.size,
        crop=judge.crop,
        count=trial.job.count,
        labels=trial.labels or None,
        shown=shown,
        name=trial.title,
        title=title,
        share=share,
    )
    whole = gather(found)
    return {**judge.cells(whole), **painter.speed(trial.job)}, np.stack(whole.shown)
