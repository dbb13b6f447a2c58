"""What next-scale models are analysed on: held-out images as tokens, with the models' own labels.

Letters: N images, L tokens of all scales, H W the image.
"""

import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmar_cli.builders import find_tokenizer, load_model, load_tokenizer
from hmar_cli.checkpoints.store import Checkpoint
from hmar_cli.console import progress, warn
from hmar_cli.data.ahead import ordered_map
from hmar_cli.data.cache import Cache
from hmar_cli.data.images import Example, ImageSource, class_places
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import Pixels, image_transform, to_tensor
from hmar_cli.errors import UserError
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.sampling.next_scale import sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import NextScaleSample
from hmar_cli.tokenizers.msvq import MultiScaleVQ


@dataclass(frozen=True)
class Subject:
    """A next-scale model, in evaluation mode and on its device.

    Attributes:
        name: short, for tables and legends.
        model: VAR or HMAR, perhaps with a masked branch.
        codec: its tokenizer.
        checkpoint: where both were read.
        weights: "model", "ema", or "" for "ema" where it exists.
    """

    name: str
    model: NextScaleTransformer
    codec: MultiScaleVQ
    checkpoint: Checkpoint
    weights: str

    @functools.cached_property
    def fingerprint(self) -> str:
        """The tokenizer's."""
        return self.codec.fingerprint()

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.model.pos_embed.device

    def describe(self) -> dict[str, Any]:
        """The model, for the record."""
        about = self.checkpoint.describe(self.weights)
        return {"name": self.name, **about, "tokenizer_hash": self.fingerprint}


def load_subject(
    path: Path, name: str, device: torch.device, weights: str = "", tokenizer: Path | None = None
) -> Subject:
    """Load a VAR or HMAR.

    Args:
        path: a checkpoint or run folder.
        name: for tables and legends.
        device: where it goes.
        weights: "model" or "ema"; "" for "ema" where it exists.
        tokenizer: where the tokenizer lies; None for the one that the checkpoint carries.

    Raises:
        UserError: nothing of the sort lies there, or a model of another family.
    """
    model, codec, checkpoint = load_model(path, weights, tokenizer)
    if not isinstance(model, NextScaleTransformer) or not isinstance(codec, MultiScaleVQ):
        raise UserError(
            f"{path} is a MAR or Hi-MAR, which predicts no scales", "pass the checkpoint of a VAR or HMAR"
        )
    model = model.to(device)
    model.select_attention(1, torch.float32, sampling=True)  # replaces what can run elsewhere only
    return Subject(name, model, codec.to(device), checkpoint, weights)


def load_msvq(path: Path) -> tuple[MultiScaleVQ, Checkpoint]:
    """Load a multi-scale tokenizer, on the CPU and in evaluation mode: its own, or one that a model or cache carries.

    Raises:
        UserError: nothing of the sort lies there, or a tokenizer without scales.
    """
    codec = load_tokenizer(path)
    if not isinstance(codec, MultiScaleVQ):
        raise UserError(
            f"{path} holds a KL autoencoder, which has no codebook", "pass a multi-scale VQ tokenizer"
        )
    return codec, find_tokenizer(path)


@dataclass(frozen=True)
class HeldOut:
    """Images as tokens.

    Attributes:
        tokens: [N, L] int64, on the CPU.
        places: N, of each image's class in `class_names`.
        class_names: of the data; two classes may share a name.
        images: [N, H, W, 3] uint8, or None where they were not asked for.
        about: where they come from, for the record.
    """

    tokens: Tensor
    places: tuple[int, ...]
    class_names: tuple[str, ...]
    images: Pixels | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """N names."""
        return tuple(self.class_names[place] for place in self.places)

    def labels(self, checkpoint: Checkpoint) -> Tensor:
        """The images' classes as a model numbers them, [N] int64.

        Raises:
            UserError: a class that the model does not know, or a name that several of its classes share.
        """
        known = class_places(self.class_names, checkpoint.class_names)
        if unknown := [place for place in self.places if known[place] < 0]:
            name = self.class_names[unknown[0]]
            lack = "several classes" if name in checkpoint.class_names else "no class"
            raise UserError(
                f"{checkpoint.folder} knows {lack} {name!r}, which {self.about['data']} has",
                f"use images of its classes, such as {', '.join(checkpoint.class_names[:5])}",
            )
        return torch.tensor([known[place] for place in self.places])

    def batches(self, size: int, title: str) -> Iterator[slice]:
        """Yield slices of at most `size` images, with a bar that shows images a second."""
        with progress(title, len(self.tokens)) as bar:
            for start in range(0, len(self.tokens), size):
                part = slice(start, min(start + size, len(self.tokens)))
                yield part
                bar.advance(part.stop - part.start)


