"""`hmar eval scenes` on a folder as `hmar sample --prompt-file` writes it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.data.scenes import all_scenes, draw, parse


def hmar(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)], prog_name="hmar")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Five images for three prompts: the last two repeat the first prompts, and image 4 is another's."""
    drawings = [draw(i, size=(48, 48)) for i in (0, 1, 2, 0, 2)]
    for i, drawing in enumerate(drawings):
        drawing.image.save(tmp_path / f"{i:06d}.png")
    drawings[0].image.save(tmp_path / "grid.png")
    prompts = [drawing.caption for drawing in drawings[:3]]
    (tmp_path / "sample.json").write_text(json.dumps({"prompts": prompts, "count": 5}))
    return tmp_path


def test_shares_with_their_intervals(samples: Path) -> None:
    result = hmar("scenes", samples, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == 5
    assert (found["all"]["right"], found["all"]["share"]) == (4, 0.8)
    assert 0.37 < found["all"]["low"] < 0.8 < found["all"]["high"] < 0.97
    assert [wrong["image"] for wrong in found["wrong"]] == ["000004.png"]
    shown, asked = draw(2, size=(48, 48)).caption, draw(1, size=(48, 48)).caption
    assert found["wrong"][0]["prompt"] == asked
    assert parse(found["wrong"][0]["seen"]) in (parse(shown), parse(shown).mirrored)
    assert set(found) == {"images", "colours", "shapes", "places", "all", "wrong"}


def test_a_table_for_people(samples: Path) -> None:
    result = hmar("scenes", samples)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["right", "colours", "shapes", "places", "all"]
    assert "of 5 images" in lines[0]
    assert lines[-1].split()[:3] == ["all", "4", "80.0%"]


def test_prompts_can_be_judged_and_kept() -> None:
    first = hmar("scene-prompts", 40, "--split", "test", "--seed", 3)
    prompts = first.stdout.splitlines()
    assert len(set(prompts)) == 40
    assert {parse(prompt) for prompt in prompts} <= set(all_scenes("test"))
    assert hmar("scene-prompts", 40, "--split", "test", "--seed", 3).stdout == first.stdout
    assert hmar("scene-prompts", 40, "--split", "test").stdout != first.stdout


def test_mistakes_are_one_line_and_a_hint(samples: Path, tmp_path: Path) -> None:
    def change(**about: Any) -> tuple[str, Path]:
        (samples / "sample.json").write_text(json.dumps(about))
        return "scenes", samples

    prompt = draw(0, size=(8, 8)).caption
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("no sample.json in", ("scenes", tmp_path / "nowhere")),
        ("--split val: expected all, train, test", ("scene-prompts", 3, "--split", "val")),
    ]
    for message, arguments in cases:
        check(hmar(*arguments), message)
    check(hmar(*change(labels=[1])), "holds images without prompts")
    check(hmar(*change(prompts=["a cat"])), "got 'a cat'")
    check(hmar(*change(prompts=[prompt], count=7)), "000005.png is missing")
    (samples / "000001.png").unlink()
    check(hmar(*change(prompts=[prompt])), "000001.png is missing")
    (samples / "000001.png").write_bytes(b"no image")
    check(hmar(*change(prompts=[prompt])), "cannot read")
    for path in samples.glob("0*.png"):
        path.unlink()
    check(hmar(*change(prompts=[prompt])), "no images in")


def check(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert message in next(line for line in lines if line.startswith("error: "))
    assert lines[-1].startswith("hint: ")
    assert result.stdout == ""
