import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import Classes

from hmar_cli.data.cache import Cache, CacheSettings
from hmar_cli.data.images import ImageSource
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import image_transform
from hmar_cli.data.verify import verify_sample
from hmar_cli.data.writer import CacheWriter
from hmar_cli.errors import UserError
from hmar_cli.files import file_sha256

LENGTH = 6


def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Stands in for a tokenizer: weighted sums of pixels, which tell a picture from its mirror image."""
    weighted = pixels * np.arange(1, pixels.shape[2] + 1)[:, None]
    sums = weighted.reshape(len(pixels), LENGTH, -1).sum(-1)
    return {"tokens": (sums % 4096).astype(np.uint16)}


def settings_for(source: ImageSource, **changes: Any) -> CacheSettings:
    settings = CacheSettings(
        source=source.name,
        length=source.length,
        class_names=source.class_names,
        tokenizer_hash="f00d",
        scales=[1, [1, 2], [1, 3]],
        vocab_size=4096,
        size=(12, 12),
        crop="adm",
        mirror=True,
        shard_size=8,
    )
    return replace(settings, **changes)


def shapes(count: int = 20) -> ImageSource:
    return open_source(f"builtin:shapes?count={count}", size=12)


def write(out: Path, source: ImageSource | None = None, batch_size: int = 3, **changes: Any) -> Cache:
    source = shapes() if source is None else source
    writer = CacheWriter(out, source, settings_for(source, **changes), encode, batch_size=batch_size)
    writer.begin()
    writer.run()
    writer.finish()
    return Cache.open(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected(source: ImageSource, index: int, mirrored: bool) -> np.ndarray:
    image = source[index].image
    assert image is not None
    pixels = image_transform(12, "adm", train=False)(image)
    return encode((pixels[:, ::-1] if mirrored else pixels)[None])["tokens"][0]


def test_batches_hold_what_was_encoded(tmp_path: Path) -> None:
    cache, source = write(tmp_path / "c"), shapes()
    assert (len(cache), cache.manifest.views, len(cache.manifest.shards)) == (20, 2, 3)
    rng = np.random.default_rng(0)
    indices, views = rng.permutation(20)[:13], rng.integers(0, 2, 13)
    tokens = cache.fetch("tokens", indices, views)
    assert (tokens.dtype, tokens.shape) == (np.uint16, (13, LENGTH))
    for row, (index, view) in enumerate(zip(indices, views, strict=True)):
        np.testing.assert_array_equal(tokens[row], expected(source, int(index), bool(view)))
        assert cache.labels[index] == source[int(index)].label
    assert cache.captions(indices) == [source[int(index)].captions for index in indices]


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    cache = write(tmp_path / "c")
    for index, view in ((20, 0), (-1, 0), (0, 2)):
        with pytest.raises(IndexError):
            cache.fetch("tokens", np.array([index]), np.array([view]))


def test_manifest(tmp_path: Path) -> None:
    cache = write(tmp_path / "c")
    manifest = cache.manifest
    assert manifest.kind == "tokens"
    assert manifest.arrays == {"tokens": {"dtype": "uint16", "shape": [LENGTH], "per": "view"}}
    assert sum(manifest.label_counts) == 20
    np.testing.assert_array_equal(manifest.label_counts, np.bincount(cache.labels, minlength=8))
    assert manifest.transform == {"size": [12, 12], "crop": "adm", "crops": 1, "mirror": True, "seed": 0}
    assert tuple(manifest.class_names) == shapes().class_names
    assert manifest.captioned and manifest.captions == 0
    assert cache.size == sum(
        p.stat().st_size for p in (tmp_path / "c/shards").iterdir() if p.suffix != ".json"
    )


def test_batch_size_and_processes_change_nothing(tmp_path: Path) -> None:
    whole = contents(write(tmp_path / "a").path)
    source = shapes()
    for rank in (1, 0):
        writer = CacheWriter(tmp_path / "b", source, settings_for(source), encode, batch_size=3)
        writer.begin()
        writer.run(rank, 2)
    writer.finish()
    assert contents(tmp_path / "b") == whole
    other = write(tmp_path / "c", batch_size=7)
    every = np.arange(20).repeat(2), np.tile([0, 1], 20)
    np.testing.assert_array_equal(
        other.fetch("tokens", *every), Cache.open(tmp_path / "a").fetch("tokens", *every)
    )


def test_crops(tmp_path: Path) -> None:
    source = shapes(6)
    cache = write(tmp_path / "c", source, crop="var", crops=3, mirror=False, shard_size=4, seed=5)
    assert cache.manifest.views == 3
    image = source[4].image
    assert image is not None
    central = image_transform(12, "var", train=False)(image)
    np.testing.assert_array_equal(
        cache.fetch("tokens", np.array([4]), np.array([0]))[0], encode(central[None])["tokens"][0]
    )
    drawn = image_transform(12, "var", train=True)(image, np.random.default_rng([5, 4, 2]))
    np.testing.assert_array_equal(
        cache.fetch("tokens", np.array([4]), np.array([2]))[0], encode(drawn[None])["tokens"][0]
    )


def test_several_arrays_of_other_types(tmp_path: Path) -> None:
    def moments(pixels: np.ndarray) -> dict[str, np.ndarray]:
        halves = pixels.astype(np.float16) / 255
        return {"moments": halves[:, ::2, ::2].transpose(0, 3, 1, 2), "coarse": halves[:, ::4, ::4, 0]}

    source = shapes(5)
    writer = CacheWriter(
        tmp_path / "c", source, settings_for(source, kind="moments", latent_scale=0.2), moments
    )
    writer.begin()
    writer.run()
    writer.finish()
    cache = Cache.open(tmp_path / "c")
    assert cache.manifest.arrays["moments"] == {"dtype": "float16", "shape": [3, 6, 6], "per": "view"}
    assert cache.manifest.latent_scale == 0.2
    rows = cache.fetch("coarse", np.array([4, 0]), np.array([1, 0]))
    image = np.asarray(source[4].image)[:, ::-1]
    np.testing.assert_array_equal(rows[0], (image.astype(np.float16) / 255)[::4, ::4, 0])


@pytest.fixture
def with_broken(make_parquet: Callable[..., Path]) -> ImageSource:
    """Ten images of which 2, 3 and 9 have no label."""
    labels = [0, 1, None, None, 2, 1, 0, 1, 2, None]
    return open_source(str(make_parquet(count=10, label=labels)))


def test_unusable_images_are_listed_counted_and_skipped(tmp_path: Path, with_broken: ImageSource) -> None:
    reported: list[int] = []
    writer = CacheWriter(
        tmp_path / "c",
        with_broken,
        settings_for(with_broken, shard_size=4),
        encode,
        report=lambda example: reported.append(example.index),
    )
    writer.begin()
    assert writer.run() == 10
    manifest = writer.finish()
    assert reported == [entry["index"] for entry in manifest.skipped] == [2, 3, 9]
    assert all("no label" in entry["reason"] for entry in manifest.skipped)
    cache = Cache.open(tmp_path / "c")
    assert len(cache) == 7
    np.testing.assert_array_equal(cache.index, [0, 1, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(cache.labels, [0, 1, 2, 1, 0, 1, 2])
    assert verify_sample(cache, with_broken, encode) == (7, {"tokens": 1.0})


def test_strict_stops_at_the_first(tmp_path: Path, with_broken: ImageSource) -> None:
    writer = CacheWriter(tmp_path / "c", with_broken, settings_for(with_broken), encode, strict=True)
    writer.begin()
    with pytest.raises(UserError, match=r"image 2 of .*no label"):
        writer.run()
    assert not writer.finished


def test_no_image_at_all(tmp_path: Path, make_parquet: Callable[..., Path]) -> None:
    source = open_source(f"{make_parquet(count=3, label=[7, 8, 9])}?classes=2")
    with pytest.raises(UserError, match=r"no image of .* could be used: .*label 7"):
        write(tmp_path / "c", source)


def test_a_shard_without_usable_images(tmp_path: Path, with_broken: ImageSource) -> None:
    cache = write(tmp_path / "c", with_broken, shard_size=2)
    assert [shard["count"] for shard in cache.manifest.shards] == [2, 0, 2, 2, 1]
    assert cache.fetch("tokens", np.arange(7), np.zeros(7, np.int64)).shape == (7, LENGTH)
    assert cache.verify_checksums() == 4 * 3 + 2


@pytest.mark.parametrize(("length", "count"), [(None, 6), (5, 5), (40, 6)])
@pytest.mark.parametrize("shard_size", [2, 3, 4, 50])
def test_stream(
    tmp_path: Path, make_parquet: Callable[..., Path], length: int | None, count: int, shard_size: int
) -> None:
    path = make_parquet(label=[0, 1, 1, 0, 1, 0])
    source = open_source(f"{path}?streaming=true&classes=2")
    cache = write(tmp_path / "c", source, length=length, shard_size=shard_size)
    np.testing.assert_array_equal(cache.index, np.arange(count))
    assert verify_sample(cache, source, encode, batches=9) == (count, {"tokens": 1.0})


@pytest.mark.parametrize("shard_size", [1, 2, 3, 6, 7])
def test_stream_in_two_processes(tmp_path: Path, make_parquet: Callable[..., Path], shard_size: int) -> None:
    path = make_parquet(label=[0, 1, 1, 0, 1, 0])
    writers = []
    for rank in (0, 1):
        source = open_source(f"{path}?streaming=true&classes=2")
        settings = settings_for(source, shard_size=shard_size)
        writers.append(CacheWriter(tmp_path / "c", source, settings, encode))
        writers[0].begin()
        writers[rank].run(rank, 2)
    writers[0].finish()
    cache = Cache.open(tmp_path / "c")
    np.testing.assert_array_equal(cache.index, np.arange(6))
    np.testing.assert_array_equal(cache.labels, [0, 1, 1, 0, 1, 0])


def test_killed_before_anything_was_written(tmp_path: Path) -> None:
    (tmp_path / "c/.tokenizer.7.tmp").mkdir(parents=True)
    (tmp_path / "c/.settings.json.7.tmp").write_text("{")
    assert set(contents(write(tmp_path / "c").path)) == set(contents(write(tmp_path / "d").path))


def test_missing_shard_of_a_table_is_an_error(tmp_path: Path) -> None:
    source = shapes()
    writer = CacheWriter(tmp_path / "c", source, settings_for(source), encode)
    writer.begin()
    writer.run(0, 2)
    with pytest.raises(UserError, match=r"shard-00001\.json is missing"):
        writer.finish()
    assert writer.share(0, 2) == 12 and writer.share(1, 2) == 8


def test_finished_cache_is_not_made_again(tmp_path: Path) -> None:
    cache = write(tmp_path / "c")
    before = contents(cache.path)

    def fail(pixels: np.ndarray) -> dict[str, np.ndarray]:
        raise AssertionError("encoded again")

    source = shapes()
    writer = CacheWriter(cache.path, source, settings_for(source), fail)
    assert writer.finished
    assert writer.run() == 0
    assert writer.done() == 20
    writer.finish()
    assert contents(cache.path) == before


def test_broken_shard_is_made_again(tmp_path: Path) -> None:
    cache = write(tmp_path / "c")
    before = contents(cache.path)
    target = cache.path / "shards/shard-00001.tokens.npy"
    target.write_bytes(target.read_bytes()[:-2])
    (cache.path / "shards/shard-00002.label.npy").unlink()
    source = shapes()
    writer = CacheWriter(cache.path, source, settings_for(source), encode, batch_size=3)
    writer.begin()
    assert writer.run() == 8 + 4
    writer.finish()
    assert contents(cache.path) == before


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "c")
    source = shapes()
    with pytest.raises(UserError, match=r"other settings \(tokenizer_hash, mirror\)") as error:
        CacheWriter(tmp_path / "c", source, settings_for(source, tokenizer_hash="beef", mirror=False), encode)
    assert 'tokenizer_hash: "f00d" there, "beef" now' in error.value.details


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    source = shapes()
    with pytest.raises(UserError, match="not empty and holds no cache"):
        CacheWriter(tmp_path, source, settings_for(source), encode)


CHILD = """
import sys, time, numpy as np
from pathlib import Path
from test_cache import *
source = shapes()
def slow(pixels):
    time.sleep(0.1)
    return encode(pixels)
