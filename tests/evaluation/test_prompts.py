"""Cosines of images and prompts: which image meets which prompt, alone and in several processes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_runs import run_two

from hmar_cli.data.images import Example, ImageSource, unusable
from hmar_cli.errors import UserError
from hmar_cli.evaluation.prompts import ClipJudge, score_images

COUNT = 7


class Grey(ImageSource):
    """Plain images, brighter with every index, whose captions are numbers; one cannot be read."""

    def __init__(self, captioned: bool = True, broken: int = 4, silent: int = -1) -> None:
        super().__init__("grey", ("image",), COUNT, captioned=captioned)
        self.broken, self.silent = broken, silent

    def example(self, index: int) -> Example:
        if index == self.broken:
            return unusable(index, "broken")
        captions = () if index == self.silent else (str(index), "not this")
        return Example(index, Image.new("RGB", (4, 4), (10 * index,) * 3), 0, captions)


def judge() -> ClipJudge:
    """Vectors of one number: an image's brightness, and the number that a caption spells."""
    clip: Any = SimpleNamespace(
        preprocess=lambda image: torch.from_numpy(np.array(image)).float().permute(2, 0, 1),
        images=lambda pictures: pictures.mean(dim=(1, 2, 3))[:, None],
        texts=lambda captions: torch.tensor([[float(each)] for each in captions]),
        device=torch.device("cpu"),
        preprocessing={},
    )
    return ClipJudge("grey", clip, "", "0")


EXPECTED = {index: float(10 * index * index) for index in range(COUNT) if index != 4}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_image_meets_its_own_first_caption(batch_size: int) -> None:
    found = score_images(judge(), Grey(), batch_size=batch_size, shown=2)
    assert found.cosines == EXPECTED and found.prompts == ["0", "1", "2", "3", "5", "6"]
    assert (found.unreadable, found.error) == (1, "image 4: broken")
    assert [(prompt, cosine) for _, prompt, cosine in found.shown] == [("0", 0.0), ("1", 10.0)]
    assert set(score_images(judge(), Grey(), count=3).cosines) == {0, 1, 2}


def test_images_without_prompts() -> None:
    with pytest.raises(UserError, match="the images of grey have no prompts"):
        score_images(judge(), Grey(captioned=False))
    with pytest.raises(UserError, match="image 2 of grey has no prompt"):
        score_images(judge(), Grey(silent=2))


WORKER = """
import json
sys.path.insert(0, sys.argv[3])
from test_prompts import Grey, judge, score_images
own = score_images(judge(), Grey(), batch_size=2, share=(rank, 2))
found = own.gather()
print(json.dumps([len(own.cosines), list(found.cosines.items()), found.prompts, found.unreadable, found.error]))
"""


def test_two_processes_find_what_one_finds() -> None:
    printed = [json.loads(lines[-1]) for lines in run_two(WORKER, Path(__file__).parent)]
    assert [parts[0] for parts in printed] == [3, 3]  # images 0 2 (4) 6, and 1 3 5
    expected = [[index, value] for index, value in EXPECTED.items()]
    for parts in printed:
        assert parts[1:] == [expected, ["0", "1", "2", "3", "5", "6"], 1, "image 4: broken"]