def spread(total: int, count: int) -> list[int]:
    """Choose `count` of `total` places, or all, evenly spaced: sources are often sorted by class."""
    chosen = min(count or total, total)
    return [i * total // chosen for i in range(chosen)]


def read_held_out(
    data: str, codec: MultiScaleVQ, *, count: int, batch_size: int, pictures: bool = False
) -> HeldOut:
    """Read images as tokens, evenly spaced over the data; of a stream the first.

    Args:
        data: folder of a cache that this tokenizer made (of each image its central crop), or a source of images,
            which are centre-cropped as ADM does.
        codec: the tokenizer.
        count: images; 0 is all.
        batch_size: images encoded at once.
        pictures: keep the images, too; then the data has to be a source.

    Raises:
        UserError: a cache of another tokenizer, one where pictures are needed, or images none of which can be used.
    """
    if (Path(data) / "manifest.json").is_file():
        if pictures:
            raise UserError(
                f"{data} is a cache, which holds no pictures",
                "give a source of images, such as the cache's own",
            )
        return _from_cache(Cache.open(data), codec.fingerprint(), count)
    return _from_source(open_source(data, size=codec.image_size), codec, count, batch_size, pictures)


def _from_cache(cache: Cache, fingerprint: str, count: int) -> HeldOut:
    manifest = cache.manifest
    if manifest.tokenizer_hash != fingerprint:
        raise UserError(
            f"the cache {cache.path} was made by tokenizer {manifest.tokenizer_hash[:12]}, this one is "
            f"{fingerprint[:12]}",
            "use a cache of the model's own tokenizer, or a source of images",
        )
    chosen = np.array(spread(len(cache), count), np.int64)
    tokens = torch.from_numpy(cache.fetch("tokens", chosen, np.zeros_like(chosen)).astype(np.int64))
    places = tuple(cache.labels[chosen].tolist())
    about = {"data": str(cache.path), "source": manifest.source, "crop": manifest.crop}
    return HeldOut(tokens, places, tuple(manifest.class_names), None, _record(about, tokens))


def _from_source(
    source: ImageSource, codec: MultiScaleVQ, count: int, batch_size: int, pictures: bool
) -> HeldOut:
    device = next(codec.parameters()).device
    broken: list[Example] = []
    usable = _cut(source, codec.image_size, count, broken)
    tokens: list[Tensor] = []
    places: list[int] = []
    kept: list[Pixels] = []
    while batch := list(itertools.islice(usable, batch_size)):
        pixels = np.stack([each for each, _ in batch])  # [B, H, W, 3]
        tokens.append(codec.encode(to_tensor(pixels).to(device)).cpu())  # [B, L]
        places += [place for _, place in batch]
        kept += [pixels] * pictures
    first = broken[0].fault if broken else ""
    if not tokens:
        raise UserError(f"{source.name} has no image that can be used", first or "give more images")
    if broken:
        warn(f"left out {len(broken)} images of {source.name}; {first}")
    every = torch.cat(tokens)  # [N, L]
    about = {"data": source.name, "source": source.name, "crop": "adm", "unreadable": len(broken)}
    images = np.concatenate(kept) if pictures else None
    return HeldOut(every, tuple(places), source.class_names, images, _record(about, every))


def _cut(
    source: ImageSource, size: tuple[int, int], count: int, broken: list[Example]
) -> Iterator[tuple[Pixels, int]]:
    """Yield centre-cropped images [H, W, 3] with their labels; put what cannot be used into `broken`."""
    cut = image_transform(list(size), "adm", train=False)
    if source.random_access:
        chosen = spread(len(source), count)
        reads, total = source.pick(chosen), len(chosen)
    else:
        reads, total = source.deferred(0, count or sys.maxsize), count

    def decode(read: Callable[[], Example]) -> tuple[Example, Pixels | None]:
        example = read()
        return example, None if example.image is None else cut(example.image)

    ready = ordered_map(decode, reads, min(16, os.cpu_count() or 1))
    with progress("encoding", total or None) as bar:
        for example, pixels in ready:
            if pixels is None:
                broken.append(example)
            else:
                yield pixels, example.label
            bar.advance()


def draw_held_out(subject: Subject, *, count: int, seed: int, batch_size: int) -> HeldOut:
    """Let a model draw images of all its classes in turn, as its recipe says; image i depends on (seed, i) alone."""
    names = subject.checkpoint.class_names
    settings = subject.checkpoint.recipe.sample
    assert isinstance(settings, NextScaleSample)
    tokens = []
    with progress(f"sampling {subject.name}", count) as bar:
        for start in range(0, count, batch_size):
            indices = torch.arange(start, min(start + batch_size, count), device=subject.device)
            drawn, _ = sample_next_scale(
                subject.model,
                subject.codec.quantizer,
                indices % len(names),
                settings,
                PhiloxNoise(seed, indices),
            )
            tokens.append(drawn.cpu())
            bar.advance(len(indices))
    every = torch.cat(tokens)  # [N, L]
    about = {"data": "samples of the model itself", "seed": seed, "sample": asdict(settings)}
    return HeldOut(every, tuple(i % len(names) for i in range(count)), names, None, _record(about, every))


def _record(about: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """What was read, with the SHA-256 of its tokens: equal hashes are equal images for a tokenizer."""
    digest = hashlib.sha256(tokens.to(torch.int32).numpy().tobytes()).hexdigest()
    return {**about, "count": len(tokens), "tokens_sha256": digest}


def require_same_tokenizer(subjects: Sequence[Subject]) -> None:
    """Refuse models whose tokens are not the same: their losses don't compare.

    Raises:
        UserError: naming two.
    """
    first = subjects[0]
    for other in subjects[1:]:
        if other.fingerprint != first.fingerprint:
            raise UserError(
                f"{first.name} and {other.name} have different tokenizers, so their numbers don't compare",
                "analyse models of one tokenizer together",
            )
