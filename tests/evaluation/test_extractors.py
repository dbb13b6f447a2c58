"""Every spelling of an extractor, what it gives, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_extractors import CLASSES, FEATURES, Pooled, Toy, pictures, toy_extractor

from hmar_cli.builders import build_image_network
from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.data.transforms import to_tensor
from hmar_cli.errors import UserError
from hmar_cli.evaluation.extractors import Extractor, Features, open_extractor
from hmar_cli.recipe import load_recipe
from hmar_cli.tokenizers.blocks import hash_weights

CLASSIFIER = """
name = "toy-judge"
[data]
source = "builtin:shapes?count=32"
size = 8
[model]
kind = "classifier"
channels = 8
multipliers = [1, 2]
res_blocks = 1
num_classes = 3
[objective]
kind = "classifier"
"""


def images(count: int = 3, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.from_numpy(pictures(count, size)).permute(0, 3, 1, 2)


def refused(spec: str, *words: str, weights: Path | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        open_extractor(spec, weights=weights)
    for word in words:
        assert word in f"{caught.value} {caught.value.hint}"
    assert caught.value.hint and "\n" not in str(caught.value)
    return caught.value


def classifier(folder: Path, weights: tuple[str, ...] = ("model",)) -> tuple[Path, Any]:
    recipe_file = folder / "toy-judge.toml"
    recipe_file.write_text(CLASSIFIER)
    recipe = load_recipe(str(recipe_file))
    made = {}
    for seed, name in enumerate(weights):
        torch.manual_seed(seed)
        network = build_image_network(recipe)
        torch.nn.init.normal_(network.head.weight)  # type: ignore[union-attr, arg-type]
        made[name] = network
    save_checkpoint(
        folder / "run" / "step-00000001",
        recipe=recipe,
        weights={name: network.state_dict() for name, network in made.items()},
        class_names=("circle", "square", "star"),
        step=1,
        tokenizer=None,
        tokenizer_hash=hash_weights(made[weights[-1]].state_dict(), b"classifier"),
    )
    return folder / "run", made[weights[-1]]


def test_a_classifier_of_the_project(tmp_path: Path) -> None:
    run, network = classifier(tmp_path, ("model", "ema"))
    extractor = open_extractor(str(run))
    assert (extractor.name, extractor.size, extractor.standard) == ("toy-judge", 8, False)
    assert extractor.class_names == ("circle", "square", "star")
    pixels = images()
    found = extractor(pixels)
    expected = network.eval().features(to_tensor(pixels.permute(0, 2, 3, 1)))
    assert torch.equal(found.pooled, expected) and found.spatial is None
    assert found.logits is not None and torch.equal(found.logits, network.head(expected))
    about = extractor.describe()
    assert about["fingerprint"] == extractor.fingerprint == hash_weights(network.state_dict(), b"classifier")
    assert (about["size"], about["weights"], about["features"]) == ([8, 8], "ema", 16)
    json.dumps(about)


def test_a_torchscript_file(tmp_path: Path) -> None:
    path = tmp_path / "toy.pt"
    torch.jit.save(torch.jit.script(Toy()), path)
    extractor = open_extractor(f"torchscript:{path}")
    found = extractor(images())
    features, logits = Toy()(images())
    assert torch.equal(found.pooled, features)
    assert found.logits is not None and torch.equal(found.logits, logits)
    assert extractor.name == "torchscript:toy.pt"
    assert extractor.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def test_options_are_given_to_a_torchscript_file(tmp_path: Path) -> None:
    path = tmp_path / "pooled.pt"
    torch.jit.save(torch.jit.script(Pooled()), path)
    extractor = open_extractor(f"torchscript:{path}?return_features=true")
    assert torch.equal(extractor(images()).pooled, Toy()(images())[0])
    assert extractor.name == "torchscript:pooled.pt?return_features=true"
    assert open_extractor(f"torchscript:{path}")(images()).pooled.shape == (3, CLASSES)


def test_a_module_by_its_path() -> None:
    extractor = open_extractor("module:toy_extractors:network")
    assert torch.equal(extractor(images()).pooled, Toy()(images())[0])
    assert extractor.name == "module:toy_extractors:network"
    again = open_extractor("module:toy_extractors:network")
    assert extractor.fingerprint == again.fingerprint and len(extractor.fingerprint) == 64
    function = open_extractor("module:toy_extractors:function")
    torch.testing.assert_close(function(images()).pooled, images().float().mean(dim=(2, 3)))
    assert function.fingerprint != extractor.fingerprint


def test_features_are_float32_whatever_the_surroundings() -> None:
    """Autocast around the extractor changes no digit, and half precision inside it comes out as float32."""
    extractor = open_extractor("module:toy_extractors:network")
    expected = extractor(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Toy()(images())[0].dtype == torch.bfloat16  # what it would do
        found = extractor(images())
    assert torch.equal(found.pooled, expected.pooled) and found.pooled.dtype == torch.float32
    half = Extractor(
        name="half",
        fingerprint="",
        look=lambda pixels: Features(pixels.half().flatten(1), logits=pixels.double().flatten(1)),
        device=torch.device("cpu"),
    )
    found = half(images())
    assert found.logits is not None and found.pooled.dtype == found.logits.dtype == torch.float32


def test_only_images_of_eight_bits_a_colour_are_taken() -> None:
    extractor = toy_extractor()
    for wrong in (images().float(), images()[0], images().permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
            extractor(wrong)


def test_networks_that_give_something_else_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        open_extractor("module:toy_extractors:broken")(images())
    with pytest.raises(UserError, match=r"gave \[3, 3, 8, 8\] for 3 images"):
        open_extractor("module:toy_extractors:wrong_shape")(images())


def test_networks_that_fail_say_so_in_a_line(tmp_path: Path) -> None:
    """A TorchScript file that wants floats, and a function that wants larger images."""
    path = tmp_path / "floats.pt"
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(3, 4, 8)), path)
    with pytest.raises(
        UserError, match=r"torchscript:floats.pt cannot look at images of 8 x 8: .*type"
    ) as it:
        open_extractor(f"torchscript:{path}")(images())
    assert "\n" not in str(it.value) and "uint8" in it.value.hint
    with pytest.raises(UserError, match="module:toy_extractors:large cannot look at images of 8 x 8"):
        open_extractor("module:toy_extractors:large")(images())


def test_spellings_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no program")
    refused("inceptoin", "no extractor 'inceptoin'", "open_clip:TOWER/TAG")
    refused("torchscript:", "nothing after the colon")
    refused("torchscript:nowhere.pt", "no file nowhere.pt")
    refused(f"torchscript:{tmp_path / 'text.pt'}", "cannot read", "torch.jit.save")
    refused("module:toy_extractors", "module:package.module:callable")
    refused("module:no_such_module:x", "no_such_module")
    refused("module:toy_extractors:nothing", "nothing")
    refused("module:toy_extractors:number", "not a function that returns a network")
    refused("module:toy_extractors:FEATURES", "not a function that returns a network")
    refused(str(tmp_path), "no checkpoint in")
    run, _ = classifier(tmp_path)
    refused(str(run), "--extractor-weights is for inception and open_clip", weights=tmp_path / "text.pt")
    refused("inception", "no file", weights=tmp_path / "none.pth")
    assert FEATURES == 6


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A tiny model among those that open_clip knows, and a file of its weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("towers")
    text = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / "judge-tower.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("judge-tower").eval()
    torch.save(model.state_dict(), folder / "judge.pt")
    return "judge-tower", folder / "judge.pt", model


def test_an_image_tower_of_open_clip(tower: tuple[str, Path, Any]) -> None:
    """Features are what open_clip itself makes of the same pictures with its own preprocessing."""
    import open_clip
    from PIL import Image

    name, path, model = tower
    extractor = open_extractor(f"open_clip:{name}", weights=path)
    assert extractor.name == f"open_clip:{name}/judge.pt"
    made = pictures(3, (40, 56))
    _, _, preprocess = open_clip.create_model_and_transforms(name)
    expected = model.encode_image(torch.stack([preprocess(Image.fromarray(each)) for each in made]))
    found = extractor(torch.from_numpy(made).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.pooled, expected)
    assert found.logits is None and found.pooled.shape == (3, 16)
    assert extractor.fingerprint == hash_weights(model.visual.state_dict(), b"open_clip image tower")
    json.dumps(extractor.describe())


def test_towers_that_are_not_there(tower: tuple[str, Path, Any], tmp_path: Path) -> None:
    name = tower[0]
    refused("open_clip:no-such-tower/openai", "no-such-tower")
    refused("open_clip:ViT-B-32/opennai", "openai", "'opennai'")
    refused(f"open_clip:{name}", "--extractor-weights FILE")
    other = tmp_path / "other.pt"
    torch.save({"x": torch.zeros(1)}, other)
    refused(f"open_clip:{name}", "other.pt", weights=other)
