import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cache import settings_for, shapes, write

from hmar_cli.data import batches
from hmar_cli.data.ahead import ordered_map, prefetch
from hmar_cli.data.batches import cache_batches, epoch_length, image_batches, order
from hmar_cli.data.cache import Cache
from hmar_cli.data.images import Example
from hmar_cli.data.sources import DrawnSource, open_source
from hmar_cli.data.transforms import image_transform
from hmar_cli.data.writer import CacheWriter
from hmar_cli.errors import UserError


def take(iterator: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(iterator, count))


def test_order_covers_every_epoch_and_shuffles() -> None:
    length = epoch_length(23, 5)
    assert length == 4
    steps = take(order(23, batch_size=5, seed=1), 3 * length)
    assert [epoch for epoch, _ in steps] == [0] * 4 + [1] * 4 + [2] * 4
    epochs = [np.concatenate([i for e, i in steps if e == epoch]) for epoch in range(3)]
    for places in epochs:
        assert len(set(places)) == 20 and places.min() >= 0 and places.max() < 23
    assert not np.array_equal(epochs[0], epochs[1])
    other = np.concatenate([i for _, i in take(order(23, batch_size=5, seed=2), length)])
    assert not np.array_equal(epochs[0], other)


def test_order_can_start_anywhere() -> None:
    whole = take(order(23, batch_size=5, seed=1), 11)
    for start in (0, 3, 4, 7):
        for (e, i), (f, j) in zip(
            take(order(23, batch_size=5, seed=1, start=start), 4), whole[start:], strict=False
        ):
            assert e == f
            np.testing.assert_array_equal(i, j)


def test_processes_share_what_one_would_take() -> None:
    alone = take(order(50, batch_size=6, seed=3, start=5), 9)
    parts = [take(order(50, batch_size=2, seed=3, start=5, rank=rank, world=3), 9) for rank in range(3)]
    for step, (epoch, indices) in enumerate(alone):
        np.testing.assert_array_equal(indices, np.concatenate([part[step][1] for part in parts]))
        assert all(part[step][0] == epoch for part in parts)


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(UserError, match="3 images are fewer than the 4"):
        next(order(3, batch_size=2, seed=0, world=2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return write(tmp_path_factory.mktemp("cache") / "c")


def test_cache_batches_match_the_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "FETCH", 8)  # two batches at once, across the ends of epochs
    views: set[int] = set()
    for batch in take(cache_batches(cache, batch_size=3, seed=0), 14):
        assert (batch["tokens"].dtype, batch["label"].dtype) == (torch.int64, torch.int64)
        index = batch["index"].numpy()
        np.testing.assert_array_equal(batch["label"], cache.labels[index])
        both = [cache.fetch("tokens", index, np.full(3, view)) for view in (0, 1)]
        for row, tokens in enumerate(batch["tokens"].numpy()):
            found = [view for view in (0, 1) if np.array_equal(tokens, both[view][row])]
            assert found
            views |= set(found) if len(found) == 1 else set()
    assert views == {0, 1}


def speed(cache: Cache, batches: int) -> float:
    """Images that one process gets from a cache a second, at the best of five times: others may use the cores."""
    stream = cache_batches(cache, batch_size=256, seed=0)
    take(stream, 20)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        read = sum(len(batch["label"]) for batch in take(stream, batches))
        rates.append(read / (time.perf_counter() - start))
    return max(rates)


def test_one_process_gets_50000_cached_images_a_second(tmp_path: Path) -> None:
    """Of 680 tokens each, from several shards in a random order."""

    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": np.random.default_rng(0).integers(4096, size=(len(pixels), 680)).astype(np.uint16)}

    source = shapes(2000)
    sides = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    writer = CacheWriter(tmp_path, source, settings_for(source, scales=sides, shard_size=500), encode)
    writer.begin()
    writer.run()
    writer.finish()
    assert speed(Cache.open(tmp_path), 50) >= 50_000


def test_one_process_gets_5000_images_of_moments_a_second(tmp_path: Path) -> None:
    """Of KL-16's size at 256 and 128 pixels, 20 kB each; an H100 trains on fewer."""

    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        rng, count = np.random.default_rng(0), len(pixels)
        shapes = {"moments": (count, 32, 16, 16), "pivot_moments": (count, 32, 8, 8)}
        return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}

    source = shapes(600)
    writer = CacheWriter(tmp_path, source, settings_for(source, kind="moments", shard_size=200), encode)
    writer.begin()
    writer.run()
    writer.finish()
    assert speed(Cache.open(tmp_path), 20) >= 5_000


