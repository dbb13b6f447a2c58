"""Folders of generated images as sources."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hmar_cli.data.samples import read_samples
from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError


def write(folder: Path, images: int, **about: Any) -> Path:
    """What `hmar sample` writes; image i is of grey level 10 i."""
    folder.mkdir(exist_ok=True)
    for i in range(images):
        Image.new("RGB", (4, 4), (10 * i,) * 3).save(folder / f"{i:06d}.png")
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    Image.new("RGB", (2, 2)).save(folder / "000000-pivots.png")
    (folder / "sample.json").write_text(json.dumps(about))
    return folder


def test_an_image_has_the_class_that_it_was_drawn_as(tmp_path: Path) -> None:
    folder = write(tmp_path, 5, labels=[7, 2, 7], class_names=["dog", "cat", "dog"], count=5)
    source = open_source(str(folder))
    assert source.class_names == ("cat", "dog") and len(source) == 5  # by their labels, as in the model
    examples = list(source.read(0, 99))
    assert [source.class_names[each.label] for each in examples] == ["dog", "cat", "dog", "dog", "cat"]
    assert [each.image and each.image.getpixel((0, 0)) for each in examples] == [
        (10 * i,) * 3 for i in range(5)
    ]
    assert source[3].index == 3 and source[3].label == 1


def test_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    """ImageNet has two cranes."""
    source = open_source(str(write(tmp_path, 4, labels=[0, 5], class_names=["crane", "crane"])))
    assert source.class_names == ("crane", "crane") and [each.label for each in source.read(0, 4)] == [
        0,
        1,
        0,
        1,
    ]


def test_an_image_has_the_prompt_that_it_was_drawn_for(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path, 3, prompts=["a cat", "a dog"])))
    assert source.captioned and [each.caption for each in source.read(0, 3)] == ["a cat", "a dog", "a cat"]


def test_without_classes_all_images_are_of_one(tmp_path: Path) -> None:
    for about in ({"prompts": ["a cat"]}, {"labels": [1, 2], "class_names": ["cat"]}):
        source = open_source(str(write(tmp_path, 2, **about)))
        assert source.class_names == ("image",) and [each.label for each in source.read(0, 2)] == [0, 0]


def test_any_folder_of_images_is_a_source(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    source = open_source(str(tmp_path))
    assert source.class_names == ("cat", "dog") and len(source) == 2


def test_a_broken_image_is_told_where_it_stands(tmp_path: Path) -> None:
    (write(tmp_path, 2) / "000001.png").write_bytes(b"no image")
    fine, broken = open_source(str(tmp_path)).read(0, 2)
    assert fine.image is not None and broken.image is None
    assert broken.index == 1 and "UnidentifiedImageError" in broken.error


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            open_source(str(folder))
        assert caught.value.hint
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "no such source" in message(tmp_path / "nowhere")
    assert "no images" in message(tmp_path / "empty")
    assert "no images" in message(write(tmp_path / "none", 0))
    assert "000003.png is missing" in message(write(tmp_path / "few", 3, count=4))
    (tmp_path / "none" / "sample.json").write_text("[1]")
    assert "holds no settings" in message(tmp_path / "none")
    with pytest.raises(UserError, match=r"no sample\.json"):
        read_samples(tmp_path / "empty")
