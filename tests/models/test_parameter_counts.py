"""The recipes of published models have the sizes of the published checkpoints."""

import pytest
import torch

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.recipe import load_recipe, recipe_names
from hmar_cli.sizes import model_parameters

PUBLISHED = {
    "var-d16": 310_283_520,
    "var-d20": 600_917_136,
    "var-d24": 1_033_399_360,
    "var-d30": 2_010_020_356,
    "var-d36-512": 2_353_893_904,
    "hmar-d16": 310_283_520,
    "hmar-d16-masked": 467_691_904,
    "hmar-d20-masked": 845_517_872,
    "hmar-d24-masked": 1_384_328_960,
    "hmar-d30-masked": 2_556_324_212,
    "mar-b": 207_924_768,
    "mar-l": 478_326_304,
    "mar-h": 942_403_104,
    "himar-b": 244_468_016,
    "himar-l": 529_228_336,
    "himar-h": 1_090_572_592,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_transformer_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        assert count(build_model(load_recipe(name))) == PUBLISHED[name]


def test_a_tokenizer_has_the_published_size() -> None:
    with torch.device("meta"):
        assert count(build_tokenizer(load_recipe("msvq-256").tokenizer)) == 108_948_355
        assert count(build_tokenizer(load_recipe("kl-16").tokenizer)) == 66_456_019


@pytest.mark.parametrize(
    "name", [n for n in recipe_names() if not n.startswith(("msvq", "kl", "classifier"))]
)
def test_the_listed_size_is_the_built_one(name: str) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        assert count(build_model(recipe)) == model_parameters(recipe)
