"""Making a cache: shards that are complete or absent, each a function of its images and the settings."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hmar_cli.data.ahead import ordered_map, prefetch
from hmar_cli.data.cache import FORMAT, TEXT, VERSION, Array, CacheSettings, Manifest
from hmar_cli.data.images import Example, ImageSource, unusable
from hmar_cli.data.transforms import Pixels, image_transform
from hmar_cli.errors import UserError
from hmar_cli.files import atomic_file, file_sha256, read_json, write_json

Encode = Callable[[Pixels], dict[str, Array]]
"""An encoder: uint8 images (n, H, W, 3) to named arrays (n, ...)."""
EncodeText = Callable[[list[str]], Array]
"""An encoder of n captions: token ids (n, T), or embeddings (n, T, W)."""
Viewed = tuple[Example, Pixels]
"""An image without its picture, and its views (views, H, W, 3)."""

ADDED = {"pivot_size": None, "captions": 0, "text": ""}
"""Settings that the first caches did not have, and what they mean there."""


class CacheWriter:
    """Encodes a source into a cache folder, shard by shard; what is complete is not made again.

    Args:
        out: the cache folder; may hold an unfinished cache of the same settings.
        source: the images.
        settings: what to make of them.
        encode: the encoder.
        encode_text: the encoder of captions, where the settings want them encoded.
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
        encode_text: EncodeText | None = None,
        *,
        batch_size: int = 64,
        workers: int = 2,
        strict: bool = False,
        advance: Callable[[int], None] = lambda images: None,
        report: Callable[[Example], None] = lambda example: None,
    ) -> None:
        self.out, self.source, self.settings = out, source, settings
        self.encode, self.encode_text = encode, encode_text
        self.batch_size, self.workers, self.strict = batch_size, workers, strict
        self.advance, self.report = advance, report
        self._digest = _digest(settings)
        self._prepare = partial(views_of, settings)
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
        before = {name: value for name, value in ADDED.items() if name not in before} | before
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
        """Make the shards of one process, every `world`-th from `rank` on; returns the images encoded now.

        Raises:
            ValueError: captions are to be encoded and there is no encoder of them, or the reverse.
        """
        if bool(self.settings.captions) != (self.encode_text is not None):
            raise ValueError(
                f"expected encode_text just where captions are encoded: {self.settings.captions}"
            )
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
        write_json(self.out / "manifest.json", {"format": FORMAT, "version": VERSION} | _plain(manifest))
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
                parts.append(self._encode(batch))
            self.advance(len(batch) + len(failed))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in (parts or [{}])[0]}
        labels = np.array([example.label for example in examples], np.int64)
        about = {name: _about(name, array) for name, array in arrays.items()}
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
            captions = [example.captions for example in examples]
            record["files"] = self._write_files(self._name(number).stem, arrays, captions)
            write_json(self._name(number), record)
        return record

    def _encode(self, batch: Sequence[Viewed]) -> dict[str, Array]:
        return encode_batch(batch, self.encode, self.encode_text, self.settings.captions, self.batch_size)

    def _refuse(self, example: Example) -> None:
        """Stop at an image that cannot be used, or report it."""
        if self.strict:
            raise UserError(
                f"image {example.index} of {self.source.name} cannot be used: {example.error}",
                "repair it, or leave out --strict to skip such images",
            )
        self.report(example)

    def _batches(self, start: int, stop: int) -> Iterator[tuple[list[Viewed], list[Example]]]:
        """Yield batches of readable images with their views, and the unreadable ones met on the way.

        Readable images fill each batch but the last of a shard, so that batches are the same in every run.
        """
        prepared = prefetch(
            ordered_map(self._prepare, self.source.deferred(start, stop), self.workers), self.batch_size
        )
        batch: list[Viewed] = []
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
        self, stem: str, arrays: Mapping[str, Array], captions: Sequence[tuple[str, ...]]
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
                lines = [json.dumps(texts, ensure_ascii=False) + "\n" for texts in captions]
                temporary.write_text("".join(lines), encoding="utf-8")
        return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}


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
        captioned=any(file.endswith(".captions.jsonl") for record in records for file in record["files"]),
    )


def views_of(settings: CacheSettings, decode: Callable[[], Example]) -> tuple[Example, Pixels | None]:
    """Decode an image and cut its views, (views, H, W, 3); None where it cannot be used."""
    example = decode()
    image, about = example.image, replace(example, image=None)
    if image is None:
        return about, None
    pictures: list[Pixels] = []
    try:
        for crop in range(settings.crops):
            cut = image_transform(settings.size, settings.crop, train=crop > 0)
            picture = cut(image, np.random.default_rng([settings.seed, example.index, crop]))
            pictures += [picture, picture[:, ::-1]] if settings.mirror else [picture]
    except (ValueError, MemoryError, OSError) as error:  # a picture too thin or too large to be scaled
        return unusable(example.index, error), None
    return about, np.stack(pictures)


def encode_batch(
    batch: Sequence[Viewed], encode: Encode, encode_text: EncodeText | None, captions: int, size: int
) -> dict[str, Array]:
    """Encode n images to arrays (n, views, ...), `size` pictures at once, and captions to (n, captions, ...)."""
    pictures = np.concatenate([views for _, views in batch])
    parts = [encode(pictures[i : i + size]) for i in range(0, len(pictures), size)]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays = {name: a.reshape(len(batch), -1, *a.shape[1:]) for name, a in whole.items()}
    if encode_text is not None:
        text = encode_text([each for example, _ in batch for each in in_turn(example.captions, captions)])
        arrays[TEXT] = text.reshape(len(batch), captions, *text.shape[1:])
    return arrays


def in_turn(captions: Sequence[str], count: int) -> list[str]:
    """As many captions as wanted: those there are, again and again; empty ones where there are none."""
    return [captions[i % len(captions)] if captions else "" for i in range(count)]


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return plain


def _about(name: str, array: Array) -> dict[str, Any]:
    """What a manifest says of an array."""
    per = "caption" if name == TEXT else "view"
    return {"dtype": str(array.dtype), "shape": list(array.shape[2:]), "per": per}


def _digest(settings: CacheSettings) -> str:
    """A hash of the settings; that of the first caches where they have nothing new."""
    plain = {name: value for name, value in _plain(settings).items() if value != ADDED.get(name, ...)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 72 else text[:69] + "..."
