"""Pictures of a training run: drawn of what is finite, refused of what is not."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_runs import FAMILIES, TOKENIZER

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.data.sources import open_source
from hmar_cli.previews import IMAGES, reconstruction_preview, sample_preview
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe


def load(text: str, folder: Path) -> Recipe:
    (folder / "toy.toml").write_text(text)
    return load_recipe(str(folder / "toy.toml"))


def break_decoder(tokenizer: torch.nn.Module) -> None:
    """Let all that it decodes be NaN."""
    tokenizer.decoder.conv_out.bias.fill_(float("nan"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["hmar", "mar", "himar"])
def test_samples_that_are_not_finite_are_refused(family: str, tmp_path: Path) -> None:
    recipe = load(FAMILIES[family], tmp_path)
    model, tokenizer = build_model(recipe).eval(), build_tokenizer(recipe.tokenizer)
    draw = sample_preview(recipe, tokenizer, cache=None)  # only texts are read from it
    assert draw(model).size == (8 * 18 - 2, 2 * 18 - 2)  # of 16 px, 2 px apart
    break_decoder(tokenizer)
    with pytest.raises(FloatingPointError, match="the tokenizer's pictures are not finite"):
        draw(model)
    next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the model's (logits|latents) are not finite"):
        draw(model)


@torch.no_grad()
def test_images_that_cannot_be_used_are_not_shown(tmp_path: Path) -> None:
    for number in range(IMAGES + 1):
        (tmp_path / f"{number:02}.png").write_bytes(b"no picture")
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{90 + number}.png")
    recipe = load(TOKENIZER, tmp_path)
    draw = reconstruction_preview(recipe, open_source(str(tmp_path)))
    assert draw(build_tokenizer(recipe.tokenizer).eval()).size == (2 * 10 - 2, 2 * 10 - 2)


@torch.no_grad()
def test_reconstructions_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    recipe = load(TOKENIZER, tmp_path)
    tokenizer = build_tokenizer(recipe.tokenizer).eval()
    draw = reconstruction_preview(recipe, open_source("builtin:shapes?count=3", size=8))
    assert draw(tokenizer).size == (3 * 10 - 2, 2 * 10 - 2)
    break_decoder(tokenizer)
    with pytest.raises(FloatingPointError, match="the tokenizer's pictures are not finite"):
        draw(tokenizer)
