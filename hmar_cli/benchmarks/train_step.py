"""The speed of whole training steps: forward, loss, backward, clipping and AdamW, by the trainer itself.

Letters: B batch, L tokens.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from hmar_cli.benchmarks.attention import failure, say, tidy
from hmar_cli.benchmarks.cases import RESOLUTIONS, Case
from hmar_cli.benchmarks.correctness import Judge, attend, reason_against
from hmar_cli.benchmarks.timing import time_calls
from hmar_cli.builders import build_model, build_objective, build_tokenizer
from hmar_cli.errors import UserError
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Attention, Msvq, NextScale, Recipe
from hmar_cli.training.trainer import Batch, Trainer

IMAGES = 1_000_000
"""Taken for the length of an epoch; it only sets the schedules."""
DEFAULT_BATCH = {256: 32, 512: 8, 1024: 2}
OTHER_BATCH = 16
STEPS = 3
"""Batches that take turns."""


def load(name: str) -> Recipe:
    """Load a recipe that trains a next-scale model.

    Raises:
        UserError: any other.
    """
    recipe = load_recipe(name)
    if not isinstance(recipe.model, NextScale) or recipe.objective.kind != "next-scale":
        raise UserError(
            f"--train-step {name}: it trains no next-scale model",
            "give recipes such as hmar-d16, var-d16 or hmar-d24-512",
        )
    return recipe


def default_batch(recipe: Recipe) -> int:
    """The batch that is measured when none is given: one that 80 GiB hold."""
    known = {sides: pixels for pixels, sides in RESOLUTIONS.items()}
    pixels = known.get(tuple(h for h, w in recipe.scales.grids if h == w), 0)
    return DEFAULT_BATCH.get(pixels, OTHER_BATCH)


def measure_steps(
    recipes: Sequence[Recipe],
    implementations: Sequence[str],
    *,
    device: torch.device,
    batch: int,
    compiled: bool | None,
    seconds: float,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Check and time a training step of each recipe with each implementation, on random tokens.

    Args:
        recipes: of next-scale models.
        implementations: names of `hmar_kernels.IMPLEMENTATIONS`.
        device: where.
        batch: B; 0 is `default_batch`.
        compiled: compile the model; None is as the recipe says.
        seconds: about how long to time each.
        seed: of weights and tokens.

    Yields:
        A row, as JSON; its status is "ok", "wrong", "unavailable", "out of memory" or "failed".
    """
    for recipe, name in itertools.product(recipes, implementations):
        images = batch or default_batch(recipe)
        compiles = recipe.train.compile if compiled is None else compiled
        row: dict[str, Any] = {
            "recipe": recipe.name,
            "implementation": name,
            "batch": images,
            "length": recipe.scales.total,
            "compiled": compiles,
            "status": "ok",
            "detail": "",
        }
        try:
            row |= _measure_one(_prepared(recipe, name, images, compiles, seed), name, device, seconds, seed)
        except Exception as error:  # whatever one of them does, the others are measured
            row["status"], row["detail"] = failure(error)
        torch._dynamo.reset()
        tidy(device)
        yield row


def _prepared(recipe: Recipe, implementation: str, batch: int, compiles: bool, seed: int) -> Recipe:
    """The recipe for one measurement: no averages, no accumulation."""
    assert isinstance(recipe.model, NextScale)
    train = replace(recipe.train, batch_size=batch, accumulate=1, ema=0.0, compile=compiles, seed=seed)
    return replace(
        recipe, train=train, model=replace(recipe.model, attention=cast(Attention, implementation))
    )


def _case(recipe: Recipe, dtype: str) -> Case:
    """The attention of a recipe's model, for one image."""
    assert isinstance(recipe.model, NextScale)
    return Case(
        name=recipe.name,
        scales=recipe.scales,
        pattern=recipe.model.pattern,
        dtype=dtype,
        batch=1,
        heads=recipe.model.heads,
        head_size=recipe.model.width // recipe.model.heads,
        normalised=True,
    )


def _measure_one(
    recipe: Recipe, implementation: str, device: torch.device, seconds: float, seed: int
) -> dict[str, Any]:
    """What to add to the row of one recipe and implementation."""
    precision = recipe.train.precision
    dtype = "bf16" if precision == "bf16" or (precision == "auto" and device.type == "cuda") else "fp32"
    case = _case(recipe, dtype)
    if reason := reason_against(case, implementation, device):
        return {"status": "unavailable", "detail": reason}
    judge = Judge(case, device, seed)
    findings = judge.check(lambda qkv, head_scale: attend(case, implementation, qkv, head_scale))
    wrong = [finding for finding in findings if not finding.share <= 1]
    if wrong:
        return {"status": "wrong", "detail": "; ".join(map(say, wrong))}
    del judge
    trainer, stream = _trainer(recipe, device, seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    (timing,) = time_calls(lambda _: [lambda: trainer.train_step(stream)], device, seconds, ahead=False)
    trainer.check()
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "dtype": dtype,
        "median_ms": timing.median,
        "p10_ms": timing.p10,
        "p90_ms": timing.p90,
        "repeats": timing.repeats,
        "host_ms": timing.host,
        "images_per_second": recipe.train.batch_size / timing.median * 1000,
        "peak_gib": peak,
    }


def _trainer(recipe: Recipe, device: torch.device, seed: int) -> tuple[Trainer, Iterator[Batch]]:
    """A trainer with new weights, and endless batches of random tokens on the device."""
    assert isinstance(recipe.model, NextScale) and isinstance(recipe.tokenizer, Msvq)
    torch.manual_seed(seed)
    with torch.device(device):
        objective = build_objective(recipe, build_tokenizer(recipe.tokenizer), build_model(recipe))
    trainer = Trainer(objective, recipe, IMAGES, device.type)
    generator = torch.Generator(device).manual_seed(seed)
    size, vocab, classes = recipe.train.batch_size, recipe.tokenizer.vocab_size, recipe.model.num_classes

    def draw(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, device=device, generator=generator)

    batches = [
        {"tokens": draw(vocab, size, recipe.scales.total), "label": draw(classes, size)} for _ in range(STEPS)
    ]
    return trainer, (dict(batch) for batch in itertools.cycle(batches))
