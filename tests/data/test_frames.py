"""Images of several sizes, cut for a network and in batches."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from hmar_cli.data.frames import FramedImages
from hmar_cli.data.images import Example, ImageSource, unusable
from hmar_cli.data.transforms import image_transform
from hmar_cli.errors import UserError


class Noise(ImageSource):
    """Noise of the given widths and heights; None cannot be read."""

    def __init__(self, sizes: Sequence[tuple[int, int] | None]) -> None:
        super().__init__("noise", ("image",), len(sizes))
        self.sizes = sizes

    def example(self, index: int) -> Example:
        size = self.sizes[index]
        if size is None:
            return unusable(index, "broken")
        rng = np.random.default_rng(index)
        return Example(index, Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)))


def test_every_image_at_its_own_size_less_what_the_stride_does_not_divide() -> None:
    source = Noise([(13, 9), (12, 8), (8, 12), (13, 9)])
    frames = FramedImages(source, 4, None, batch_size=8)
    batches = list(frames)
    assert [list(batch.shape) for batch in batches] == [[2, 3, 8, 12], [1, 3, 12, 8], [1, 3, 8, 12]]
    assert all(batch.dtype == torch.uint8 for batch in batches)
    assert frames.sizes == {(8, 12): 3, (12, 8): 1}
    whole = source.example(0).image
    assert whole is not None
    middle = np.asarray(whole)[0:8, 0:12]  # one row and one column are left: they go below and to the right
    assert np.array_equal(batches[0][0].permute(1, 2, 0), middle)


def test_one_size_for_all_is_that_of_the_transform() -> None:
    source = Noise([(13, 9), None, (8, 12), (20, 20), (9, 9)])
    frames = FramedImages(source, 4, (8, 8), "var", count=4, batch_size=2)
    assert [len(batch) for batch in frames] == [1, 2]
    assert (frames.unreadable, frames.error, frames.sizes) == (1, "image 1: broken", {(8, 8): 3})
    cut, image = image_transform(8, "var", train=False), source.example(2).image
    assert image is not None
    expected = cut(image)
    assert np.array_equal(list(frames)[1][0].permute(1, 2, 0), expected)


def test_processes_share_the_batches() -> None:
    source = Noise([(8, 8)] * 7)
    parts = [list(FramedImages(source, 4, None, batch_size=2, share=(rank, 3))) for rank in range(3)]
    assert [[len(batch) for batch in part] for part in parts] == [[2, 1], [2], [2]]
    whole = list(FramedImages(source, 4, None, batch_size=2))
    for place, batch in enumerate(whole):
        assert torch.equal(parts[place % 3][place // 3], batch)


def test_an_image_smaller_than_a_token() -> None:
    with pytest.raises(UserError, match="image 1 of noise is 9 x 3, smaller than a token"):
        list(FramedImages(Noise([(8, 8), (9, 3)]), 4, None))
