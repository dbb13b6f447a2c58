"""From captions to what caches keep of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from hmar_cli.data import captions
from hmar_cli.data.captions import caption_encoder, describe, draw_captions
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.errors import UserError
from hmar_cli.models.text import tokenize
from hmar_cli.settings import ClipText, JointText

TEXTS = ["a red circle left of a blue square", "", "Orange book, flat style"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny tower, which open_clip knows as "small"."""
    folder = tmp_path_factory.mktemp("tower")
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    image = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": image, "text_cfg": text}
    (folder / "small.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "small.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("small").state_dict(), folder / "small.pt")
    return folder / "small.pt"


class Texts(ImageSource):
    """Images of which every third has no caption, and the others two."""

    def __init__(self, count: int) -> None:
        super().__init__("texts", ("image",), count, captioned=True)

    def example(self, index: int) -> Example:
        """No image."""
        return Example(index, None, 0, () if index % 3 == 2 else (f"{index}a", f"{index}b"))


def test_captions_are_drawn_by_chance_and_no_image_twice() -> None:
    drawn = draw_captions(Texts(300), 150, 0)
    images = [int(text[:-1]) for text in drawn]
    assert len(set(images)) == 150 and not any(image % 3 == 2 for image in images)
    assert images != sorted(images) and max(images) > 250
    assert 50 < sum(text.endswith("a") for text in drawn) < 100  # one of the two, by chance
    assert draw_captions(Texts(300), 150, 0) == drawn != draw_captions(Texts(300), 150, 1)
    assert len(draw_captions(Texts(300), 200, 0)) == 200
    with pytest.raises(UserError, match="texts has 200 images with captions, and 201 prompts"):
        draw_captions(Texts(300), 201, 0)


def test_names_of_what_encodes() -> None:
    assert describe(JointText(context_length=24)) == "ids:24"
    assert describe(ClipText()) == "clip:ViT-L-14:openai"


def test_a_joint_model_gets_ids() -> None:
    encode = caption_encoder(JointText(context_length=12), "cpu")
    ids = encode(TEXTS)
    assert ids.dtype == np.uint16 and ids.shape == (3, 12)
    assert np.array_equal(ids, tokenize(TEXTS, 12).numpy())  # nothing is lost in 16 bits
    assert encode([]).shape == (0, 12)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_frozen_tower_gives_embeddings(weights: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(captions.BATCHES, "cpu", batch)
    encode = caption_encoder(ClipText(tower="small", weights=str(weights)), "cpu")
    together = encode(TEXTS)
    assert together.dtype == np.float16 and together.shape == (3, 16, 32)
    assert np.ptp(together, axis=0).max() > 0.1  # captions differ
    for text, hidden in zip(TEXTS, together, strict=True):
        assert np.array_equal(encode([text])[0], hidden)  # whatever is encoded beside it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(encode(TEXTS), together)
    assert encode([]).shape == (0, 16, 32)


def test_broken_weights_are_named(weights: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = torch.load(weights, weights_only=True)
    state["ln_final.bias"][0] = 1e5  # more than a half holds
    torch.save(state, tmp_path / "broken.pt")
    encode = caption_encoder(ClipText(tower="small", weights=str(tmp_path / "broken.pt")), "cpu")
    with pytest.raises(UserError, match="not finite in 16 bits"):
        encode(TEXTS)


def test_mistakes_are_the_users(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(tag: object) -> str:
        raise FileNotFoundError("Failed to download file (open_clip_model.safetensors)")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    cases = {
        r"tower of open_clip such as .*ViT-B-32.*'ViT-B32'": ClipText(tower="ViT-B32"),
        r"one of the weights of ViT-L-14, openai.*'openia'": ClipText(weights="openia"),
        r"no such file: .*missing.pt": ClipText(weights=str(tmp_path / "missing.pt")),
        r"weights of ViT-L-14 openai cannot be downloaded from \S+: Failed": ClipText(),
        r"expected positional_embedding of \(77, 768\), got \(16, 32\)|no text weight": ClipText(
            weights=str(weights)
        ),
    }
    for message, settings in cases.items():
        with pytest.raises(UserError, match=message) as error:
            caption_encoder(settings, "cpu")
        assert error.value.hint
