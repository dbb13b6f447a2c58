import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import Classes
from test_cache import contents
from test_tokenize import hmar, start, summary_of

from hmar_cli.builders import build_tokenizer, find_tokenizer, load_tokenizer
from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.data.cache import Cache
from hmar_cli.data.encoders import moment_encoder
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import image_transform, shrink, to_tensor
from hmar_cli.errors import UserError
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Kl
from hmar_cli.tokenizers.kl import KlAutoencoder, sample_posterior

RECIPE = """
name = "toy-kl"
[data]
source = "builtin:shapes?count=10"
size = 16
pivot_size = 8
mirror = false
[tokenizer]
kind = "kl"
channels = 32
multipliers = [1, 1, 1]
res_blocks = 1
z_channels = 4
[objective]
kind = "kl"
perceptual = "none"
"""
TEXT = """
[text]
kind = "joint"
context_length = 12
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy recipe, the same with captions, and a checkpoint of a random tokenizer without latent scale."""
    folder = tmp_path_factory.mktemp("kl")
    (folder / "toy.toml").write_text(RECIPE)
    (folder / "texts.toml").write_text(RECIPE.replace("[tokenizer]", "captions = 3\n[tokenizer]") + TEXT)
    recipe = load_recipe(str(folder / "toy.toml"))
    torch.manual_seed(0)
    model = build_tokenizer(recipe.tokenizer)
    save_checkpoint(
        folder / "kl" / "step-00000001",
        recipe=recipe,
        weights={"model": model.state_dict()},
        class_names=(),
        step=1,
        tokenizer=None,
        tokenizer_hash=model.fingerprint(),
    )
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> Path:
    return folder / "kl"


def pictures(count: int) -> np.ndarray:
    """The central crops that are encoded, (count, 16, 16, 3)."""
    source = open_source(f"builtin:shapes?count={count}", size=16)
    cut = image_transform(16, "adm", train=False)
    return np.stack([cut(source[i].image) for i in range(count)])  # type: ignore[arg-type]


def latent_scale_of(path: Path) -> float:
    settings = find_tokenizer(path).recipe.tokenizer
    assert isinstance(settings, Kl)
    return settings.latent_scale


def kl(path: Path) -> KlAutoencoder:
    model = load_tokenizer(path)
    assert isinstance(model, KlAutoencoder)
    return model


def test_a_cache_holds_the_moments_of_both_sizes_and_their_mirrors(tokenizer: Path, tmp_path: Path) -> None:
    options = ("--set", "data.mirror=true", "--shard-size", 8, "--batch-size", 4, "--verify", "--json")
    out = tmp_path / "c"
    summary = summary_of(
        hmar("tokenize", "builtin:shapes?count=13", "--tokenizer", tokenizer, "--out", out, *options)
    )
    assert (summary["kind"], summary["images"], summary["views"], summary["tokens"]) == ("moments", 13, 2, 16)
    assert summary["shapes"] == {"moments": [8, 4, 4], "pivot_moments": [8, 2, 2]}
    assert summary["verified"]["arrays"] == {"moments": 1.0, "pivot_moments": 1.0}
    cache = Cache.open(out)
    assert (cache.manifest.kind, cache.manifest.scales, cache.manifest.vocab_size) == ("moments", [], 0)
    assert (cache.manifest.size, cache.manifest.pivot_size) == ([16, 16], [8, 8])
    assert (cache.manifest.text, cache.manifest.captions, cache.manifest.captioned) == ("", 0, True)
    model, pixels = kl(tokenizer), pictures(13)
    both = np.stack([pixels, pixels[:, :, ::-1]], axis=1).reshape(26, 16, 16, 3)
    every = np.arange(13).repeat(2), np.tile([0, 1], 13)
    for name, images in (("moments", both), ("pivot_moments", shrink(both, (8, 8)))):
        with torch.inference_mode():
            expected = torch.cat([model.moments(to_tensor(images[i : i + 4])) for i in range(0, 26, 4)])
        np.testing.assert_array_equal(cache.fetch(name, *every), expected.half().numpy())


