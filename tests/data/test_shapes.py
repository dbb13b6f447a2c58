import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hmar_cli.data.shapes import BACKGROUNDS, COLOURS, SHAPES, draw

CODE = (
    "import hashlib; from hmar_cli.data.shapes import draw\n"
    "print(hashlib.sha256(b''.join(draw(i, size=(32, 48)).image.tobytes() for i in range(8))).hexdigest())"
)


def pixels(index: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.asarray(draw(index, size=size, seed=seed).image)


def test_same_index_same_picture_in_another_process() -> None:
    import hashlib

    here = hashlib.sha256(b"".join(draw(i, size=(32, 48)).image.tobytes() for i in range(8))).hexdigest()
    there = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert there.strip() == here


def test_index_and_seed_change_the_picture() -> None:
    drawn = {pixels(i, (16, 16), seed).tobytes() for i in range(20) for seed in (0, 1)}
    assert len(drawn) == 40


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (24, 40), (256, 256)])
def test_size(size: tuple[int, int]) -> None:
    image = draw(3, size=size).image
    assert (image.size, image.mode) == ((size[1], size[0]), "RGB")


def test_one_index_is_the_same_picture_at_every_size() -> None:
    for index in range(12):
        small = pixels(index, (32, 32)).astype(float)
        large = np.asarray(draw(index, size=(128, 128)).image.resize((32, 32), Image.Resampling.BOX)).astype(
            float
        )
        assert np.abs(small - large).mean() < 4


def test_captions_and_labels_tell_what_is_drawn() -> None:
    seen = set()
    for index in range(300):
        drawing = draw(index, size=(8, 8))
        words = drawing.caption.split()
        assert words[0] in ("a", "an") and words[3:5] == ["on", "a"] and words[6] == "background"
        assert words[2] == SHAPES[drawing.label]
        assert words[1] in COLOURS and words[5] in BACKGROUNDS and words[1] != words[5]
        assert (words[0] == "an") == (words[1][0] in "aeiou")
        seen.add(drawing.label)
    assert seen == set(range(len(SHAPES)))


def test_the_shape_has_its_colour_and_stays_inside() -> None:
    for index in range(60):
        drawing = draw(index, size=(64, 64))
        colour, background = drawing.caption.split()[1], drawing.caption.split()[5]
        image = np.asarray(drawing.image).astype(float)
        near_shape = np.linalg.norm(image - COLOURS[colour], axis=-1)
        near_background = np.linalg.norm(image - BACKGROUNDS[background], axis=-1)
        share = (near_shape < near_background).mean()
        assert 0.03 < share < 0.6, drawing.caption
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.linalg.norm(corners - BACKGROUNDS[background], axis=-1).max() < 90


def test_edges_are_smooth() -> None:
    ring = next(i for i in range(100) if SHAPES[draw(i, size=(8, 8)).label] == "circle")
    image = pixels(ring, (64, 64)).astype(int).sum(-1)
    assert len(np.unique(image)) > 40
