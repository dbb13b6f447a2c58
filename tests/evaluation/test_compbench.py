"""T2I-CompBench's files: prompts in, images where its evaluators look for them."""

from pathlib import Path

import pytest

from hmar_cli.errors import UserError
from hmar_cli.evaluation.compbench import Category, all_prompts, by_category, lay_out, read_categories


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_prompts_are_read_by_category(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "dataset",
        spatial_val="a cat left of a dog\t300\n\n a hat on a rack. \n",
        color_val="a red hat\na blue hat\na red hat\n",
        color_val_seen="not this",
        color_train="nor this",
    )
    color = Category("color", ("a red hat", "a blue hat", "a red hat"))
    spatial = Category("spatial", ("a cat left of a dog", "a hat on a rack."))
    assert read_categories(folder) == [color, spatial]
    assert read_categories(folder, ["spatial", "color"]) == [spatial, color]
    assert read_categories(folder, ["color"], limit=2) == [Category("color", ("a red hat", "a blue hat"))]


def test_mistakes_in_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "dataset", color_val="a red hat", empty_val="\n \n")
    (folder / "latin_val.txt").write_bytes(b"caf\xe9")
    (folder / "none").mkdir()
    for name, text in {"under": "a_b", "slash": "and/or", "long": "ä" * 123}.items():
        write(folder, **{f"{name}_val": text})

    def message(place: Path, *names: str) -> str:
        with pytest.raises(UserError) as caught:
            read_categories(place, names)
        assert caught.value.hint
        return str(caught.value)

    assert "no folder" in message(tmp_path / "nowhere")
    assert "no files *_val.txt" in message(folder / "none")
    assert "no shape_val.txt" in message(folder, "shape")
    assert "holds no prompt" in message(folder, "empty")
    assert "cannot read" in message(folder, "latin")
    for name in ("under", "slash", "long"):
        assert "cannot be part of a file's name" in message(folder, name)
    assert read_categories(write(folder, fits_val="ä" * 122), ["fits"])[0].prompts == ("ä" * 122,)


def test_images_are_where_the_evaluators_look(tmp_path: Path) -> None:
    groups = [Category("color", ("a red hat", "a blue hat")), Category("complex", ("The hat.",))]
    assert all_prompts(groups) == ["a red hat", "a blue hat", "The hat."]
    drawn = [tmp_path / f"{i:06d}.png" for i in range(6)]
    for i, path in enumerate(drawn):
        path.write_bytes(bytes([i]))
    images = by_category(drawn, groups, 2)  # image i is of prompt i, modulo 3
    folders = lay_out(images, groups, tmp_path / "out")
    assert folders == [tmp_path / "out" / "color", tmp_path / "out" / "complex"]
    there = {path.name: path.read_bytes()[0] for path in (folders[0] / "samples").iterdir()}
    assert there == {
        "a red hat_000000.png": 0,
        "a red hat_000001.png": 3,
        "a blue hat_000002.png": 1,
        "a blue hat_000003.png": 4,
    }
    last = {path.name: path.read_bytes()[0] for path in (folders[1] / "samples").iterdir()}
    assert last == {"The hat._000000.png": 2, "The hat._000001.png": 5}
    # as the evaluators read them: by the number at the end, with the prompt before the first underscore
    names = sorted(there, key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == ["a red hat"] * 2 + ["a blue hat"] * 2


def test_a_new_layout_replaces_the_old_one(tmp_path: Path) -> None:
    groups = [Category("color", ("a hat",))]
    drawn = [tmp_path / f"{i}.png" for i in range(3)]
    for path in drawn:
        path.write_bytes(b"x")
    lay_out(by_category(drawn, groups, 3), groups, tmp_path)
    lay_out(by_category(drawn[:1], groups, 1), groups, tmp_path)
    assert [path.name for path in (tmp_path / "color" / "samples").iterdir()] == ["a hat_000000.png"]


def test_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", no_links)
    (tmp_path / "0.png").write_bytes(b"picture")
    groups = [Category("color", ("a hat",))]
    lay_out(by_category([tmp_path / "0.png"], groups, 1), groups, tmp_path)
    assert (tmp_path / "color" / "samples" / "a hat_000000.png").read_bytes() == b"picture"


def test_a_wrong_number_of_values() -> None:
    with pytest.raises(ValueError, match="expected 4 values, got 3"):
        by_category([1, 2, 3], [Category("color", ("a", "b"))], 2)
