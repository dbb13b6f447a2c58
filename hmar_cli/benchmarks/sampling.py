"""The speed of drawing images, from class labels to pixels, by the sampler itself."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hmar_cli.benchmarks.attention import failure, tidy
from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.errors import UserError
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.recipe import load_recipe
from hmar_cli.sampling.images import WARM_UPS, Job, Labels, Sampler, resolve_precision, select_attention
from hmar_cli.settings import Classifier, Recipe
from hmar_cli.tokenizers.kl import KlAutoencoder


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe of a model that draws classes.

    Raises:
        UserError: any other.
    """
    recipe = load_recipe(name, overrides)
    if recipe.model is None or isinstance(recipe.model, Classifier) or recipe.text is not None:
        raise UserError(f"{name} draws no images of classes", "give recipes such as hmar-d16 or himar-b")
    return recipe


def measure_sampling(
    recipes: Sequence[Recipe],
    batches: Sequence[int],
    *,
    device: torch.device,
    precision: str,
    compiled: Sequence[bool],
    seconds: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Time how long batches of images take with random weights, which take as long as trained ones.

    Args:
        recipes: of models that draw classes; their settings of the sampler hold.
        batches: images at once.
        device: where.
        precision: see `resolve_precision`.
        compiled: see `Job.compile`; plain first.
        seconds: about how long to time each, at least two batches.
        seed: of weights and images.

    Yields:
        A row, as JSON; its status is "ok", "out of memory" or "failed".
    """
    for recipe in recipes:
        torch.manual_seed(seed)
        model = build_model(recipe).eval()
        tokenizer = build_tokenizer(recipe.tokenizer).eval()
        if isinstance(tokenizer, KlAutoencoder):
            tokenizer.latent_scale = 1.0
        for compiles, batch in itertools.product(compiled, batches):
            job = Job(
                settings=recipe.sample,
                conditions=Labels(tuple(range(model.num_classes))),
                count=batch,
                seed=seed,
                batch_size=batch,
                precision=precision,
                compile=compiles,
            )
            row: dict[str, Any] = {
                "recipe": recipe.name,
                "batch": batch,
                "compiled": job.compiles(device),
                "status": "ok",
            }
            try:
                model, tokenizer = model.to(device), tokenizer.to(device)
                if isinstance(model, NextScaleTransformer):
                    row["attention"], _ = select_attention(model, job, resolve_precision(device, precision))
                row |= _time(Sampler(model, tokenizer, job, device), batch, device, seconds)
            except Exception as error:  # whatever one of them does, the others are measured
                row["status"], row["detail"] = failure(error)
            tidy(device)
            yield row
        del model, tokenizer
        tidy(device)


def _time(sampler: Sampler, batch: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """What to add to a row: the sampler waits for each batch, so that the wall clock tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    for number in itertools.count():
        start = time.perf_counter()
        sampler(range(number * batch, (number + 1) * batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
        if len(times) >= WARM_UPS + 2 and sum(times[WARM_UPS:]) > 1000 * seconds:
            break
    timed = np.array(times[WARM_UPS:])
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "median_ms": float(np.median(timed)),
        "p10_ms": float(np.quantile(timed, 0.1)),
        "p90_ms": float(np.quantile(timed, 0.9)),
        "repeats": len(timed),
        "first_ms": times[0],
        "images_per_second": 1000 * batch / float(np.median(timed)),
        "peak_gib": peak,
    }