def test_a_new_tokenizer_has_its_latent_scale_measured(tokenizer: Path, tmp_path: Path) -> None:
    arguments = ("tokenize", "builtin:shapes?count=30", "--tokenizer", tokenizer, "--out", tmp_path / "c")
    result = hmar(*arguments, "--batch-size", 7)
    assert result.exit_code == 0, result.stderr
    cache = Cache.open(tmp_path / "c")
    scale = cache.manifest.latent_scale
    assert scale == latent_scale_of(tmp_path / "c") == kl(tmp_path / "c").latent_scale
    assert latent_scale_of(tokenizer) == 0
    assert f"measured the latent scale: {scale:g}" in result.stderr
    assert f"moments 8 x 4 x 4, pivot_moments 8 x 2 x 2; latent scale {scale:g}" in result.stdout
    # latents drawn with other noise, and scaled, have the deviation 1: 30 images x 64 numbers
    rows = np.arange(30)
    moments = torch.from_numpy(cache.fetch("moments", rows, np.zeros_like(rows))).float()
    noise = torch.randn(30, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    assert scale is not None
    assert abs(float(sample_posterior(moments, noise).std()) * scale - 1) < 0.02
    assert float(f"{scale:.4g}") == scale
    other = hmar(*arguments[:-1], tmp_path / "d", "--batch-size", 5)
    assert other.exit_code == 0  # the measurement does not depend on the batch size
    assert Cache.open(tmp_path / "d").manifest.latent_scale == pytest.approx(scale, rel=2e-4)


def test_a_known_latent_scale_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    hmar("tokenize", "builtin:shapes?count=9", "--tokenizer", tokenizer, "--out", tmp_path / "c")
    scale = latent_scale_of(tmp_path / "c")
    result = hmar(
        "tokenize", "builtin:scenes?count=7", "--tokenizer", tmp_path / "c", "--out", tmp_path / "d", "--json"
    )
    assert summary_of(result)["latent_scale"] == scale == latent_scale_of(tmp_path / "d")
    assert "measured" not in result.stderr
    again = hmar("tokenize", "builtin:scenes?count=7", "--tokenizer", tokenizer, "--out", tmp_path / "e")
    assert again.exit_code == 0 and latent_scale_of(tmp_path / "e") != scale


def test_a_repeated_command_takes_the_scale_that_was_measured(tokenizer: Path, tmp_path: Path) -> None:
    arguments = ("tokenize", "builtin:shapes?count=9", "--tokenizer", tokenizer, "--out", tmp_path / "c")
    arguments = (*arguments, "--shard-size", 4)
    assert hmar(*arguments).exit_code == 0
    whole = contents(tmp_path / "c")
    (tmp_path / "c/shards/shard-00001.moments.npy").unlink()
    (tmp_path / "c/manifest.json").unlink()
    again = hmar(*arguments)
    assert "encoded 4 images" in again.stdout and "measured" not in again.stderr
    assert contents(tmp_path / "c") == whole
    other = hmar(*arguments, "--set", "data.pivot_size=4")
    assert other.exit_code == 2 and "other settings (pivot_size)" in other.stderr


def test_dry_run_measures_and_writes_nothing(tokenizer: Path, tmp_path: Path) -> None:
    arguments = ("tokenize", "builtin:shapes?count=9", "--tokenizer", tokenizer, "--out", tmp_path / "c")
    shown = hmar(*arguments, "--dry-run")
    assert "latent scale not known yet, to be measured" in shown.stdout
    plan = summary_of(hmar(*arguments, "--dry-run", "--json"))
    assert (plan["latent_scale"], plan["bytes"]) == (None, 9 * 8 * (16 + 4) * 2)
    assert not (tmp_path / "c").exists()


def test_two_processes_measure_once_and_make_the_same_cache(tokenizer: Path, tmp_path: Path) -> None:
    arguments = ("tokenize", "builtin:shapes?count=12", "--tokenizer", tokenizer, "--shard-size", 4)
    arguments = (*arguments, "--device", "cpu", "--batch-size", 4)
    assert hmar(*arguments, "--out", tmp_path / "one").exit_code == 0
    both = start(*arguments, "--out", tmp_path / "both", "--launch", 2)
    _, errors = both.communicate(timeout=120)
    assert both.returncode == 0, errors
    assert errors.count("measured the latent scale") == 1
    assert contents(tmp_path / "both") == contents(tmp_path / "one")


def test_non_square_images_without_pivots(tokenizer: Path, tmp_path: Path) -> None:
    recipe = RECIPE.replace("size = 16\npivot_size = 8", "size = [8, 24]")
    (tmp_path / "wide.toml").write_text(recipe)
    arguments = ("--recipe", tmp_path / "wide.toml", "--tokenizer", tokenizer, "--out", tmp_path / "c")
    summary = summary_of(hmar("tokenize", *arguments, "--limit", 5, "--json"))
    assert summary["shapes"] == {"moments": [8, 2, 6]}
    assert Cache.open(tmp_path / "c").manifest.pivot_size is None


def test_captions_are_encoded_in_turn(
    folder: Path, tokenizer: Path, tmp_path: Path, make_parquet: Callable[..., Path]
) -> None:
    from hmar_cli.models.text import tokenize

    texts = [["a fox", "two foxes"], ["one", "two", "three", "four"], [], ["same"]]
    path = make_parquet(count=4, label=Classes(["a", "b"], [0, 1, 0, 1]), captions=texts)
    arguments = ("tokenize", path, "--recipe", folder / "texts.toml", "--tokenizer", tokenizer)
    plan = hmar(*arguments, "--out", tmp_path / "c", "--dry-run")
    assert "captions: 3 an image, encoded as ids:12" in plan.stdout
    summary = summary_of(hmar(*arguments, "--out", tmp_path / "c", "--verify", "--json"))
    assert (summary["captions"], summary["text"], summary["verified"]["arrays"]["text"]) == (3, "ids:12", 1.0)
    cache = Cache.open(tmp_path / "c")
    assert cache.manifest.arrays["text"] == {"dtype": "uint16", "shape": [12], "per": "caption"}
    assert cache.captions(np.arange(4)) == [tuple(each) for each in texts]
    wanted = [
        *("a fox", "two foxes", "a fox"),
        *("one", "two", "three"),
        *("", "", ""),
        *("same", "same", "same"),
    ]
    stored = cache.fetch("text", np.arange(4).repeat(3), np.tile([0, 1, 2], 4))
    np.testing.assert_array_equal(stored, tokenize(wanted, 12).numpy())
    with pytest.raises(IndexError, match="each caption in"):
        cache.fetch("text", np.array([0]), np.array([3]))
    with pytest.raises(IndexError, match="each view in"):
        cache.fetch("moments", np.array([0]), np.array([1]))


def test_embeddings_of_captions(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    from hmar_cli.data.encoding import Options, Work, encode_source, settings_for

    def embed(captions: list[str]) -> np.ndarray:
        lengths = np.array([len(each) for each in captions], np.float16)
        return lengths[:, None, None] + np.arange(6, dtype=np.float16).reshape(2, 3)

    source = open_source("builtin:scenes?count=5", size=16)
    data = load_recipe(str(folder / "texts.toml")).data
    settings = settings_for(
        source, kl(tokenizer), data, limit=0, shard_size=0, seed=0, text="clip:toy:weights"
    )
    assert settings.shard_size == 2048  # three captions of 77 x 1024 numbers stay below 1 GiB
    work = Work(
        source=source,
        tokenizer=kl(tokenizer),
        settings=settings,
        out=tmp_path / "c",
        options=Options(device="cpu", verify=True),
        carry=lambda path, scale: path.mkdir(),
        workers=1,
        text=lambda device: embed,
    )
    summary = encode_source(work)
    assert summary is not None and summary["verified"]["arrays"]["text"] == 1.0
    cache = Cache.open(tmp_path / "c")
    (row,) = cache.fetch("text", np.array([3]), np.array([2]))
    np.testing.assert_array_equal(row, embed([source[3].caption])[0])
    changed = replace(work, text=lambda device: lambda captions: embed(captions) + 1)
    with pytest.raises(UserError, match=r"only 0\.0% of the text are as cached"):
        encode_source(changed)


def test_verification_allows_what_rounding_changes_and_no_more(tokenizer: Path, tmp_path: Path) -> None:
    arguments = ("tokenize", "--tokenizer", tokenizer, "--out", tmp_path / "c")
    assert hmar(*arguments).exit_code == 0
    file = tmp_path / "c/shards/shard-00000.pivot_moments.npy"
    right = np.load(file)
    for shift, fine in ((0.004, True), (0.5, False)):
        np.save(file, (right + np.float16(shift)).astype(np.float16))
        rehash(tmp_path / "c", file)
        result = hmar(*arguments, "--verify")
        assert (result.exit_code == 0) is fine
    assert "of the pivot_moments are as cached" in result.stderr


def rehash(cache: Path, file: Path) -> None:
    """Make a changed file's checksum that of the cache."""
    from hmar_cli.files import file_sha256

    record = json.loads((cache / "shards/shard-00000.json").read_text())
    old = record["files"][file.name]["sha256"]
    for path in (cache / "manifest.json", cache / "shards/shard-00000.json"):
        path.write_text(path.read_text().replace(old, file_sha256(file)))


def test_numbers_that_are_not_finite_are_named() -> None:
    torch.manual_seed(0)
    model = KlAutoencoder(channels=32, multipliers=[1, 1], res_blocks=1, z_channels=4)
    encode = moment_encoder(model, None, torch.device("cpu"))
    assert encode(np.zeros((1, 8, 8, 3), np.uint8))["moments"].dtype == np.float16
    with torch.no_grad():
        model.quant_conv.bias[0] = math.nan  # type: ignore[index]
    with pytest.raises(UserError, match="not finite"):
        encode(np.zeros((1, 8, 8, 3), np.uint8))


def test_mistakes(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    def message(*arguments: object) -> str:
        result = hmar("tokenize", *arguments, "--tokenizer", tokenizer, "--out", tmp_path / "c")
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr and result.stdout == ""
        return result.stderr

    assert "tokenizer.kind msvq" in message("--recipe", "var-d16")
    other = folder / "other.toml"
    other.write_text(RECIPE.replace("z_channels = 4", "z_channels = 8"))
    assert "has tokenizer.z_channels 8" in message("--recipe", other)
    other.write_text(RECIPE.replace("[1, 1, 1]", "[1, 1]"))
    assert "has stride 2" in message("--recipe", other)
    assert "data.size" in message("--set", "data.size=18")
    photos = tmp_path / "photos"
    photos.mkdir()
    open_source("builtin:shapes?count=1", size=16)[0].image.save(photos / "a.png")  # type: ignore[union-attr]
    text = message(photos, "--recipe", folder / "texts.toml")
    assert "needs captions" in text and "caption=NAME" in text
