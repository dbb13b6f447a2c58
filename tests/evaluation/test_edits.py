"""Measuring fills, with fills whose answers are known."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.evaluation.edits import (
    HIGHEST,
    MASKS,
    HeldOut,
    Report,
    Row,
    measure_fills,
    psnr,
    read_held_out,
    region_of,
    seam,
    yardsticks,
)
from hmar_cli.evaluation.extractors import Extractor, Features
from hmar_cli.models.classifier import ImageClassifier

Pixels = np.ndarray
COUNT, SIZE = 7, (16, 16)


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return read_held_out(open_source("builtin:shapes?seed=3", size=SIZE), SIZE, COUNT)


@pytest.fixture(scope="module")
def network() -> ImageClassifier:
    torch.manual_seed(0)
    built = ImageClassifier(channels=8, multipliers=[1, 2], res_blocks=1, num_classes=8)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built.eval()


def measure(network: ImageClassifier, held_out: HeldOut, fills: dict[str, Any], **more: Any) -> Report:
    def look(pixels: torch.Tensor) -> Features:
        features = network.features(pixels / 127.5 - 1)
        return Features(features, logits=network.head(features))

    names = more.pop("class_names", held_out.class_names)
    place = torch.device("cpu")
    extractor = Extractor(name="toy", fingerprint="", look=look, device=place, class_names=names, size=SIZE)
    return measure_fills(extractor, held_out, fills, **{"seed": 5, **more})


def rows(report: Report, fill: str) -> list[Row]:
    found = [row for row in report.rows if row.fill == fill]
    assert [row.mask for row in found] == list(MASKS)
    return found


def keep(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
    return pictures


def test_a_model_that_returns_the_original_is_perfect(network: ImageClassifier, held_out: HeldOut) -> None:
    report = measure(network, held_out, {"model": keep})
    for row in rows(report, "model"):
        assert row.psnrs == [HIGHEST] * COUNT
        assert max(row.distances) < 1e-4 and row.frechet < 1e-6
        assert row.right == report.right


def test_classes_of_one_name_are_told_apart_by_the_same_list_alone(held_out: HeldOut) -> None:
    """ImageNet has two cranes."""
    twins = dataclasses.replace(held_out, class_names=("crane",) * 8)
    original = iter(held_out.labels)

    def look(pixels: torch.Tensor) -> Features:
        named = torch.tensor([next(original, 0) for _ in pixels])
        return Features(pixels.float().mean(dim=(2, 3)), logits=torch.eye(8)[named])

    place = torch.device("cpu")
    judge = Extractor(name="", fingerprint="", look=look, device=place, class_names=twins.class_names)
    report = measure_fills(judge, twins, {"model": keep}, masks=("half",))
    assert report.labelled and report.right == COUNT and len(set(held_out.labels)) > 1
    other = dataclasses.replace(judge, class_names=("crane",) * 9)
    assert not measure_fills(other, twins, {"model": keep}, masks=("half",)).labelled


def test_a_model_that_returns_another_picture_is_chance(network: ImageClassifier, held_out: HeldOut) -> None:
    chance = yardsticks(held_out, 5)["another picture"]

    def model(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
        others = chance(numbers, pictures, region)
        assert all((other != picture).any() for other, picture in zip(others, pictures, strict=True))
        return others

    report = measure(network, held_out, {"model": model, **yardsticks(held_out, 5)})
    for ours, theirs in zip(rows(report, "model"), rows(report, "another picture"), strict=True):
        assert (ours.psnrs, ours.distances, ours.frechet, ours.right) == (
            theirs.psnrs,
            theirs.distances,
            theirs.frechet,
            theirs.right,
        )
        assert np.mean(ours.psnrs) < 20 and np.mean(ours.distances) > 0.01


def test_psnr_of_a_known_error_within_the_region_alone(network: ImageClassifier, held_out: HeldOut) -> None:
    def shifted(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
        """Off by 10 within the region, and nonsense outside, which must not count."""
        off = np.where(pictures > 127, pictures - 10, pictures + 10).astype(np.uint8)
        return np.where(region[None, :, :, None] > 0, off, 255 - pictures)

    report = measure(network, held_out, {"model": shifted}, shown=2)
    for row in rows(report, "model"):
        assert row.psnrs == pytest.approx([20 * math.log10(25.5)] * COUNT)
        assert len(row.shown) == 2
        for number, picture in enumerate(row.shown):
            outside = region_of(row.mask, SIZE, 5, number) == 0
            assert (picture[outside] == held_out.pixels[number][outside]).all()
    half = np.zeros((4, 4), np.uint8)
    half[:2] = 255
    white, black = np.full((4, 4, 3), 255, np.uint8), np.zeros((4, 4, 3), np.uint8)
    assert psnr(white, black, half) == 0 and psnr(white, white, half) == HIGHEST


def test_seams_are_steps_of_colour_across_the_edge() -> None:
    region = np.zeros((6, 6), np.uint8)
    region[2:4, 3:] = 255
    picture = np.full((6, 6, 3), 50, np.uint8)
    assert seam(picture, region) == 0
    picture[2:4, 3:] = (60, 20, 50)  # steps of 10, 30 and 0
    assert seam(picture, region) == pytest.approx(40 / 3)
    picture[0, 0] = 255  # a step that lies elsewhere
    picture[2, 5], picture[1, 5] = 255, 55  # one of the eight pairs across the edge
    assert seam(picture, region) == pytest.approx((7 * 40 / 3 + 200) / 8)


def test_distances_are_those_of_the_classifiers_features(network: ImageClassifier, held_out: HeldOut) -> None:
    def inverted(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
        return 255 - pictures

    row = rows(measure(network, held_out, {"model": inverted}), "model")[1]
    place = held_out.class_names.index
    right = 0
    with torch.inference_mode():
        for number in range(COUNT):
            picture = held_out.pixels[number].copy()
            picture[:, SIZE[1] // 2 :] = 255 - picture[:, SIZE[1] // 2 :]
            both = np.stack([picture, held_out.pixels[number]])
            features = network.features(torch.from_numpy(both).permute(0, 3, 1, 2) / 127.5 - 1)
            assert row.distances[number] == pytest.approx(float((features[0] - features[1]).norm()), rel=1e-4)
            named = held_out.class_names[held_out.labels[number]]
            right += int(network.head(features[0]).argmax()) == place(named)
    assert row.right == right and row.frechet > 0


def test_batches_change_nothing(network: ImageClassifier, held_out: HeldOut) -> None:
    seen: list[tuple[int, bytes]] = []

    def note(numbers: Sequence[int], pictures: Pixels, region: Pixels) -> Pixels:
        assert (pictures == held_out.pixels[list(numbers)]).all()
        seen.extend((number, region.tobytes()) for number in numbers)
        return pictures // 2

    reports = [measure(network, held_out, {"model": note}, batch_size=size) for size in (1, 3, 32)]
    third = len(seen) // 3
    assert seen[:third] == seen[third : 2 * third] == seen[2 * third :] and third == len(MASKS) * COUNT
    for report in reports[1:]:
        for ours, theirs in zip(report.rows, reports[0].rows, strict=True):
            assert ours.psnrs == theirs.psnrs
            assert ours.distances == pytest.approx(theirs.distances, rel=1e-3)


def test_the_mean_of_what_is_kept() -> None:
    pixels = np.full((2, 8, 8, 3), 40, np.uint8)
    pixels[:, :, 4:] = 200
    held_out = HeldOut("planted", pixels, (0, 0), ("image",), ("", ""))
    region = region_of("half", (8, 8), 0, 0)
    filled = yardsticks(held_out, 0)["mean colour"]((0, 1), pixels, region)
    assert (filled == 40).all()


def test_another_picture_is_any_other() -> None:
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    held_out = HeldOut("planted", pixels, (0,) * 4, ("image",), ("",) * 4)
    found: dict[int, set[int]] = {number: set() for number in range(4)}
    for seed in range(40):
        chosen = yardsticks(held_out, seed)["another picture"](range(4), pixels, pixels[0, ..., 0])
        for number in range(4):
            found[number].add(int(chosen[number, 0, 0, 0]))
    assert found == {number: {0, 1, 2, 3} - {number} for number in range(4)}


def test_regions() -> None:
    centre, half = (region_of(mask, (8, 12), 0, 0) for mask in ("centre", "half"))
    assert (centre[2:6, 3:9] == 255).all() and (centre > 0).sum() == 24
    assert (half[:, 6:] == 255).all() and (half > 0).sum() == 48
    shares = []
    for number in range(60):
        for size in ((32, 32), (24, 40)):
            region = region_of("free-form", size, 1, number)
            assert region.shape == size and set(np.unique(region)) == {0, 255}
            assert (region == region_of("free-form", size, 1, number)).all()
            assert (region != region_of("free-form", size, 2, number)).any()
            assert (region != region_of("free-form", size, 1, number + 1)).any()
            shares.append(region.mean() / 255)
    assert min(shares) > 0.1 and max(shares) < 0.75 and 0.2 < np.mean(shares) < 0.4
    small, large = (region_of("free-form", (n, n), 1, 0) for n in (32, 128))
    assert (
        large.reshape(32, 4, 32, 4).mean(axis=(1, 3)).round() == small
    ).mean() > 0.8  # alike at every size
    with pytest.raises(ValueError, match="expected a mask of"):
        region_of("left", (8, 8), 0, 0)


def test_classes_that_the_classifier_does_not_know(network: ImageClassifier, held_out: HeldOut) -> None:
    report = measure(network, held_out, {"model": keep}, class_names=("cat", *held_out.class_names[1:]))
    assert not report.labelled
    row = report.rows[0].describe(report.labelled)
    assert "accuracy" not in row and row["psnr"] == HIGHEST and row["psnr_error"] == 0


def test_pictures_of_another_size_than_the_classifiers(network: ImageClassifier) -> None:
    large = read_held_out(open_source("builtin:shapes?seed=3", size=32), 32, 3)
    report = measure(network, large, {"model": keep})
    assert all(row.frechet < 1e-6 and max(row.distances) < 1e-4 for row in report.rows)


def test_pictures_that_cannot_be_read() -> None:
    class Broken(ImageSource):
        def example(self, index: int) -> Example:
            if index % 2:
                return Example(index, None, error="torn")
            return open_source("builtin:shapes", size=8).example(index)

    found = read_held_out(Broken("broken", ("image",), 6), 8, 10)
    assert (len(found.pixels), found.unreadable, found.error) == (3, 3, "image 1: torn")
    with pytest.raises(UserError, match="broken has 1 images that can be read"):
        read_held_out(Broken("broken", ("image",), 2), 8, 10)