def test_cache_batches_can_start_anywhere(cache: Cache) -> None:
    whole = take(cache_batches(cache, batch_size=3, seed=0), 20)
    for start in (1, 5, 6, 13):
        again = take(cache_batches(cache, batch_size=3, seed=0, start=start), 5)
        for mine, theirs in zip(again, whole[start:], strict=False):
            for name in ("tokens", "label", "index"):
                assert torch.equal(mine[name], theirs[name])


def test_views_do_not_depend_on_processes(cache: Cache) -> None:
    alone = take(cache_batches(cache, batch_size=4, seed=2), 7)
    parts = [take(cache_batches(cache, batch_size=2, seed=2, rank=rank, world=2), 7) for rank in (0, 1)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch["tokens"], torch.cat([part[step]["tokens"] for part in parts]))


def test_without_mirrored_views(cache: Cache) -> None:
    for batch in take(cache_batches(cache, batch_size=4, seed=0, mirror=False), 10):
        plain = cache.fetch("tokens", batch["index"].numpy(), np.zeros(4, np.int64))
        np.testing.assert_array_equal(batch["tokens"], plain)


def images(**changes: Any) -> Iterator[dict[str, torch.Tensor]]:
    arguments: dict[str, Any] = {"size": 12, "crop": "adm", "mirror": False, "batch_size": 4, "seed": 0}
    return image_batches(shapes(), **(arguments | changes))


def test_images_are_the_sources() -> None:
    source = shapes()
    for batch in take(images(), 8):
        assert (batch["image"].shape, batch["image"].dtype) == ((4, 3, 12, 12), torch.uint8)
        for image, label, index in zip(batch["image"], batch["label"], batch["index"], strict=True):
            example = source[int(index)]
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(example.image))
            assert label == example.label


@pytest.mark.parametrize("keep", [0, 5000, 1 << 30])
def test_images_do_not_depend_on_start_processes_workers_or_memory(
    keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"crop": "var", "mirror": True, "size": [8, 10]}
    whole = take(images(**chosen), 13)
    monkeypatch.setattr(batches, "KEEP", keep)
    for start in (2, 5, 11):
        again = take(images(**chosen, start=start, workers=3), 2)
        parts = [take(images(**chosen, start=start, batch_size=2, rank=r, world=2), 2) for r in (0, 1)]
        for step in range(2):
            assert torch.equal(again[step]["image"], whole[start + step]["image"])
            joined = torch.cat([part[step]["image"] for part in parts])
            assert torch.equal(joined, whole[start + step]["image"])


def test_mirror_and_crops_are_random_and_real() -> None:
    source = shapes()
    cut = image_transform(12, "var", train=True)
    mirrored = total = 0
    places = set()
    for batch in take(images(crop="var", mirror=True), 25):
        for image, index in zip(batch["image"].permute(0, 2, 3, 1).numpy(), batch["index"], strict=True):
            scaled = cut.resized(source[int(index)].image)  # type: ignore[arg-type]
            found = [
                (top, left, flip)
                for top in range(3)
                for left in range(3)
                for flip in (False, True)
                if np.array_equal(image[:, ::-1] if flip else image, scaled[top : top + 12, left : left + 12])
            ]
            assert found
            total += 1
            mirrored += found[0][2]
            places.add(found[0][:2])
    assert 0.35 < mirrored / total < 0.65
    assert len(places) == 9


