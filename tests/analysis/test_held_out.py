"""Held-out images as tokens: which are read, by what, and what is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hmar_cli.analysis.held_out import (
    HeldOut,
    Subject,
    draw_held_out,
    load_msvq,
    load_subject,
    read_held_out,
    require_same_tokenizer,
    spread,
)
from hmar_cli.analysis.scales import predict
from hmar_cli.app import app
from hmar_cli.data.shapes import SHAPES
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import to_tensor
from hmar_cli.errors import UserError
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

Load = Callable[[str], Subject]


def test_images_are_spread_over_the_data() -> None:
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 0) == spread(3, 9) == [0, 1, 2]


def test_a_source_is_encoded(load: Load) -> None:
    codec, source = load("var").codec, open_source("builtin:shapes?seed=3&count=8", size=32)
    found = read_held_out(source.name, codec, count=4, batch_size=3, pictures=True)
    chosen = [source[i] for i in (0, 2, 4, 6)]
    pixels = np.stack([np.asarray(each.image) for each in chosen])
    assert found.images is not None and np.array_equal(found.images, pixels)
    assert torch.equal(found.tokens, codec.encode(to_tensor(pixels)))
    assert found.classes == tuple(source.class_names[each.label] for each in chosen)
    assert found.about["count"] == 4 and found.about["source"] == source.name
    assert found.labels(load("var").checkpoint).tolist() == [SHAPES.index(name) for name in found.classes]
    again = read_held_out(source.name, codec, count=4, batch_size=4)
    assert again.images is None and again.about["tokens_sha256"] == found.about["tokens_sha256"]
    other = read_held_out("builtin:shapes?seed=4&count=8", codec, count=4, batch_size=4)
    assert other.about["tokens_sha256"] != found.about["tokens_sha256"]


def test_a_cache_gives_the_tokens_of_its_images(models: Path, load: Load, tmp_path: Path) -> None:
    source, tokenizer = "builtin:shapes?seed=3&count=8", models / "tokenizers" / "var"
    flags = ("--recipe", "msvq-tiny", "--out", str(tmp_path / "cache"), "--device", "cpu")
    result = CliRunner().invoke(app, ["tokenize", source, "--tokenizer", str(tokenizer), *flags])
    assert result.exit_code == 0, result.output
    codec = load("var").codec
    cached = read_held_out(str(tmp_path / "cache"), codec, count=4, batch_size=2)
    encoded = read_held_out(source, codec, count=4, batch_size=8)
    assert torch.equal(cached.tokens, encoded.tokens) and cached.classes == encoded.classes
    with pytest.raises(UserError, match="holds no pictures"):
        read_held_out(str(tmp_path / "cache"), codec, count=4, batch_size=2, pictures=True)
    with torch.no_grad():
        other = load_subject(models / "var", "other", torch.device("cpu")).codec
        other.quantizer.codebook.weight.add_(1)
    with pytest.raises(UserError, match="was made by tokenizer"):
        read_held_out(str(tmp_path / "cache"), other, count=4, batch_size=2)


def test_images_that_cannot_be_read_are_left_out(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "circle"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no image that can be used"):
        read_held_out(str(tmp_path), load("var").codec, count=0, batch_size=2)
    Image.new("RGB", (40, 50), "red").save(folder / "b.png")
    found = read_held_out(str(tmp_path), load("var").codec, count=0, batch_size=2)
    assert len(found.tokens) == 1 and found.about["unreadable"] == 1
    assert "left out 1 images" in capsys.readouterr().err


def test_an_unknown_class_is_refused(load: Load, held_out: HeldOut) -> None:
    strange = HeldOut(held_out.tokens, (0,) * 7, ("zebra",), None, held_out.about)
    with pytest.raises(UserError, match="knows no class 'zebra'"):
        strange.labels(load("var").checkpoint)


def test_classes_of_one_name_keep_their_labels(load: Load, held_out: HeldOut) -> None:
    """ImageNet has two cranes: lists that are the same tell them apart, others cannot."""
    twins = ("crane", "green", "crane")
    checkpoint = dataclasses.replace(load("var").checkpoint, class_names=twins)
    found = dataclasses.replace(held_out, places=(0, 1, 2, 0, 1, 2, 0), class_names=twins)
    assert found.labels(checkpoint).tolist() == [0, 1, 2, 0, 1, 2, 0]
    other = dataclasses.replace(held_out, places=(1,) * 7, class_names=("crane", "green"))
    assert other.labels(checkpoint).tolist() == [1] * 7
    with pytest.raises(UserError, match="knows several classes 'crane'"):
        dataclasses.replace(other, places=(0,) * 7).labels(checkpoint)


def test_a_model_draws_the_same_images_in_any_batch(load: Load) -> None:
    one, two = (draw_held_out(load("hmar"), count=5, seed=3, batch_size=size) for size in (2, 5))
    assert torch.equal(one.tokens, two.tokens) and one.classes == SHAPES[:5]
    assert not torch.equal(one.tokens, draw_held_out(load("hmar"), count=5, seed=4, batch_size=5).tokens)


def test_attention_that_cannot_run_here_is_replaced(
    tmp_path: Path, held_out: HeldOut, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> None:
    small = ("model.depth=1", "model.width=64", "model.heads=2", "model.num_classes=8")
    save_random(tmp_path / "flex", load_recipe("hmar-tiny", (*small, "model.attention=flex")), SHAPES)
    subject = load_subject(tmp_path / "flex", "flex", torch.device("cpu"))
    labels = held_out.labels(subject.checkpoint)
    assert predict(subject, held_out.tokens, labels, None).isfinite().all()


def test_other_models_and_tokenizers_are_refused(
    models: Path,
    load: Load,
    tmp_path: Path,
    save_random: Callable[[Path, Recipe, tuple[str, ...]], None],
) -> None:
    small = ("model.encoder_depth=1", "model.decoder_depth=1", "model.width=16", "model.heads=2")
    recipe = load_recipe("mar-tiny", (*small, "model.num_classes=8", "tokenizer.latent_scale=0.5"))
    save_random(tmp_path / "mar", recipe, SHAPES)
    with pytest.raises(UserError, match="MAR or Hi-MAR"):
        load_subject(tmp_path / "mar", "mar", torch.device("cpu"))
    with pytest.raises(UserError, match="no codebook"):
        load_msvq(tmp_path / "mar")
    assert load_msvq(models / "var")[0].fingerprint() == load("var").fingerprint
    other = load("hmar")
    with torch.no_grad():
        other.codec.quantizer.codebook.weight.add_(1)
    with pytest.raises(UserError, match="var and hmar have different tokenizers"):
        require_same_tokenizer([load("var"), other])
