"""Caches of encoded images: sharded, memory-mapped arrays and a manifest that says how they were made.

    manifest.json                written last: what this cache is, and a checksum of every file
    settings.json                written first: what a cache must agree on to be resumed
    tokenizer/                   the tokenizer, a checkpoint folder
    shards/
        shard-00000.tokens.npy   uint16 (images, views, L); other encoders store other arrays
        shard-00000.label.npy    int64 (images,)
        shard-00000.index.npy    int64 (images,): their places in the source
        shard-00000.captions.jsonl   where there are captions: one JSON string a line
        shard-00000.json         written last: the shard is complete

A shard holds the readable ones of `shard_size` consecutive images of the source, and depends on them and the
settings alone; so shards can be made by any process, and made again. Views of an image are its crops, and of
each crop a mirrored copy: view = crop * (1 + mirror) + mirrored.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmar_cli.data.ahead import ordered_map, prefetch
from hmar_cli.data.sources import Example, ImageSource
from hmar_cli.data.transforms import Crop, Pixels, image_transform
from hmar_cli.errors import UserError
from hmar_cli.files import atomic_file, file_sha256, read_json, write_json

Array = npt.NDArray[Any]
Encode = Callable[[Pixels], dict[str, Array]]
"""An encoder: uint8 images (n, H, W, 3) to named arrays (n, ...)."""

VERSION = 1
FULL_CHECK = 8 << 30  # bytes up to which opening a cache reads every file to compare checksums


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What makes two caches the same.

    Attributes:
        kind: what is stored, "tokens".
        source: spelling of the images' source.
        length: images of the source that are encoded, from the first; None for all of a stream.
        class_names: one name a label.
        tokenizer_hash: fingerprint of the encoder.
        scales: token grids of the tokenizer, as recipes write them.
        vocab_size: size of its codebook.
        latent_scale: factor of stored latents, where they are numbers rather than tokens.
        size: pixels of an encoded image, rows and columns.
        crop: "adm" or "var".
        crops: crops of each image; the first is central, the others random.
        mirror: whether mirrored copies are stored too.
        seed: of the random crops.
        shard_size: images of the source that a shard covers.
    """

    kind: str = "tokens"
    source: str
    length: int | None
    class_names: Sequence[str]
    tokenizer_hash: str
    scales: Sequence[int | Sequence[int]]
    vocab_size: int
    latent_scale: float | None = None
    size: Sequence[int]
    crop: Crop
    crops: int = 1
    mirror: bool = False
    seed: int = 0
    shard_size: int = 4096

    @property
    def views(self) -> int:
        """Encoded pictures of each image."""
        return self.crops * (1 + self.mirror)

    @property
    def transform(self) -> dict[str, Any]:
        """How images were cut."""
        return {name: getattr(self, name) for name in ("size", "crop", "crops", "mirror", "seed")}


@dataclass(frozen=True, kw_only=True)
class Manifest(CacheSettings):
    """Description of a complete cache: its settings, and what came of them.

    Attributes:
        count: images in the cache.
        label_counts: images of each class.
        arrays: dtype and shape (of one view) of each array.
        shards: of each shard its first image, how many it read and holds, and size and SHA-256 of each file.
        skipped: index and reason of each image that could not be used.
        captions: whether there are captions.
    """

    count: int
    label_counts: Sequence[int]
    arrays: Mapping[str, Mapping[str, Any]]
    shards: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    captions: bool = False


