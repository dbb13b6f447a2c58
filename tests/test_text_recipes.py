"""The text-to-image recipes: what the paper says of its own, and that captions fit the built-in ones."""

import torch

from hmar_cli.builders import build_model
from hmar_cli.data.scenes import all_scenes
from hmar_cli.models.text import VOCABULARY, tokenize, tower_size
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import ClipText, JointText, MaskedAr, MaskedArObjective
from hmar_cli.training.schedules import learning_rate_factor


def test_the_coco_recipe_is_the_papers() -> None:
    recipe = load_recipe("himar-s-coco")
    assert isinstance(recipe.objective, MaskedArObjective) and isinstance(recipe.model, MaskedAr)
    assert (recipe.objective.pivot_masking, recipe.objective.dense_masking) == ("beta", "beta")
    assert (recipe.optim.weight_decay, recipe.train.ema, recipe.objective.label_drop) == (0.03, 0.9999, 0.1)
    peak = recipe.optim.base_lr * recipe.train.batch_size / 256
    rates = [learning_rate_factor(recipe.optim, step, recipe.train.steps) for step in (4000, 8000, 100_000)]
    assert abs(peak - 8e-4) < 1e-12 and [round(rate, 3) for rate in rates] == [0.5, 1.0, 1.0]
    assert recipe.text == ClipText(tower="ViT-L-14", weights="openai") and recipe.data.captions == 5
    assert (recipe.grid, recipe.pivot_grid) == ((16, 16), (8, 8))
    assert not recipe.data.mirror


def test_the_coco_model_is_of_u_vits_small_size() -> None:
    recipe = load_recipe("himar-s-coco")
    with torch.device("meta"):
        model = build_model(recipe)
    assert 44e6 < sum(parameter.numel() for parameter in model.parameters()) < 58e6
    context, width = tower_size("ViT-L-14")
    assert model.context(torch.empty(2, context, width, device="meta")).shape == (2, 77, 512)


def test_captions_of_scenes_fit() -> None:
    recipe = load_recipe("himar-scenes")
    assert isinstance(recipe.text, JointText) and not recipe.data.mirror
    ids = tokenize([str(scene) for scene in all_scenes()], recipe.text.context_length)
    assert (ids[:, -1] == 0).all() and ids.max() == VOCABULARY - 1  # each ends with its end token
    assert len(torch.unique(ids, dim=0)) == len(all_scenes())
    model = build_model(recipe)
    assert model.context(ids[:3]).shape == (3, 16, 384)
