"""`hmar eval compbench` with a random text model: what is drawn, where it lies, what is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.data.scenes import all_scenes
from hmar_cli.recipe import load_recipe
from hmar_cli.report import labelled_grid
from hmar_cli.settings import Recipe

SMALL = (
    "tokenizer.channels=8",
    "tokenizer.latent_scale=1.0",
    "model.width=32",
    "model.heads=2",
    "model.encoder_depth=1",
    "model.decoder_depth=1",
    "model.num_classes=1",
    "text.width=32",
    "text.depth=1",
    "text.heads=2",
    "sample.steps=2",
    "sample.pivot_steps=1",
    "sample.head_steps=2",
    "sample.pivot_head_steps=2",
)
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[[Path, Recipe, tuple[str, ...]], None]
) -> Path:
    """A random Hi-MAR that reads prompts, prompts of two categories, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("world")
    save_random(folder / "model", load_recipe("himar-scenes-tiny", SMALL), ("scene",))
    (folder / "prompts").mkdir()
    scenes = [str(scene) for scene in all_scenes("test")[:2]]
    (folder / "prompts" / "scenes_val.txt").write_text("\n".join(scenes))
    (folder / "prompts" / "color_val.txt").write_text("a red hat\n")
    (folder / "dwarf.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "dwarf.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("dwarf").state_dict(), folder / "dwarf.pt")
    return folder


SHOWN = {"color": [0], "scenes": [1, 2]}
"""Of the prompts color, scene, scene: the first image of each, by category."""


def tile(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def hmar(*arguments: object) -> Any:
    given = (
        [*map(str, arguments), "--device", "cpu"] if "compbench" in arguments else list(map(str, arguments))
    )
    return CliRunner().invoke(app, ["eval", *given], prog_name="hmar")


def compbench(world: Path, out: Path, *more: object) -> Any:
    return hmar("compbench", world / "model", world / "prompts", "--out", out, *more)


def test_images_in_the_layout_of_the_evaluators_and_what_is_measured(world: Path, tmp_path: Path) -> None:
    clip = ("--clip", "dwarf", "--clip-weights", world / "dwarf.pt")
    result = compbench(world, tmp_path / "out", "--per-prompt", 2, "--json", *clip)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found
    scenes = (world / "prompts" / "scenes_val.txt").read_text().splitlines()
    names = sorted(path.name for path in (tmp_path / "out" / "scenes" / "samples").iterdir())
    assert names == sorted(f"{scenes[i // 2]}_{i:06d}.png" for i in range(4))
    colour = tmp_path / "out" / "color" / "samples"
    assert sorted(path.name for path in colour.iterdir()) == [f"a red hat_{i:06d}.png" for i in range(2)]
    drawn = tmp_path / "out" / "drawn"  # of the prompts color, scene, scene; and again
    assert (colour / "a red hat_000001.png").read_bytes() == (drawn / "000003.png").read_bytes()
    assert found["settings"]["categories"] == {"color": 1, "scenes": 2}
    assert set(found["metrics"]) == {
        *("color.clip_cosine", "scenes.clip_cosine"),
        *(f"scenes.{part}" for part in ("colours", "shapes", "places", "all")),
    }
    same = json.loads(hmar("prompts", drawn, *clip, "--json").stdout)["metrics"]["clip_cosine"]["value"]
    ours = [found["metrics"][f"{name}.clip_cosine"]["value"] for name in ("color", "scenes")]
    assert (2 * ours[0] + 4 * ours[1]) / 6 == pytest.approx(same, abs=1e-6)
    assert found["made_with"]["images_per_second"] > 0 and found["made_with"]["drawing"]["already_there"] == 0
    tiles = {name: [tile(drawn / f"{i:06d}.png") for i in each] for name, each in SHOWN.items()}
    expected = np.asarray(labelled_grid(tiles))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "report.png")), expected)


def test_it_goes_on_and_draws_more(world: Path, tmp_path: Path) -> None:
    assert compbench(world, tmp_path, "--per-prompt", 1, "--clip", "none").exit_code == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "drawn").glob("0*.png")}
    (tmp_path / "drawn" / "000001.png").unlink()
    result = compbench(world, tmp_path, "--per-prompt", 2, "--clip", "none")
    assert result.exit_code == 0, result.output
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "drawn").glob("0*.png")}
    assert len(after) == 6 and all(after[name] == before[name] for name in ("000000.png", "000002.png"))
    assert len(list((tmp_path / "scenes" / "samples").iterdir())) == 4
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["color", "1", "2", "nothing"] and lines[2][:4] == ["scenes", "2", "4", "colours"]
    fewer = compbench(world, tmp_path, "--per-prompt", 1, "--clip", "none")
    assert fewer.exit_code == 0 and len(list((tmp_path / "scenes" / "samples").iterdir())) == 2


def test_a_dry_run_draws_nothing(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--dry-run", "--limit", 1, "--cfg", 3)
    plan = compbench(world, out, *flags).stdout.splitlines()
    assert plan[0].startswith("images    20 by seed 0") and "cfg 3.0" in plan[3]
    assert plan[4:] == ["of each   10 images: color (1), scenes (1)", f"output    {out}"]
    found = json.loads(compbench(world, out, *flags, "--json").stdout)
    assert (found["images"], found["per_prompt"]) == (20, 10)
    assert found["categories"] == {"color": 1, "scenes": 1} and found["sampling"]["cfg"] == 3
    assert not out.exists()


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert message in next(line for line in lines if line.startswith("error: ")), result.stderr
    assert any(line.startswith("hint: ") for line in lines) and result.stdout == ""


def test_mistakes_are_one_line_and_a_hint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(hmar("compbench", tmp_path / "nowhere", world / "prompts"), "no such checkpoint")
    refused(hmar("compbench", world / "model", tmp_path / "nowhere"), "no folder")
    tokenizer = world / "tokenizers" / "model"
    refused(hmar("compbench", tokenizer, world / "prompts"), "reads no prompts")
    refused(compbench(world, tmp_path / "out", "--categories", "shape"), "no shape_val.txt")
    refused(compbench(world, tmp_path / "out", "--clip", "ViT-L14"), "CLIP ViT-L14")
    refused(compbench(world, tmp_path / "out", "--grid", tmp_path), f"{tmp_path} is a folder")

    def offline(tag: object) -> str:
        raise FileNotFoundError("Failed to download")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    refused(compbench(world, tmp_path / "out"), "cannot be downloaded")
    assert not (tmp_path / "out").exists()  # nothing is drawn before that is known
    assert compbench(world, tmp_path / "other", "--clip", "none", "--per-prompt", 1).exit_code == 0
    refused(
        compbench(world, tmp_path / "other", "--clip", "none", "--per-prompt", 1, "--seed", 1),
        "holds images of other settings (seed)",
    )