def test_unusable_images_are_replaced_with_one_warning(
    make_parquet: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(str(make_parquet(label=[None, 1, 2, 3, None, None])))
    settings: dict[str, Any] = {"size": 8, "crop": "adm", "mirror": False, "batch_size": 6, "seed": 0}
    (batch,) = take(image_batches(source, **settings), 1)
    by_index = dict(zip(batch["index"].tolist(), batch["label"].tolist(), strict=True))
    assert by_index == {0: 1, 1: 1, 2: 2, 3: 3, 4: 1, 5: 1}
    used = dict(zip(batch["index"].tolist(), batch["used"].tolist(), strict=True))
    assert used == {0: 1, 1: 1, 2: 2, 3: 3, 4: 1, 5: 1}  # labels are the numbers of the images
    warning = capsys.readouterr().err
    assert warning.count("warning:") == 1 and "no label" in warning


def test_streams_and_empty_data_are_refused(make_parquet: Callable[..., Path]) -> None:
    path = make_parquet(label=[5, 5, 5, 5, 5, 5])
    settings: dict[str, Any] = {"size": 8, "crop": "adm", "mirror": False, "batch_size": 2, "seed": 0}
    with pytest.raises(UserError, match="is a stream"):
        image_batches(open_source(f"{path}?streaming=true&classes=9"), **settings)
    with pytest.raises(UserError, match="no image of"):
        next(image_batches(open_source(f"{path}?classes=3"), **settings))


def test_ordered_map_keeps_order_and_raises_in_place() -> None:
    def halve(number: int) -> float:
        if number == 30:
            raise ValueError("thirty")
        return number / 2

    for workers in (0, 1, 3):
        results = ordered_map(halve, range(100), workers)
        assert take(results, 30) == [i / 2 for i in range(30)]
        with pytest.raises(ValueError, match="thirty"):
            next(results)


def test_prefetch_passes_items_errors_and_stops_when_closed() -> None:
    def numbers(stop: int) -> Iterator[int]:
        yield from range(stop)
        raise ValueError("end")

    ahead = prefetch(numbers(5), depth=2)
    assert take(ahead, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="end"):
        next(ahead)
    assert list(prefetch(range(7))) == list(range(7))
    endless = prefetch(itertools.count())
    assert next(endless) == 0
    endless.close()  # returns, so its thread has ended


def both_sizes(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Stands in for a KL autoencoder: each picture's mean colours by column, whole and of its left half."""
    columns = pixels.mean(1).transpose(0, 2, 1).astype(np.float16)  # n 3 W
    return {"moments": columns[:, :, None], "pivot_moments": columns[:, :, None, :6]}


def numbered(captions: list[str]) -> np.ndarray:
    return np.array([[len(each), 7] for each in captions], np.uint16)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Moments of 24 drawings, mirrored too, each with the captions of three lengths."""

    class Texts(DrawnSource):
        def example(self, index: int) -> Example:
            return replace(super().example(index), captions=("a", "bb", "ccc"))

    folder = tmp_path_factory.mktemp("latents") / "c"
    drawn = shapes(24)
    assert isinstance(drawn, DrawnSource)
    source = Texts(drawn.name, drawn.class_names, 24, drawn.draw)
    settings = settings_for(source, kind="moments", captions=3, text="ids:2", pivot_size=(6, 6))
    writer = CacheWriter(folder, source, settings, both_sizes, numbered)
    writer.begin()
    writer.run()
    writer.finish()
    return Cache.open(folder)


@pytest.mark.parametrize("threaded", [False, True])
def test_moments_share_a_view_and_captions_are_chosen_apart(
    latents: Cache, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "THREADED", 0 if threaded else 1 << 30)
    every = np.arange(24)
    stored = [
        {name: latents.fetch(name, every, np.full(24, view)) for name in ("moments", "pivot_moments")}
        for view in (0, 1)
    ]
    seen: dict[tuple[int, int], int] = {}
    for batch in take(cache_batches(latents, batch_size=4, seed=0), 150):
        assert {name: tensor.dtype for name, tensor in batch.items()} == {
            "moments": torch.float32,
            "pivot_moments": torch.float32,
            "text": torch.int64,
            "label": torch.int64,
            "index": torch.int64,
        }
        assert (batch["moments"].shape, batch["pivot_moments"].shape) == ((4, 3, 1, 12), (4, 3, 1, 6))
        for row, index in enumerate(batch["index"].tolist()):
            (view,) = (
                v for v in (0, 1) if np.array_equal(batch["moments"][row], stored[v]["moments"][index])
            )
            np.testing.assert_array_equal(batch["pivot_moments"][row], stored[view]["pivot_moments"][index])
            length, other = batch["text"][row].tolist()
            assert other == 7
            seen[view, length] = seen.get((view, length), 0) + 1
    assert set(seen) == set(itertools.product((0, 1), (1, 2, 3)))
    assert min(seen.values()) > 0.7 * 600 / 6  # every view comes with every caption


def test_rows_of_moments_can_start_anywhere_and_be_shared(latents: Cache) -> None:
    whole = take(cache_batches(latents, batch_size=4, seed=3), 14)
    for start in (2, 6, 11):
        again = take(cache_batches(latents, batch_size=4, seed=3, start=start), 3)
        parts = [
            take(cache_batches(latents, batch_size=2, seed=3, start=start, rank=r, world=2), 3)
            for r in (0, 1)
        ]
        for step in range(3):
            for name, tensor in whole[start + step].items():
                assert torch.equal(again[step][name], tensor)
                assert torch.equal(torch.cat([part[step][name] for part in parts]), tensor)
