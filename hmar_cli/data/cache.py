"""Caches of encoded images: sharded, memory-mapped arrays and a manifest that says how they were made.

    manifest.json                written last: what this cache is, and a checksum of every file
    settings.json                written first: what a cache must agree on to be resumed
    tokenizer/                   the tokenizer, a checkpoint folder
    shards/
        shard-00000.tokens.npy   uint16 (images, views, L), of a multi-scale tokenizer; or, of a KL autoencoder,
        shard-00000.moments.npy        float16 (images, views, 2Z, h, w): means and log-variances
        shard-00000.pivot_moments.npy  float16 (images, views, 2Z, h', w'): those of the views made smaller
        shard-00000.text.npy     uint16 (images, captions, T) ids, or float16 (images, captions, T, W) embeddings
        shard-00000.label.npy    int64 (images,)
        shard-00000.index.npy    int64 (images,): their places in the source
        shard-00000.captions.jsonl   where there are captions: a list of strings a line, one line an image
        shard-00000.json         written last: the shard is complete

A shard holds the readable ones of `shard_size` consecutive images of the source, and depends on them and the
settings alone; so shards can be made by any process, and made again. Views of an image are its crops, and of
each crop a mirrored copy: view = crop * (1 + mirror) + mirrored.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmar_cli.data.transforms import Crop
from hmar_cli.errors import UserError
from hmar_cli.files import file_sha256, read_json

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

FORMAT, VERSION = "hmar-cache", 1
REPAIR = "delete manifest.json and tokenize again to repair it"
TEXT = "text"
"""Name of the array of captions; that of all others counts views."""
FULL_CHECK = 8 << 30  # bytes up to which opening a cache reads every file to compare checksums


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """What makes two caches the same.

    Attributes:
        kind: what is stored, "tokens" or "moments".
        source: spelling of the images' source.
        length: images of the source that are encoded, from the first; None for all of a stream.
        class_names: one name a label.
        tokenizer_hash: fingerprint of the encoder.
        scales: token grids of the tokenizer, as recipes write them; none for moments.
        vocab_size: size of its codebook; 0 for moments.
        latent_scale: of moments, what latents drawn from them are to be multiplied by; None for tokens.
        size: pixels of an encoded image, rows and columns.
        pivot_size: pixels of the smaller copy that is encoded too; None where there is none.
        crop: "adm" or "var".
        crops: crops of each image; the first is central, the others random.
        mirror: whether mirrored copies are stored too.
        seed: of the random crops.
        shard_size: images of the source that a shard covers.
        captions: encoded captions of each image; 0 where none are encoded.
        text: what encoded them, such as "ids:32" (token ids of that many places) or "clip:ViT-L-14:openai"
            (embeddings); empty where none are.
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
    pivot_size: Sequence[int] | None = None
    crop: Crop
    crops: int = 1
    mirror: bool = False
    seed: int = 0
    shard_size: int = 4096
    captions: int = 0
    text: str = ""

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
        arrays: of each array its dtype, its shape (of one view or caption), and which of the two it has "per"
            image.
        shards: of each shard its first image, how many it read and holds, and size and SHA-256 of each file.
        skipped: index and reason of each image that could not be used.
        captioned: whether the captions themselves are stored.
    """

    count: int
    label_counts: Sequence[int]
    arrays: Mapping[str, Mapping[str, Any]]
    shards: Sequence[Mapping[str, Any]]
    skipped: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    captioned: bool = False


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
        self.labels: Indices = np.concatenate(self._load("label"))
        self.index: Indices = np.concatenate(self._load("index"))
        self._tables = {  # memory-mapped, one row a view or caption
            name: [array.reshape(-1, *array.shape[2:]) for array in self._load(name)]
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
    def _captions(self) -> list[tuple[str, ...]]:
        captions: list[tuple[str, ...]] = []
        for shard in self._shards:
            file = self.path / "shards" / f"{_stem(shard)}.captions.jsonl"
            if file.name in shard["files"]:
                lines = file.read_text(encoding="utf-8").split("\n")[:-1]
                captions += [_strings(json.loads(line)) for line in lines]
            else:
                captions += [()] * shard["count"]
        return captions

    def captions(self, indices: Indices) -> list[tuple[str, ...]]:
        """Return all captions of each of some images."""
        return [self._captions[index] for index in indices]

    def rows(self, name: str) -> int:
        """Rows of each image in an array: its views, or its encoded captions."""
        return self.manifest.captions if self.per(name) == "caption" else self.manifest.views

    def per(self, name: str) -> str:
        """What an image has several of in an array: "view" or "caption"."""
        return str(self.manifest.arrays.get(name, {}).get("per", "view"))  # the first caches do not say

    def fetch(self, name: str, indices: Indices, rows: Indices) -> Array:
        """Gather rows of one array, as it is stored.

        Args:
            name: "tokens", or another array of the manifest.
            indices: (n,) images, each below `len(self)`.
            rows: (n,) which view (of "text": which caption) of each, below `rows(name)`.

        Raises:
            IndexError: an image, a view or a caption that does not exist.
        """
        each = self.rows(name)
        _check_range(indices, len(self), "image")
        _check_range(rows, each, self.per(name))
        tables = self._tables[name]
        shard = np.searchsorted(self._starts, indices, side="right") - 1
        rows = (indices - self._starts[shard]) * each + rows
        if len(tables) == 1:
            return np.asarray(tables[0][rows])
        result = np.empty((len(indices), *tables[0].shape[1:]), tables[0].dtype)
        order = np.argsort(shard, kind="stable")
        bounds = np.searchsorted(shard[order], np.arange(len(tables) + 1))
        for number in np.flatnonzero(np.diff(bounds)):
            places = order[bounds[number] : bounds[number + 1]]
            result[places] = tables[number][rows[places]]
        return result

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row of every array."""
        return sum(tables[0][0].nbytes for tables in self._tables.values())

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
            if array.ndim > 1 and array.shape[1] != self.rows(name):
                raise _corrupt(file, f"holds {array.shape[1]} rows an image instead of {self.rows(name)}")
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
    try:
        table = read_json(path / "manifest.json")
    except UserError as error:
        raise UserError(str(error), error.hint or REPAIR) from error
    if not isinstance(table, dict) or table.pop("format", None) != FORMAT:
        raise UserError(f"{path / 'manifest.json'} does not describe a cache of hmar")
    if (version := table.pop("version", None)) != VERSION:
        raise UserError(f"the cache {path} has version {version}, this program reads {VERSION}")
    if isinstance(table.get("captions"), bool):  # as the first caches said that captions are stored
        table["captioned"] = table.pop("captions")
    try:
        return Manifest(**table)
    except TypeError as error:
        raise UserError(f"{path / 'manifest.json'} is broken: {error}", REPAIR) from error


def _files(path: Path, manifest: Manifest) -> dict[Path, Mapping[str, Any]]:
    return {
        path / "shards" / name: about for shard in manifest.shards for name, about in shard["files"].items()
    }


def _stem(shard: Mapping[str, Any]) -> str:
    """File-name stem of a shard."""
    return str(next(iter(shard["files"]))).split(".")[0]


def _corrupt(file: Path, what: str) -> UserError:
    return UserError(f"broken cache: {file} {what}", REPAIR)


def _check_range(values: Indices, limit: int, what: str) -> None:
    if len(values) and (values.min() < 0 or values.max() >= limit):
        raise IndexError(f"expected each {what} in 0..{limit - 1}, got {values.min()}..{values.max()}")


def _strings(value: str | list[str]) -> tuple[str, ...]:
    """Captions of an image; the first caches stored one string, empty if there was none."""
    return tuple(value) if isinstance(value, list) else (value,) * bool(value)
