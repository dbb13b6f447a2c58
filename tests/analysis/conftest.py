"""Small random next-scale models, and images as their tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hmar_cli.analysis.held_out import HeldOut, Subject, load_subject, read_held_out
from hmar_cli.data.shapes import SHAPES
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import MaskedObjective, Recipe

SMALL = ("model.depth=2", "model.width=64", "model.heads=2", "model.num_classes=8")
SHIPPED = {
    "var": "var-tiny",
    "hmar": "hmar-tiny",
    "masked": "hmar-tiny-masked",
    "leak-free": "hmar-tiny-masked",
}


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> Path:
    """A folder with random checkpoints of one tokenizer: var, hmar, masked, leak-free."""
    folder = tmp_path_factory.mktemp("models")
    for name, shipped in SHIPPED.items():
        recipe = load_recipe(shipped, SMALL)
        if isinstance(recipe.objective, MaskedObjective):
            objective = replace(recipe.objective, layers=1, leak_free=name == "leak-free")
            recipe = replace(recipe, objective=objective)
        save_random(folder / name, recipe, SHAPES)
    return folder


@pytest.fixture(scope="session")
def load(models: Path) -> Callable[[str], Subject]:
    """Loads one of the models."""
    return lambda name: load_subject(models / name, name, torch.device("cpu"))


@pytest.fixture(scope="session")
def held_out(load: Callable[[str], Subject]) -> HeldOut:
    """Seven drawn shapes, with their pictures."""
    source = "builtin:shapes?seed=3&count=7"
    return read_held_out(source, load("var").codec, count=0, batch_size=4, pictures=True)