class CacheWriter:
    """Encodes a source into a cache folder, shard by shard; what is complete is not made again.

    Args:
        out: the cache folder; may hold an unfinished cache of the same settings.
        source: the images.
        settings: what to make of them.
        encode: the encoder.
        batch_size: pictures given to the encoder at once.
        workers: threads that decode images.
        strict: stop at the first image that cannot be used.
        advance: called with the number of images done, for a progress bar.
        report: called with each example that was skipped.

    Raises:
        UserError: the folder holds something else, or a cache of other settings.
    """

    def __init__(
        self,
        out: Path,
        source: ImageSource,
        settings: CacheSettings,
        encode: Encode,
        *,
        batch_size: int = 64,
        workers: int = 2,
        strict: bool = False,
        advance: Callable[[int], None] = lambda images: None,
        report: Callable[[Example], None] = lambda example: None,
    ) -> None:
        self.out, self.source, self.settings, self.encode = out, source, settings, encode
        self.batch_size, self.workers, self.strict = batch_size, workers, strict
        self.advance, self.report = advance, report
        self._digest = _digest(settings)
        self._prepare = partial(_views, settings)
        self.check()

    @property
    def finished(self) -> bool:
        """Whether the cache is complete."""
        return (self.out / "manifest.json").is_file()

    def check(self) -> None:
        """Compare the settings with those of a cache that is there already."""
        if not self.out.exists() or all(path.name.startswith(".") for path in self.out.iterdir()):
            return
        before = read_json(self.out / "settings.json") if (self.out / "settings.json").exists() else None
        if not isinstance(before, dict):
            raise UserError(f"{self.out} is not empty and holds no cache", "choose another --out")
        now = _plain(self.settings)
        if different := [name for name in now if before.get(name) != now[name]]:
            lines = [
                f"{name}: {_short(before.get(name))} there, {_short(now[name])} now" for name in different
            ]
            raise UserError(
                f"{self.out} holds a cache made with other settings ({', '.join(different)})",
                "choose another --out, or delete that one",
                lines,
            )

    def begin(self) -> None:
        """Write the settings and clear what a killed run left half-written; for one process, before `run`."""
        write_json(self.out / "settings.json", _plain(self.settings))
        for leftover in [*self.out.glob(".*.tmp"), *(self.out / "shards").glob(".*.tmp")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def run(self, rank: int = 0, world: int = 1) -> int:
        """Make the shards of one process, every `world`-th from `rank` on; returns the images encoded now."""
        encoded = 0
        for number in itertools.count(rank, world):
            start, stop = self._range(number)
            if start >= stop:
                break
            record = self.record(number)
            if record is None:
                record = self._make(number, start, stop)
                encoded += record["read"]
            if record["read"] < stop - start:  # a stream that ended
                break
        return encoded

    def done(self, rank: int = 0, world: int = 1) -> int:
        """Count the images whose shards are complete."""
        found = sorted((self.out / "shards").glob("shard-*.json"))
        mine = [path for path in found if int(path.stem.removeprefix("shard-")) % world == rank]
        return sum(read_json(path)["read"] for path in mine)

    def share(self, rank: int = 0, world: int = 1) -> int | None:
        """Count the images that are one process's work; None for a stream."""
        if self.settings.length is None:
            return None
        shards = range(rank, -(-self.settings.length // self.settings.shard_size), world)
        return sum(stop - start for start, stop in map(self._range, shards))

    def finish(self) -> Manifest:
        """Write the manifest; for one process, after all shards are made.

        Raises:
            UserError: a shard is missing, or no image could be used.
        """
        records: list[dict[str, Any]] = []
        files = set((self.out / "shards").glob("shard-*.json"))
        while self._name(len(records)) in files:
            records.append(read_json(self._name(len(records))))
        start, stop = self._range(len(records))
        ended = start >= stop or not self.source.random_access  # a stream may end before its length
        if len(records) < len(files) or not ended:
            raise UserError(f"{self._name(len(records))} is missing", "run the same command again")
        manifest = _summary(self.settings, records)
        if not manifest.count:
            reason = manifest.skipped[0]["reason"] if manifest.skipped else "it is empty"
            raise UserError(f"no image of {self.settings.source} could be used: {reason}")
        write_json(
            self.out / "manifest.json", {"format": "hmar-cache", "version": VERSION} | _plain(manifest)
        )
        return manifest

    def record(self, number: int) -> dict[str, Any] | None:
        """Read the record of a shard if it is complete, whole and of these settings."""
        path = self._name(number)
        if not path.exists():
            return None
        record: dict[str, Any] = read_json(path)
        if record.get("settings") != self._digest:
            return None
        for name, about in record["files"].items():
            file = path.parent / name
            if not file.is_file() or file_sha256(file) != about["sha256"]:
                return None
        return record

    def _range(self, number: int) -> tuple[int, int]:
        start = number * self.settings.shard_size
        stop = start + self.settings.shard_size
        return start, stop if self.settings.length is None else min(stop, self.settings.length)

    def _name(self, number: int) -> Path:
        return self.out / "shards" / f"shard-{number:05d}.json"

    def _make(self, number: int, start: int, stop: int) -> dict[str, Any]:
        """Encode and write one shard, its record last."""
        examples: list[Example] = []
        skipped: list[Example] = []
        parts: list[dict[str, Array]] = []
        for batch, failed in self._batches(start, stop):
            for example in failed:
                self._refuse(example)
            skipped += failed
            examples += [example for example, _ in batch]
            if batch:
                parts.append(_encode([views for _, views in batch], self.encode, self.batch_size))
            self.advance(len(batch) + len(failed))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in (parts or [{}])[0]}
        labels = np.array([example.label for example in examples], np.int64)
        about = {name: {"dtype": str(a.dtype), "shape": list(a.shape[2:])} for name, a in arrays.items()}
        record: dict[str, Any] = {
            "settings": self._digest,
            "start": start,
            "read": len(examples) + len(skipped),
            "count": len(examples),
            "batch_size": self.batch_size,
            "arrays": about,
            "labels": np.bincount(labels, minlength=len(self.settings.class_names)).tolist(),
            "skipped": [{"index": example.index, "reason": example.error} for example in skipped],
        }
        if record["read"]:
            arrays |= {"label": labels, "index": np.array([example.index for example in examples], np.int64)}
            record["files"] = self._write_files(
                self._name(number).stem, arrays, [example.caption for example in examples]
            )
            write_json(self._name(number), record)
        return record

    def _refuse(self, example: Example) -> None:
        """Stop at an image that cannot be used, or report it."""
        if self.strict:
            raise UserError(
                f"image {example.index} of {self.source.name} cannot be used: {example.error}",
                "repair it, or leave out --strict to skip such images",
            )
        self.report(example)

    def _batches(self, start: int, stop: int) -> Iterator[tuple[list[tuple[Example, Pixels]], list[Example]]]:
        """Yield batches of readable images with their views, and the unreadable ones met on the way.

        Readable images fill each batch but the last of a shard, so that batches are the same in every run.
        """
        prepared = prefetch(
            ordered_map(self._prepare, self.source.deferred(start, stop), self.workers), self.batch_size
        )
        batch: list[tuple[Example, Pixels]] = []
        failed: list[Example] = []
        for example, views in prepared:
            if views is None:
                failed.append(example)
            else:
                batch.append((example, views))
            if len(batch) == self.batch_size:
                yield batch, failed
                batch, failed = [], []
        if batch or failed:
            yield batch, failed

    def _write_files(
        self, stem: str, arrays: Mapping[str, Array], captions: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Write a shard's arrays and captions; returns size and checksum of each file."""
        folder, paths = self.out / "shards", []
        for name, array in arrays.items():
            paths.append(folder / f"{stem}.{name}.npy")
            with atomic_file(paths[-1]) as temporary, temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
        if any(captions):
            paths.append(folder / f"{stem}.captions.jsonl")
            with atomic_file(paths[-1]) as temporary:
                lines = [json.dumps(caption, ensure_ascii=False) + "\n" for caption in captions]
                temporary.write_text("".join(lines), encoding="utf-8")
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


class Cache:
    """A complete cache, opened for reading.

    Attributes:
        path: its folder.
        manifest: how it was made, and what it holds.
        labels: int64 (count,).
        index: int64 (count,), the images' places in the source.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._shards = [shard for shard in manifest.shards if shard["count"]]
        self._starts = np.cumsum([0, *(shard["count"] for shard in self._shards)])
        self.labels: npt.NDArray[np.int64] = np.concatenate(self._load("label"))
        self.index: npt.NDArray[np.int64] = np.concatenate(self._load("index"))
        views = manifest.views
        self._tables = {  # memory-mapped, one row a view
            name: [array.reshape(len(array) * views, *array.shape[2:]) for array in self._load(name)]
            for name in manifest.arrays
        }

    @classmethod
    def open(cls, path: Path | str, *, checksums: bool | None = None) -> "Cache":
        """Open a cache.

        Args:
            path: its folder.
            checksums: whether to read all files and compare their checksums; by default up to 8 GiB. Sizes
                are always compared.

        Raises:
            UserError: no cache, an unfinished one, or a missing, short or changed file.
        """
        path = Path(path)
        manifest = read_manifest(path)
        sizes = _files(path, manifest)
        for file, about in sizes.items():
            if not file.is_file():
                raise _corrupt(file, "is missing")
            if file.stat().st_size != about["bytes"]:
                raise _corrupt(file, f"has {file.stat().st_size} bytes instead of {about['bytes']}")
        total = sum(about["bytes"] for about in sizes.values())
        cache = cls(path, manifest)
        if checksums or (checksums is None and total <= FULL_CHECK):
            cache.verify_checksums()
        return cache

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def tokenizer_path(self) -> Path:
        """Folder of the tokenizer that made the cache."""
        return self.path / "tokenizer"

    def files(self) -> dict[Path, Mapping[str, Any]]:
        """The files of all shards, each with its size and checksum."""
        return _files(self.path, self.manifest)

    @property
    def size(self) -> int:
        """Bytes on disk, without the tokenizer."""
        return sum(about["bytes"] for about in self.files().values())

    @cached_property
    def _captions(self) -> list[str]:
        captions: list[str] = []
        for shard in self._shards:
            file = self.path / "shards" / f"{_stem(shard)}.captions.jsonl"
            if file.name in shard["files"]:
                captions += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            else:
                captions += [""] * shard["count"]
        return captions

    def captions(self, indices: npt.NDArray[np.int64]) -> list[str]:
        """Return the captions of images; empty strings where there are none."""
        return [self._captions[index] for index in indices]

    def fetch(self, name: str, indices: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Array:
        """Gather rows of one array, as it is stored.

        Args:
            name: "tokens", or another array of the manifest.
            indices: (n,) images, each below `len(self)`.
            views: (n,) which view of each, below `manifest.views`.

        Raises:
            IndexError: an image or a view that does not exist.
        """
        _check_range(indices, len(self), "image")
        _check_range(views, self.manifest.views, "view")
        tables = self._tables[name]
        shard = np.searchsorted(self._starts, indices, side="right") - 1
        rows = (indices - self._starts[shard]) * self.manifest.views + views
        if len(tables) == 1:
            return np.asarray(tables[0][rows])
        result = np.empty((len(indices), *tables[0].shape[1:]), tables[0].dtype)
        order = np.argsort(shard, kind="stable")
        bounds = np.searchsorted(shard[order], np.arange(len(tables) + 1))
        for number in np.flatnonzero(np.diff(bounds)):
            places = order[bounds[number] : bounds[number + 1]]
            result[places] = tables[number][rows[places]]
        return result

    def batch(self, indices: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Return {"tokens": int64 (n, L), "label": int64 (n,)} of images, each in one view."""
        tokens = self.fetch("tokens", indices, views).astype(np.int64)
        return {"tokens": tokens, "label": self.labels[indices]}

    def verify_checksums(self) -> int:
        """Read every file and compare its checksum; returns how many there are.

        Raises:
            UserError: naming a file that changed.
        """
        files = self.files()
        with ThreadPoolExecutor(4) as pool:
            for (file, about), digest in zip(files.items(), pool.map(file_sha256, files), strict=True):
                if digest != about["sha256"]:
                    raise _corrupt(file, "has changed: its checksum differs from the manifest's")
        return len(files)

    def verify_sample(
        self, source: ImageSource, encode: Encode, *, batches: int = 4, workers: int = 2, seed: int = 0
    ) -> tuple[int, float]:
        """Encode random batches again, each made up as it was, and compare.

        Args:
            source: the images that the cache was made of.
            encode: the encoder that made it.
            batches: how many to compare.
            workers: threads that decode images.
            seed: which ones.

        Returns:
            How many images were compared, and the share of equal numbers.

        Raises:
            UserError: an image that cannot be read any more, or has another label.
        """
        places = [
            (number, first)
            for number, shard in enumerate(self._shards)
            for first in range(0, shard["count"], shard["batch_size"])
        ]
        rng = np.random.default_rng(seed)
        chosen = sorted(rng.permutation(len(places))[:batches])
        images, equal, total = 0, 0, 0
        for number, first in (places[i] for i in chosen):
            size = self._shards[number]["batch_size"]
            rows = np.arange(first, min(first + size, self._shards[number]["count"]))
            indices = self._starts[number] + rows
            again = _encode(self._views_again(source, indices, workers), encode, size)
            for name, array in again.items():
                flat = array.reshape(-1, *array.shape[2:])
                every = np.arange(self.manifest.views)
                stored = self.fetch(name, indices.repeat(len(every)), np.tile(every, len(indices)))
                equal, total = equal + int((flat == stored).sum()), total + stored.size
            images += len(indices)
        return images, equal / total

    def _views_again(self, source: ImageSource, indices: npt.NDArray[np.int64], workers: int) -> list[Pixels]:
        wanted = dict(zip(self.index[indices].tolist(), self.labels[indices].tolist(), strict=True))
        prepare = partial(_views, self.manifest)
        result = []
        for example, views in ordered_map(prepare, source.deferred(min(wanted), max(wanted) + 1), workers):
            if example.index not in wanted:
                continue
            if views is None or example.label != wanted[example.index]:
                what = example.error or f"label {example.label} instead of {wanted[example.index]}"
                raise UserError(f"image {example.index} of {source.name} is not what was cached: {what}")
            result.append(views)
        if len(result) < len(wanted):
            raise UserError(f"{source.name} has fewer images than when it was cached")
        return result

    def _load(self, name: str) -> list[Array]:
        """One array of each shard, memory-mapped."""
        arrays = []
        for shard in self._shards:
            file = self.path / "shards" / f"{_stem(shard)}.{name}.npy"
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise _corrupt(file, f"cannot be read: {error}") from error
            if len(array) != shard["count"]:
                raise _corrupt(file, f"holds {len(array)} images instead of {shard['count']}")
            arrays.append(np.asarray(array))  # a plain view of the mapping: indexing it costs less
        return arrays


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a cache.

    Raises:
        UserError: no cache there, or an unfinished one.
    """
    if not path.is_dir():
        raise UserError(f"no such cache: {path}", "make one with `hmar tokenize`")
    if not (path / "manifest.json").is_file():
        if (path / "settings.json").is_file():
            raise UserError(f"the cache {path} is unfinished", "run its `hmar tokenize` command again")
        raise UserError(f"no manifest.json in {path}: not a cache", "make one with `hmar tokenize`")
    table = read_json(path / "manifest.json")
    if not isinstance(table, dict) or table.pop("format", None) != "hmar-cache":
        raise UserError(f"{path / 'manifest.json'} does not describe a cache of hmar")
    if (version := table.pop("version", None)) != VERSION:
        raise UserError(f"the cache {path} has version {version}, this program reads {VERSION}")
    try:
        return Manifest(**table)
    except TypeError as error:
        raise UserError(f"{path / 'manifest.json'} is broken: {error}") from error


def _views(settings: CacheSettings, decode: Callable[[], Example]) -> tuple[Example, Pixels | None]:
    """Decode an image and cut its views, (views, H, W, 3); None where it cannot be used."""
    example = decode()
    image, about = example.image, Example(example.index, None, example.label, example.caption, example.error)
    if image is None:
        return about, None
    pictures: list[Pixels] = []
    try:
        for crop in range(settings.crops):
            cut = image_transform(settings.size, settings.crop, train=crop > 0)
            picture = cut(image, np.random.default_rng([settings.seed, example.index, crop]))
            pictures += [picture, picture[:, ::-1]] if settings.mirror else [picture]
    except (ValueError, MemoryError, OSError) as error:  # a picture too thin or too large to be scaled
        return Example(example.index, None, error=f"{type(error).__name__}: {error}"), None
    return about, np.stack(pictures)


def _encode(views: Sequence[Pixels], encode: Encode, batch_size: int) -> dict[str, Array]:
    """Encode views (views, H, W, 3) of n images to arrays (n, views, ...), `batch_size` pictures at once."""
    pictures = np.concatenate(views)
    parts = [encode(pictures[i : i + batch_size]) for i in range(0, len(pictures), batch_size)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: a.reshape(len(views), len(views[0]), *a.shape[1:]) for name, a in whole.items()}


def _summary(settings: CacheSettings, records: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest of complete shards."""
    kept = ("start", "read", "count", "batch_size", "files")
    names = {f.name for f in fields(CacheSettings)}
    nothing = np.zeros(len(settings.class_names), np.int64)
    counts = np.sum([nothing, *(record["labels"] for record in records)], axis=0)
    return Manifest(
        **{name: value for name, value in _plain(settings).items() if name in names},
        count=sum(record["count"] for record in records),
        label_counts=counts.tolist(),
        arrays=next((record["arrays"] for record in records if record["arrays"]), {}),
        shards=[{key: record[key] for key in kept} for record in records],
        skipped=[entry for record in records for entry in record["skipped"]],
        captions=any(file.endswith(".captions.jsonl") for record in records for file in record["files"]),
    )


def _files(path: Path, manifest: Manifest) -> dict[Path, Mapping[str, Any]]:
    return {
        path / "shards" / name: about for shard in manifest.shards for name, about in shard["files"].items()
    }


def _stem(shard: Mapping[str, Any]) -> str:
    """File-name stem of a shard."""
    return str(next(iter(shard["files"]))).split(".")[0]


def _corrupt(file: Path, what: str) -> UserError:
    return UserError(f"broken cache: {file} {what}", "delete manifest.json and tokenize again to repair it")


def _check_range(values: npt.NDArray[np.int64], limit: int, what: str) -> None:
    if len(values) and (values.min() < 0 or values.max() >= limit):
        raise IndexError(f"expected each {what} in 0..{limit - 1}, got {values.min()}..{values.max()}")


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return plain


def _digest(settings: CacheSettings) -> str:
    return hashlib.sha256(json.dumps(_plain(settings), sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 72 else text[:69] + "..."
