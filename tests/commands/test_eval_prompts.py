"""`hmar eval prompts`: CLIP scores by a tiny model, against open_clip's own."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.evaluation.prompts import clip_score, mean_cosine

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
PROMPTS = ["a red circle", "a blue square", "a cat"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that open_clip knows as "small", and its weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "small.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("small").state_dict(), folder / "small.pt")
    return folder / "small.pt"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Five images of three prompts, as `hmar sample` writes them."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(5):
        Image.effect_noise((40, 32), 20 * (i + 1)).convert("RGB").save(folder / f"{i:06d}.png")
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    (folder / "sample.json").write_text(json.dumps({"prompts": PROMPTS, "count": 5, "seed": 3}))
    return folder


def hmar(*arguments: object) -> Any:
    given = ["eval", "prompts", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, given, prog_name="hmar")


def test_each_image_is_compared_with_its_own_prompt(weights: Path, samples: Path, tmp_path: Path) -> None:
    result = hmar(
        samples, "--clip", "small", "--clip-weights", weights, "--json", "--out", tmp_path / "r.json"
    )
    assert result.exit_code == 0, result.output
    model, _, prepare = open_clip.create_model_and_transforms("small", pretrained=str(weights))
    cosines = []
    for i in range(5):
        with Image.open(samples / f"{i:06d}.png") as image, torch.no_grad():
            seen = model.eval().encode_image(prepare(image)[None], normalize=True)
        read = model.encode_text(open_clip.get_tokenizer("small")([PROMPTS[i % 3]]), normalize=True)
        cosines.append((seen * read).sum().item())
    found = json.loads(result.stdout)
    assert found["metrics"]["clip_cosine"]["value"] == pytest.approx(sum(cosines) / 5, abs=1e-6)
    positive = [100 * max(each, 0) for each in cosines]
    assert found["metrics"]["clip_score"]["value"] == pytest.approx(sum(positive) / 5, abs=1e-4)
    assert found["metrics"]["clip_score"]["name"] == "CLIP score[small]"
    assert found["settings"]["prompts"]["count"] == 5
    assert len(found["settings"]["clip"]["fingerprint"]) == 64 and found["settings"]["clip"]["size"] == [
        32,
        32,
    ]
    assert found["subject"]["sampling"]["seed"] == 3
    assert found["made_with"]["images_per_second"] > 0 and found["made_with"]["batch_size"] == 64
    assert json.loads((tmp_path / "r.json").read_text()) == found
    with Image.open(tmp_path / "r.png") as image:
        assert image.width > 3 * 128
    few = json.loads(
        hmar(samples, "--clip", "small", "--clip-weights", weights, "--count", 2, "--json").stdout
    )
    assert few["metrics"]["clip_cosine"]["value"] == pytest.approx(sum(cosines[:2]) / 2, abs=1e-6)


def test_negative_cosines_count_in_the_mean_alone() -> None:
    assert clip_score([0.5, -0.5]) == 25 and mean_cosine([0.5, -0.5]) == 0
    with pytest.raises(ValueError, match="at least one"):
        clip_score([])


def test_a_table_for_people(weights: Path, samples: Path) -> None:
    lines = hmar(samples, "--clip", "small", "--clip-weights", weights).stdout.splitlines()
    assert lines[0] == "5 images and prompts"
    assert [line.split("[")[0] for line in lines[1:]] == ["CLIP score", "CLIP cosine"]
    drawn = hmar("builtin:scenes?count=2", "--clip", "small", "--clip-weights", weights)
    assert drawn.stdout.startswith("2 images and prompts")


def refused(result: Any, message: str, hint: str = "") -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert message in next(line for line in lines if line.startswith("error: ")), result.stderr
    assert lines[-1].startswith("hint: ") and hint in lines[-1] and result.stdout == ""


def test_mistakes_are_one_line_and_a_hint(
    weights: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--clip", "small", "--clip-weights", weights)
    refused(hmar(tmp_path / "nowhere", *small), "no such source")
    refused(hmar(samples, *small, "--out", tmp_path / "r.txt"), "r.txt: the report is JSON")
    refused(hmar(samples, *small, "--grid", tmp_path), f"{tmp_path} is a folder")
    refused(hmar(samples, "--clip", "ViT-L14"), "CLIP ViT-L14: expected a tower of open_clip such as")
    refused(hmar(samples, "--clip", "ViT-L-14/openia"), "got 'openia'")
    refused(hmar(samples, "--clip", "small"), "CLIP small: expected one of the weights")
    missing = ("--clip", "small", "--clip-weights", tmp_path / "none.pt")
    refused(hmar(samples, *missing), "no such file", "--clip-weights FILE")
    refused(hmar(samples, "--clip", "ViT-B-32/openai", "--clip-weights", weights), "Missing key(s)")

    def offline(tag: object) -> str:
        raise FileNotFoundError("Failed to download")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    published = "the weights of ViT-L-14 openai cannot be downloaded from https://huggingface.co/timm/"
    refused(hmar(samples), published)
    (samples / "000001.png").write_bytes(b"no image")
    result = hmar(samples, *small)
    assert result.stdout.startswith("4 images") and "warning: left out 1 images; image 1: " in result.stderr
    (samples / "sample.json").write_text(json.dumps({"labels": [1], "class_names": ["cat"]}))
    refused(hmar(samples, *small), "have no prompts")
    (samples / "sample.json").write_text(json.dumps({"prompts": PROMPTS, "count": 9}))
    refused(hmar(samples, *small), "000005.png is missing")