writer = CacheWriter(Path(sys.argv[1]), source, settings_for(source), slow, batch_size=3)
writer.begin()
writer.run()
writer.finish()
"""


def test_killed_hard_and_resumed_is_the_same_cache(tmp_path: Path) -> None:
    whole = contents(write(tmp_path / "whole").path)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "cut")], env={**os.environ, "PYTHONPATH": path}
    )
    first = tmp_path / "cut/shards/shard-00000.json"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.005)
    time.sleep(0.05)  # into the second shard
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert first.exists() and not (tmp_path / "cut/manifest.json").exists()
    with pytest.raises(UserError, match="is unfinished"):
        Cache.open(tmp_path / "cut")
    (tmp_path / "cut/shards/.shard-00001.tokens.npy.1.tmp").write_bytes(b"half")
    source = shapes()
    writer = CacheWriter(tmp_path / "cut", source, settings_for(source), encode, batch_size=3)
    writer.begin()
    assert 0 < writer.run() < 20
    writer.finish()
    assert contents(tmp_path / "cut") == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "shard-00001.tokens.npy is missing"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "shard-00001.tokens.npy has .* bytes instead of",
        ),
        (lambda path: flip_last_bit(path), "shard-00001.tokens.npy has changed"),
    ],
)
def test_corrupt_cache_names_the_file(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "c")
    damage(tmp_path / "c/shards/shard-00001.tokens.npy")
    with pytest.raises(UserError, match=message):
        Cache.open(tmp_path / "c")


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_not_a_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such cache"):
        Cache.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a cache"):
        Cache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe a cache"):
        Cache.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON") as caught:
        Cache.open(tmp_path)
    assert "tokenize again" in caught.value.hint


def test_newer_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c")
    path = tmp_path / "c/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Cache.open(tmp_path / "c")


def test_verify_sample_sees_another_encoder(tmp_path: Path) -> None:
    cache = write(tmp_path / "c")
    images, equal = verify_sample(
        cache, shapes(), lambda p: {"tokens": encode(p)["tokens"] + (np.arange(6) < 3)}
    )
    assert images > 0 and equal == {"tokens": 0.5}
    with pytest.raises(UserError, match="fewer images"):
        verify_sample(cache, shapes(10), encode, batches=99)
    other = open_source("builtin:shapes?count=20&seed=1", size=12)
    with pytest.raises(UserError, match="is not what was cached"):
        verify_sample(cache, other, encode, batches=99)


def test_caches_of_the_first_version_open_and_go_on(tmp_path: Path) -> None:
    """They had one caption an image, and none of the settings that moments and captions need."""
    whole = write(tmp_path / "c")
    captions = whole.captions(np.arange(20))
    added = ("pivot_size", "captions", "text")
    settings = json.loads((tmp_path / "c/settings.json").read_text())
    for name in added:
        del settings[name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    manifest = {name: value for name, value in manifest.items() if name not in (*added, "captioned")}
    manifest |= {"captions": True, "arrays": {"tokens": {"dtype": "uint16", "shape": [LENGTH]}}}
    for number, shard in enumerate(manifest["shards"]):
        stem = tmp_path / f"c/shards/shard-{number:05d}"
        lines = [json.loads(line)[0] for line in Path(f"{stem}.captions.jsonl").read_text().splitlines()]
        Path(f"{stem}.captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        name = f"{stem.name}.captions.jsonl"
        shard["files"][name] = {
            "bytes": Path(f"{stem}.captions.jsonl").stat().st_size,
            "sha256": file_sha256(Path(f"{stem}.captions.jsonl")),
        }
        record = json.loads(Path(f"{stem}.json").read_text())
        assert record["settings"] == digest
        record |= {"files": shard["files"], "arrays": manifest["arrays"]}
        Path(f"{stem}.json").write_text(json.dumps(record))
    (tmp_path / "c/settings.json").write_text(json.dumps(settings))
    (tmp_path / "c/manifest.json").write_text(json.dumps(manifest))
    cache = Cache.open(tmp_path / "c")
    assert (cache.manifest.captioned, cache.manifest.captions, cache.manifest.pivot_size) == (True, 0, None)
    assert cache.captions(np.arange(20)) == captions
    assert verify_sample(cache, shapes(), encode, batches=99) == (20, {"tokens": 1.0})
    writer = CacheWriter(tmp_path / "c", shapes(), settings_for(shapes()), encode, batch_size=3)
    assert writer.run() == 0  # nothing is made again
    writer.finish()
    assert Cache.open(tmp_path / "c").captions(np.arange(20)) == captions


def test_other_captions_are_found(tmp_path: Path, make_parquet: Callable[..., Path]) -> None:
    label = Classes(["a", "b"], [0, 1, 0, 1, 0, 1])
    source = open_source(str(make_parquet(label=label, caption=["one"] * 6)))
    cache = write(tmp_path / "c", source)
    assert verify_sample(cache, source, encode) == (6, {"tokens": 1.0})
    other = open_source(str(make_parquet("other.parquet", label=label, caption=["one"] * 5 + ["two"])))
    with pytest.raises(UserError, match=r"captions \('two',\) instead of \('one',\)"):
        verify_sample(cache, other, encode)


def test_captions_need_an_encoder(tmp_path: Path) -> None:
    source = shapes()
    writer = CacheWriter(tmp_path, source, settings_for(source, captions=2, text="ids:4"), encode)
    with pytest.raises(ValueError, match="expected encode_text"):
        writer.run()
