import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from hmar_cli.data.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    Split,
    Thing,
    all_scenes,
    draw,
    parse,
    prompts,
)

CODE = (
    "import hashlib; from hmar_cli.data.scenes import draw\n"
    "print(hashlib.sha256(b''.join(draw(i, size=(32, 48)).image.tobytes() for i in range(8))).hexdigest())"
)


def pixels(index: int, size: tuple[int, int], seed: int = 0, split: Split = "all") -> np.ndarray:
    return np.asarray(draw(index, size=size, seed=seed, split=split).image)


def test_same_index_same_picture_in_another_process() -> None:
    here = hashlib.sha256(b"".join(draw(i, size=(32, 48)).image.tobytes() for i in range(8))).hexdigest()
    there = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert there.strip() == here


def test_index_seed_and_split_change_the_picture() -> None:
    splits: tuple[Split, ...] = ("all", "train", "test")
    drawn = {pixels(i, (16, 16), s, split).tobytes() for i in range(9) for s in (0, 1) for split in splits}
    assert len(drawn) == 54


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (24, 40), (256, 256)])
def test_size(size: tuple[int, int]) -> None:
    image = draw(3, size=size).image
    assert (image.size, image.mode) == ((size[1], size[0]), "RGB")


def test_one_index_is_the_same_picture_at_every_size() -> None:
    for index in range(12):
        small = pixels(index, (32, 32)).astype(float)
        image = draw(index, size=(128, 128)).image.resize((32, 32), Image.Resampling.BOX)
        assert np.abs(small - np.asarray(image).astype(float)).mean() < 2


def test_objects_lie_inside_apart_and_where_the_caption_says() -> None:
    for index in range(150):
        drawing = draw(index, size=(64, 64))
        scene, image = parse(drawing.caption), pixels(index, (64, 64)).astype(float)
        background = image[0, 0]
        frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert np.abs(frame - background).max() < 40, drawing.caption
        middles = []
        for thing in (scene.first, scene.second):
            mask = np.linalg.norm(image - np.asarray(COLOURS[thing.colour]), axis=-1) < 40
            assert 0.015 < mask.mean() < 0.12, drawing.caption
            middles.append(np.argwhere(mask).mean(axis=0))
        step, place = middles[0] - middles[1], np.asarray(RELATIONS[scene.relation])
        assert step @ place > 25 and np.abs(step @ place[::-1]) < 12, drawing.caption
        plain = (np.abs(image - background).max(axis=-1) < 12).reshape(-1, 64)
        across = plain.all(axis=0) if place[1] else plain.all(axis=1)
        between = sorted(round(float(m @ np.abs(place))) for m in middles)
        assert across[between[0] : between[1]].any(), f"{drawing.caption}: no gap"


def test_captions_of_all_colours_shapes_and_relations() -> None:
    scenes = [parse(draw(i, size=(8, 8)).caption) for i in range(600)]
    assert {scene.relation for scene in scenes} == set(RELATIONS)
    for place in ("first", "second"):
        things = Counter((getattr(s, place).colour, getattr(s, place).shape) for s in scenes)
        assert set(things) == {(c, s) for c in COLOURS for s in SHAPES}
    assert any(s.first.shape == s.second.shape for s in scenes)
    assert all(s.first.colour != s.second.colour for s in scenes)


def test_the_splits_share_no_picture() -> None:
    everything, train, test = (all_scenes(split) for split in ("all", "train", "test"))
    # ordered pairs of 30 things that differ in colour, in four places
    assert len(set(everything)) == len(everything) == 30 * 25 * 4
    assert len(test) == len(everything) // 10
    assert set(train) | set(test) == set(everything) and not set(train) & set(test)
    for split in (train, test):  # a picture can be said in two ways, and both are in its split
        assert {scene.mirrored for scene in split} == set(split)
    # every object and every place are learned
    assert {s.first for s in train} == {s.second for s in train} == {s.first for s in everything}
    assert {parse(draw(i, size=(8, 8), split="test").caption) for i in range(100)} <= set(test)


def test_prompts_are_distinct_before_they_repeat() -> None:
    first = prompts(300, seed=1, split="test")
    assert len(set(first)) == 300 and first != prompts(300, seed=2, split="test")
    more = prompts(450, seed=1, split="test")
    assert more[:300] == first and len(set(more[300:])) == 150
    assert prompts(0) == []


def test_captions_are_read_back() -> None:
    for scene in all_scenes()[::37]:
        assert parse(str(scene)) == scene
    scene = Scene(Thing("red", "circle"), "left of", Thing("blue", "square"))
    assert str(scene) == "a red circle left of a blue square"
    assert parse("The red circle LEFT of a blue square.") == scene
    assert str(scene.mirrored) == "a blue square right of a red circle"
    assert scene.mirrored.mirrored == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red circle",
        "a red circle near a blue square",
        "a red circle left a blue square",
        "a pink circle left of a blue square",
        "a red heart left of a blue square",
        "a red circle left of a red square",
        "red circle left of blue square",
    ],
)
def test_other_texts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="a red circle left of a blue square"):
        parse(prompt)


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="expected a split of all, train, test, got 'val'"):
        draw(0, size=(8, 8), split="val")  # type: ignore[arg-type]
