"""`hmar edit` on small random models of all four families, by the command alone."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_runs import FAMILIES, hmar

from hmar_cli import report
from hmar_cli.builders import load_model
from hmar_cli.data.shapes import SHAPES
from hmar_cli.pictures import picture as limits
from hmar_cli.pictures.painter import ModelPainter
from hmar_cli.pictures.request import SUFFIXES
from hmar_cli.recipe import load_recipe
from hmar_cli.sampling.editing import EditSettings
from hmar_cli.settings import Recipe

NAMES = ["var", "hmar", "mar", "himar"]
SaveRandom = Callable[[Path, Recipe, tuple[str, ...]], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, save_random: SaveRandom) -> Path:
    """A folder with a random checkpoint of each family, and a text model."""
    folder = tmp_path_factory.mktemp("edit")
    for name, text in FAMILIES.items():
        (folder / f"{name}.toml").write_text(text)
        recipe = load_recipe(str(folder / f"{name}.toml"))
        save_random(folder / name, recipe, SHAPES)
    return folder


def edit(world: Path, name: str, picture: Path, out: Path, *flags: object) -> Any:
    return hmar("edit", picture, "--checkpoint", world / name, "--out", out, "--device", "cpu", *flags)


def edited(world: Path, name: str, picture: Path, out: Path, *flags: object) -> np.ndarray:
    """The variations of an edit that went well."""
    result = edit(world, name, picture, out, *flags)
    assert result.exit_code == 0, result.output
    return np.stack([pixels(path) for path in sorted(out.glob(f"{picture.stem}-[0-9]*.png"))])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def make_picture(path: Path, height: int, width: int, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(values).save(path)
    return values


def refused(result: Any, line: str) -> None:
    """One line and a hint, and nothing more."""
    assert result.exit_code == 2, result.output
    first, hint = result.stderr.splitlines()
    assert first.startswith("error: ") and line in first
    assert hint.startswith("hint: ")


BOX = ("--inpaint", "--box", "0.25,0.25,0.75,0.75", "--feather", 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_box_of_a_picture_of_another_size_and_shape(world: Path, tmp_path: Path, name: str) -> None:
    before = make_picture(tmp_path / "a.png", 30, 44)
    after = edited(world, name, tmp_path / "a.png", tmp_path / "out", *BOX, "--variations", 3)
    assert after.shape == (3, 30, 44, 3)
    inside, outside = np.s_[:, 8:22, 11:33], np.ones((30, 44), bool)
    outside[7 - 2 : 23 + 2, 11 - 2 : 33 + 2] = False
    assert (after[:, outside] == before[outside]).all()
    assert (after[inside] != before[8:22, 11:33]).mean() > 0.9
    assert (after[0] != after[1]).any() and (after[1] != after[2]).any()
    assert Image.open(tmp_path / "out" / "a-sheet.png").width > 600
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    unguided = 0 if name in ("var", "hmar") else 1  # no class: no guidance
    assert (record["feather"], record["seed"], record["cfg"]) == (2, 0, unguided)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_edit_in_any_batch(world: Path, tmp_path: Path, name: str) -> None:
    make_picture(tmp_path / "a.png", 20, 20)
    runs = {"one": ("--batch-size", 1), "three": ("--batch-size", 3), "other": ("--seed", 1)}
    one, three, other = (
        edited(world, name, tmp_path / "a.png", tmp_path / out, *BOX, *flags).astype(int)
        for out, flags in runs.items()
    )
    most = 0 if name in ("var", "hmar") else 1  # sums of the others are rounded in another order
    assert np.abs(one - three).max() <= most
    assert np.abs(one - other).max() > 1


@pytest.mark.parametrize("name", NAMES)
def test_a_full_region_is_plain_sampling(world: Path, tmp_path: Path, name: str) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    flags = ("--class-edit", "--label", "star", "--box", "0,0,1.0,1.0", "--keep-scales", 0, "--variations", 2)
    after = edited(world, name, tmp_path / "a.png", tmp_path / "out", *flags)
    arguments = ("sample", "--checkpoint", world / name, "--labels", "star", "--count", 2, "--device", "cpu")
    assert hmar(*arguments, "--out", tmp_path / "plain").exit_code == 0
    plain = np.stack([pixels(path) for path in sorted((tmp_path / "plain").glob("0*.png"))])
    assert (after == plain).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_panorama_of_a_square(world: Path, tmp_path: Path, name: str) -> None:
    before = make_picture(tmp_path / "a.png", 16, 16)
    flags = ("--outpaint", "--canvas", "64x16", "--variations", 2, "--feather", 1)
    after = edited(world, name, tmp_path / "a.png", tmp_path / "out", *flags)
    assert after.shape == (2, 16, 64, 3)
    assert (after[:, :, 25:39] == before[:, 1:15]).all()
    assert len(json.loads((tmp_path / "out" / "a.json").read_text())["windows"]) == 6
    assert all(after[0, :, columns].std() > 1 for columns in (slice(0, 8), slice(56, 64)))


def test_margins_may_be_shares(world: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 16, 20)
    flags = ("--outpaint", "--left", 5, "--bottom", 0.5, "--variations", 1)
    assert edited(world, "hmar", tmp_path / "a.png", tmp_path / "out", *flags).shape == (1, 24, 25, 3)


def test_masks_boxes_and_their_inverse(world: Path, tmp_path: Path) -> None:
    before = make_picture(tmp_path / "a.png", 16, 16)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :6] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ("--mask", tmp_path / "mask.png", "--box", "6,0,16,3", "--feather", 0, "--variations", 1)
    region = mask > 0
    region[:3] = True
    for out, more, changed in (("a", (), region), ("b", ("--invert",), ~region)):
        after = edited(world, "himar", tmp_path / "a.png", tmp_path / out, "--inpaint", *flags, *more)[0]
        assert (after[~changed] == before[~changed]).all()
        assert (after[changed] != before[changed]).mean() > 0.8


def test_a_class_edit_of_the_whole_keeps_some_of_it(world: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    flags = ("--class-edit", "--label", "star,heart", "--variations", 2, "--cfg", 2)
    edited(world, "var", tmp_path / "a.png", tmp_path / "out", *flags)
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert (record["strength"], record["region"], record["labels"]) == (0.6, 1.0, [3, 6])
    assert (record["cfg"], record["erase"], record["keep_scales"]) == (2, False, 0)


def test_a_text_model_takes_prompts_or_nothing(world: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    prompts = ("--prompt", "a red circle", "--box", "0,0,8,16", "--variations", 1)
    for out, flags in (("a", prompts), ("b", (*BOX, "--variations", 1)), ("c", ("--outpaint", "--left", 8))):
        edited(world, "text", tmp_path / "a.png", tmp_path / out, *flags)
    assert json.loads((tmp_path / "a" / "a.json").read_text())["prompts"] == ["a red circle"]
    refused(
        edit(world, "text", tmp_path / "a.png", tmp_path / "d", "--class-edit", "--label", "star"),
        "draws what a text says and has no classes",
    )


def test_colours_are_matched_unless_told_otherwise(world: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 60, 90)).save(tmp_path / "a.png")
    flags = ("--inpaint", "--box", "8,8,24,24", "--variations", 1, "--feather", 4, "--context", 1)
    matched, raw = (
        edited(world, "himar", tmp_path / "a.png", tmp_path / out, *flags, *more)[0].astype(int)
        for out, more in (("a", ()), ("b", ("--no-match-colours",)))
    )
    assert (matched != raw).any()
    ring = np.zeros((32, 32), bool)
    ring[7:25, 7:25], ring[8:24, 8:24] = True, False  # the feather's first pixels, which the model was shown
    errors = [np.abs(each[ring] - np.array([200, 60, 90])).mean() for each in (matched, raw)]
    assert errors[0] < errors[1]


def test_a_folder_of_pictures_and_of_masks(world: Path, tmp_path: Path) -> None:
    pictures, masks = tmp_path / "in", tmp_path / "masks"
    pictures.mkdir()
    masks.mkdir()
    for name, size in (("a.png", (16, 20)), ("b.png", (24, 16)), ("b.bmp", (10, 10))):
        make_picture(pictures / name, *size)
    (pictures / "notes.txt").write_text("no picture")
    for name, size in (("a.png", (16, 20)), ("b.png", (24, 16))):
        Image.new("L", (size[1], size[0]), 255).save(masks / name)
    flags = ("--inpaint", "--box", "0.,0,0.5,0.5", "--variations", 1)
    result = edit(world, "hmar", pictures, tmp_path / "out", *flags, "--json")
    assert result.exit_code == 0, result.output
    assert [each["picture"] for each in json.loads(result.stdout)["pictures"]] == ["a.png", "b.bmp", "b.png"]
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found >= {"a-000.png", "b.bmp-000.png", "b.png-000.png", "b.png.json", "b.bmp-sheet.png"}
    alone = edited(world, "hmar", pictures / "a.png", tmp_path / "alone", *flags)[0]
    assert (pixels(tmp_path / "out" / "a-000.png") == alone).all()  # whatever else is in the folder
    some = edit(world, "hmar", pictures, tmp_path / "some", "--inpaint", "--mask", masks, "--variations", 1)
    assert some.exit_code == 2 and "1 of 3 pictures could not be edited" in some.stderr
    assert "b.bmp: " in some.stderr and (tmp_path / "some" / "a-000.png").exists()
    refused(edit(world, "hmar", pictures, pictures, *flags), "holds the pictures to edit")


def test_grey_clear_and_turned_pictures(world: Path, tmp_path: Path) -> None:
    values = make_picture(tmp_path / "clear.png", 16, 16, 4)
    after = edited(world, "hmar", tmp_path / "clear.png", tmp_path / "out", *BOX, "--variations", 1)[0]
    assert (after[..., 3] == values[..., 3]).all() and (after[:2] == values[:2]).all()
    grey = np.random.default_rng(0).integers(0, 1 << 16, (16, 16)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    after = edited(world, "hmar", tmp_path / "grey.png", tmp_path / "out", *BOX, "--variations", 1)[0]
    assert after.shape == (16, 16) and (after[:2] == grey[:2]).all() and (after != grey).any()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values[:, :12, :3]).save(tmp_path / "turned.png", exif=exif)
    after = edited(world, "hmar", tmp_path / "turned.png", tmp_path / "out", *BOX, "--variations", 1)[0]
    assert after.shape == (12, 16, 3) and (after[0] == np.rot90(values[:, :12, :3], -1)[0]).all()


def test_a_dry_run_shows_every_grid(world: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    flags = ("--inpaint", "--box", "0,0,8,16", "--dry-run", "--json")
    names = {"var": ["scale 1 of 4", "scale 2 of 4", "scale 3 of 4", "scale 4 of 4"]}
    names |= {"hmar": names["var"], "mar": ["tokens"], "himar": ["pivots", "tokens"]}
    for family, expected in names.items():
        result = edit(world, family, tmp_path / "a.png", tmp_path / family, *flags)
        assert result.exit_code == 0, result.output
        (grids,) = json.loads(result.stdout)["pictures"][0]["token_grids"]
        assert [each["name"] for each in grids] == expected
        assert (grids[-1]["drawn"], grids[-1]["tokens"]) == (32, 64)
        if family in ("var", "hmar"):
            assert [each["drawn"] for each in grids] == [0, 2, 8, 32]  # the first scale is kept
        assert [path.name for path in (tmp_path / family).iterdir()] == ["a-region.png"]
        assert Image.open(tmp_path / family / "a-region.png").width > 160 * len(expected)


def test_a_blurred_edit_is_told_before_and_when_it_is_drawn(world: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 60, 90)
    seen = "a.png: seen at 16 x 16 px: enlarged"
    box, room = ("--inpaint", "--box"), ("--outpaint", "--left", 20)
    for number, (flags, said) in enumerate(
        [
            ((*box, "20,20,28,28"), ""),  # through a window of the model's own size
            ((*box, "20,20,34,34"), f"{seen} 1.8 times"),
            ((*box, "20,20,50,50"), f"warning: {seen} 3.8 times, and so blurred; a smaller --box or mask"),
            (("--class-edit", "--label", "star"), "blurred; a --box around a part is sharper"),
            (room, f"warning: {seen} 3.8 times, and so blurred; a smaller --window is sharper"),
            ((*room, "--window", 24), f"{seen} 1.5 times"),
        ]
    ):
        for more in ((), ("--dry-run",)):
            result = edit(world, "hmar", tmp_path / "a.png", tmp_path / str(number), *flags, *more)
            assert result.exit_code == 0, result.output
            assert said in result.stderr and ("enlarged" in result.stderr) == bool(said)
            assert ("warning" in result.stderr) == ("blurred" in said)


def test_an_interrupted_edit_goes_on(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    flags = (*BOX, "--batch-size", 1)
    whole = edited(world, "hmar", tmp_path / "a.png", tmp_path / "whole", *flags)
    paint, calls = ModelPainter.paint, []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return paint(self, *arguments)

    monkeypatch.setattr(ModelPainter, "paint", interrupted)
    result = edit(world, "hmar", tmp_path / "a.png", tmp_path / "out", *flags)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert there == ["a-000.png", "a-001.png", "a.json"]
    result = edit(world, "hmar", tmp_path / "a.png", tmp_path / "out", *flags, "--json")
    assert json.loads(result.stdout)["pictures"][0]["already_there"] == 2
    assert len(calls) == 5
    again = [pixels(path) for path in sorted((tmp_path / "out").glob("a-0*.png"))]
    assert (np.stack(again) == whole).all()
    other = edit(world, "hmar", tmp_path / "a.png", tmp_path / "out", *flags, "--seed", 5)
    assert other.exit_code == 2 and "holds other edits of a.png (seed)" in other.stderr
    make_picture(tmp_path / "a.png", 16, 16, 4)
    other = edit(world, "hmar", tmp_path / "a.png", tmp_path / "out", *flags)
    assert other.exit_code == 2 and "(sha256)" in other.stderr


def test_a_mask_that_changed_is_another_edit(world: Path, tmp_path: Path) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    flags = ("--inpaint", "--mask", tmp_path / "mask.png", "--variations", 1)
    for row, name in ((5, "out"), (9, "new")):  # as much of it, and the same window
        mask = np.zeros((16, 16), np.uint8)
        mask[4:12, 4:12] = 255
        mask[row, 6:8] = 0
        Image.fromarray(mask).save(tmp_path / "mask.png")
        edited(world, "var", tmp_path / "a.png", tmp_path / name, *flags)
    result = edit(world, "var", tmp_path / "a.png", tmp_path / "out", *flags)
    assert result.exit_code == 2 and "(region_sha256)" in result.stderr


def test_a_full_disk_leaves_no_half_written_file(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    make_picture(tmp_path / "a.png", 16, 16)
    save = Image.Image.save

    def full(self: Image.Image, target: Any, **flags: Any) -> None:
        if "a-002" in str(target):
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        save(self, target, **flags)

    monkeypatch.setattr(report.Image.Image, "save", full)
    result = edit(world, "hmar", tmp_path / "a.png", tmp_path / "out", *BOX)
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert there == ["a-000.png", "a-001.png", "a.json"]


@pytest.mark.parametrize(
    ("name", "flags", "line"),
    [
        ("hmar", (), "nothing to do"),
        ("hmar", ("--inpaint", "--outpaint"), "one edit at a time, not --inpaint and --outpaint"),
        ("hmar", ("--inpaint",), "the region is empty"),
        ("hmar", ("--inpaint", "--box", "5,5,5,9"), "the region is empty"),
        ("hmar", ("--inpaint", "--box", "0,0,99,9"), "reaches out of"),
        ("hmar", ("--inpaint", "--box", "1,2,3"), "expected four numbers"),
        ("hmar", ("--inpaint", "--box", "0,0,1.,1.", "--invert"), "the region is empty"),
        ("hmar", ("--inpaint", "--box", "0,0,4,4", "--left", 5), "margins and --canvas are for --outpaint"),
        ("hmar", ("--outpaint",), "--outpaint needs room"),
        ("hmar", ("--outpaint", "--canvas", "16x16"), "the picture fills the canvas of 16 x 16"),
        ("hmar", ("--outpaint", "--left", "x"), "expected pixels or a share"),
        ("hmar", ("--outpaint", "--canvas", "8x8"), "smaller than the picture"),
        ("hmar", ("--outpaint", "--canvas", "99999x99999"), "more than the 67108864"),
        ("hmar", ("--outpaint", "--left", 5, "--box", "0,0,4,4"), "are of a region within the picture"),
        ("hmar", ("--inpaint", "--mask", "none.png"), "no such mask"),
        ("hmar", ("--inpaint", "--mask", "small.png"), "the mask has 8 x 8 pixels, the picture 16 x 16"),
        ("hmar", ("--inpaint", "--mask", "black.png"), "the region is empty"),
        ("hmar", ("--class-edit", "--box", "0,0,4,4"), "--class-edit needs a class"),
        ("hmar", ("--class-edit", "--label", "cat"), "no class 'cat'"),
        ("hmar", ("--prompt", "a cat"), "draws classes and knows no text"),
        ("text", ("--inpaint", "--box", "0,0,4,4", "--label", "star"), "has no classes"),
        ("hmar", (*BOX, "--strength", 0), "--strength 0 would change nothing"),
        ("hmar", (*BOX, "--keep-scales", 4), "has 4 scales"),
        ("himar", (*BOX, "--keep-scales", 1), "has no scales to keep"),
        ("hmar", (*BOX, "--cfg", 2), "--cfg guides towards a class or a text"),
        ("hmar", (*BOX, "--steps", 2), "which has no --steps"),
        ("mar", (*BOX, "--pivot-steps", 2), "has no pivots"),
        ("hmar", (*BOX, "--precision", "fp7"), "'fp7' is not one of 'auto', 'bf16', 'fp32'"),
        ("tokenizers/hmar", BOX, "holds a tokenizer, not a model"),
    ],
)
def test_mistakes_are_one_line_and_a_hint(
    world: Path, tmp_path: Path, name: str, flags: Any, line: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make_picture(tmp_path / "a.png", 16, 16)
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (16, 16)).save("black.png")
    refused(edit(world, name, tmp_path / "a.png", tmp_path / "out", *flags), line)
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "text.png").write_text("no picture")
    refused(edit(world, "hmar", tmp_path / "text.png", tmp_path / "out", *BOX), "not a readable picture")
    refused(edit(world, "hmar", tmp_path / "none.png", tmp_path / "out", *BOX), "no such picture")
    (tmp_path / "empty").mkdir()
    refused(edit(world, "hmar", tmp_path / "empty", tmp_path / "out", *BOX), "holds no picture")
    make_picture(tmp_path / "a.png", 16, 16)
    monkeypatch.setattr(limits, "LIMIT", 100)
    refused(
        edit(world, "hmar", tmp_path / "a.png", tmp_path / "out", *BOX),
        "16 x 16 pixels are more than the 100",
    )


def test_every_suffix_of_a_folder_is_one_that_can_be_opened() -> None:
    assert set(Image.registered_extensions()) >= SUFFIXES


@pytest.mark.parametrize("name", ["hmar", "himar"])
def test_windows_and_variations_have_random_numbers_of_their_own(world: Path, name: str) -> None:
    model, tokenizer, checkpoint = load_model(world / name)
    settings = checkpoint.recipe.sample
    painter = ModelPainter(model, tokenizer, None, settings, EditSettings(), seed=3)  # type: ignore[arg-type]
    images = np.full((2, 16, 16, 3), 90, np.uint8)
    region = np.zeros((16, 16), np.float32)
    region[:, 8:] = 1
    first, again, other = (painter.paint(images, region, [4, 7], step) for step in (0, 0, 1))
    assert (first == again).all()
    assert np.abs(first - other).max() > 5 and np.abs(first[0] - first[1]).max() > 5
    alone = painter.paint(images[:1], region, [7], 0)
    assert np.abs(alone[0] - first[1]).max() < 0.1
