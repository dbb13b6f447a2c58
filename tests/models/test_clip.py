"""CLIP with both its towers, compared with what open_clip itself makes of the same weights."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hmar_cli.models.clip import Clip

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
CAPTIONS = ["a red circle left of a blue square", "a cat"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny towers among those that open_clip knows."""
    folder = tmp_path_factory.mktemp("towers")
    kinds = {
        "pair": TINY,
        "pair-quickgelu": {**TINY, "quick_gelu": True},
        "pair-custom": {**TINY, "custom_text": True},
    }
    for name, config in kinds.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture
def model(towers: None) -> Any:
    torch.manual_seed(0)
    return open_clip.create_model("pair").eval()


def picture() -> Image.Image:
    return Image.effect_noise((50, 40), 90).convert("RGB")


def close_to(clip: Clip, model: Any, prepare: Any = None) -> bool:
    """Whether both give the same vectors of the same image and captions."""
    image = picture()
    ids = open_clip.get_tokenizer("pair")(CAPTIONS)
    with torch.no_grad():
        pixels = (prepare or clip.preprocess)(image)[None]
        expected = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
    found = clip.images(clip.preprocess(image)[None]), clip.texts(CAPTIONS)
    assert found[0].shape == (1, 16) and found[1].shape == (2, 16)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_file_gives_what_open_clip_gives(model: Any, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    prepare = open_clip.image_transform((32, 32), is_train=False)
    for name in ("whole.pt", "whole.safetensors"):
        clip = Clip.from_pretrained("pair", "", tmp_path / name)
        assert close_to(clip, model, prepare)
        assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert close_to(Clip.from_pretrained("pair-custom", "", tmp_path / "whole.pt"), model)
    assert not close_to(Clip.from_pretrained("pair-quickgelu", "", tmp_path / "whole.pt"), model)


def test_a_file_of_openai_has_the_quick_gelu(model: Any, tmp_path: Path) -> None:
    extra = {name: torch.tensor(12) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({**model.state_dict(), **extra}, tmp_path / "openai.pt")
    quick = open_clip.create_model("pair-quickgelu").eval()
    quick.load_state_dict(model.state_dict())
    clip = Clip.from_pretrained("pair", "", tmp_path / "openai.pt")
    assert close_to(clip, quick) and not close_to(clip, model)


def test_a_tag_says_how_images_fit_and_is_downloaded_by_open_clip(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(model.state_dict(), tmp_path / "file.pt")
    about = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tags = {"fine": {**about, "url": "somewhere"}, "quick": {"quick_gelu": True}}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda tower, tag: tags.get(tag, {}))
    asked = []
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda tag: asked.append(tag) or str(tmp_path / "file.pt")
    )
    clip = Clip.from_pretrained("pair", "fine")
    assert asked == [tags["fine"]]
    assert clip.preprocessing == {"size": (32, 32), **about}
    tall = Image.new("RGB", (8, 64), (255, 0, 0))
    tall.paste((0, 0, 0), (0, 0, 8, 16))
    pixels = clip.preprocess(tall)
    assert pixels.shape == (3, 32, 32)
    torch.testing.assert_close(pixels[:, 20, 0], torch.tensor([2.0, -2.0, -2.0]))  # (1 - 0.5) / 0.25
    torch.testing.assert_close(pixels[:, 4, 0], torch.full((3,), -2.0))  # squashed: a crop would lose the top
    assert not close_to(Clip.from_pretrained("pair", "quick"), model)
    given = Clip.from_pretrained("pair", "fine", tmp_path / "file.pt")  # the file stands in for the download
    assert len(asked) == 2 and given.preprocessing == clip.preprocessing

    def offline(tag: object) -> str:
        raise FileNotFoundError("Failed to download file")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ConnectionError, match="pair fine cannot be downloaded from somewhere: Failed"):
        Clip.from_pretrained("pair", "fine")


def test_what_cannot_be_loaded(model: Any, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    cases = {
        "such as .*got 'pear'": ("pear", "", None),
        r"openai, .*got 'openia'": ("ViT-L-14", "openia", None),
        "weights of pair, .*got ''": ("pair", "", None),
        r"whole.pt: Missing key\(s\)": ("ViT-B-32", "openai", tmp_path / "whole.pt"),
        "expected a file .*got .*whole.txt": ("pair", "", tmp_path / "whole.txt"),
        "expected tensors alone": ("pair", "", tmp_path / "noise.pt"),
    }
    (tmp_path / "whole.txt").write_text("x")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            Clip.from_pretrained(*arguments)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        Clip.from_pretrained("pair", "", tmp_path / "nowhere.pt")
