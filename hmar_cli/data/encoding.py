"""From a source of images to a cache of tokens or latents: the work of `hmar tokenize`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hmar_cli.console import console, progress
from hmar_cli.data.batches import cache_batches
from hmar_cli.data.cache import Cache, CacheSettings, Manifest
from hmar_cli.data.encoders import Tokenizer, image_encoder, measure_latent_scale, view_shapes
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.sharing import gather
from hmar_cli.data.transforms import height_width
from hmar_cli.data.verify import verify_sample
from hmar_cli.data.writer import CacheWriter, EncodeText
from hmar_cli.errors import UserError
from hmar_cli.files import read_json
from hmar_cli.launch import Place, join_processes, leave_processes, wait_for_processes
from hmar_cli.settings import Data
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ

SHOWN = 20  # skipped images that are named on the screen
AGREEMENT = 0.98
"""Share of numbers that a verification must find equal, in every array. On the machine that made the cache all are;
another one rounds differently, which moves a token in a thousand, while a wrong image or tokenizer changes most."""
SHARD_BYTES = 1 << 30  # of a shard at most, where its size is not given
EMBEDDED = 77 * 1024 * 2  # bytes of a caption's embeddings, as CLIP's larger towers make them


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a cache is made, besides what goes into it.

    Attributes:
        batch_size: pictures encoded at once; 0 suits the image size.
        strict: stop at the first image that cannot be used.
        verify: encode a sample again afterwards, and compare checksums.
        dry_run: only say what would be done.
        device: "cpu", "cuda" or "" for a GPU where there is one.
    """

    batch_size: int = 0
    strict: bool = False
    verify: bool = False
    dry_run: bool = False
    device: str = ""


def settings_for(
    source: ImageSource,
    tokenizer: Tokenizer,
    data: Data,
    *,
    limit: int,
    shard_size: int,
    seed: int,
    text: str = "",
) -> CacheSettings:
    """Describe the cache that a recipe's `[data]` and a tokenizer make of a source.

    Args:
        source: the images.
        tokenizer: what encodes them.
        data: the recipe's.
        limit: only the first images; 0 is all.
        shard_size: images of a shard; 0 is 4096, or fewer that stay below 1 GiB.
        seed: of random crops.
        text: what encodes captions; empty if nothing does.

    Raises:
        UserError: a size that the tokenizer cannot encode, or no captions where they are to be encoded.
    """
    size = height_width(data.size)
    made: dict[str, Any]  # what depends on the tokenizer's kind
    if isinstance(tokenizer, MultiScaleVQ):
        _check_scales(tokenizer, size)
        made = {"kind": "tokens", "scales": tokenizer.scales.sides(), "vocab_size": tokenizer.vocab_size}
    else:
        pivot = height_width(data.pivot_size) if data.pivot_size else None
        _check_stride(tokenizer, [("size", size), ("pivot_size", pivot)])
        made = {"kind": "moments", "pivot_size": pivot, "latent_scale": tokenizer.latent_scale or None}
        made |= {"scales": [], "vocab_size": 0}
    if text and not source.captioned:
        raise UserError(
            f"the recipe's [text] needs captions, and {source.name} has none",
            "name their column with SOURCE?caption=NAME, or use coco:CAPTIONS.json?images=FOLDER",
        )
    length = source.length if source.random_access else None  # a stream may be wrong about its length
    if limit:
        length = limit if length is None else min(limit, length)
    settings = CacheSettings(
        source=source.name,
        length=length,
        class_names=source.class_names,
        tokenizer_hash=tokenizer.fingerprint(),
        size=size,
        crop=data.crop,
        crops=data.crops,
        mirror=data.mirror,
        seed=seed,
        captions=data.captions if text else 0,
        text=text,
        **made,
    )
    return replace(settings, shard_size=shard_size or _suited_shard(settings, tokenizer))


def _check_scales(tokenizer: MultiScaleVQ, size: tuple[int, int]) -> None:
    fits = tokenizer.image_size
    if size != fits:
        raise UserError(
            f"this tokenizer encodes images of {fits[0]} x {fits[1]} pixels, the recipe asks for "
            f"{size[0]} x {size[1]}",
            f"--set data.size={fits[0] if fits[0] == fits[1] else list(fits)}",
        )


def _check_stride(tokenizer: KlAutoencoder, sizes: list[tuple[str, tuple[int, int] | None]]) -> None:
    for name, size in sizes:
        if size is not None and any(side % tokenizer.stride for side in size):
            raise UserError(
                f"this tokenizer makes a token of {tokenizer.stride} x {tokenizer.stride} pixels, and data.{name} "
                f"is {size[0]} x {size[1]}",
                f"choose multiples of {tokenizer.stride} with --set data.{name}=…",
            )


def _suited_shard(settings: CacheSettings, tokenizer: Tokenizer) -> int:
    text = EMBEDDED if settings.text.startswith("clip") else 0
    images, each = 4096, settings.views * _view_bytes(settings, tokenizer) + settings.captions * text
    while images > 16 and images * each > SHARD_BYTES:
        images //= 2
    return images


def _view_bytes(settings: CacheSettings, tokenizer: Tokenizer) -> int:
    return sum(2 * math.prod(shape) for shape in view_shapes(settings, tokenizer).values())


def earlier_scale(out: Path, fingerprint: str) -> float | None:
    """The latent scale of a cache that is in `out` already, if the same tokenizer made it."""
    before = read_json(out / "settings.json") if (out / "settings.json").is_file() else None
    if not isinstance(before, dict) or before.get("tokenizer_hash") != fingerprint:
        return None
    return before.get("latent_scale")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a cache is made of, and by what.

    Attributes:
        source: the images.
        tokenizer: what encodes them.
        settings: the cache's; a KL autoencoder's latent scale may still be None.
        out: the cache's folder.
        options: how.
        carry: writes the tokenizer's checkpoint into a folder, with a latent scale if there is one.
        workers: threads that decode images.
        text: makes the encoder of captions on a device, where the settings ask for one.
    """

    source: ImageSource
    tokenizer: Tokenizer
    settings: CacheSettings
    out: Path
    options: Options
    carry: Callable[[Path, float | None], None]
    workers: int
    text: Callable[[torch.device], EncodeText] | None = None


def encode_source(work: Work) -> dict[str, Any] | None:
    """Make a cache, together with the other processes of this run; goes on where it was interrupted.

    Returns:
        What was done, in the first process; None in the others.

    Raises:
        UserError: no such device, another cache in `out`, an unusable image when strict, a verification that fails.
    """
    out, options = work.out, work.options
    place = join_processes(options.device)
    writer = _writer(work, place)
    if options.dry_run:
        return _plan(writer, work.tokenizer, place) if place.rank == 0 else None
    wait_for_processes()  # all have seen what the folder held before it changes
    writer = _with_latent_scale(work, writer, place)
    writer.encode_text = work.text(place.device) if work.text else None
    if place.rank == 0:
        writer.begin()
        if not (out / "tokenizer").is_dir():
            work.carry(out / "tokenizer", writer.settings.latent_scale)
    wait_for_processes()
    started = time.perf_counter()
    fresh = sum(gather(_run(writer, place)))  # waits for all
    leave_processes()
    if place.rank > 0:
        return None
    seconds = time.perf_counter() - started
    manifest = writer.finish()
    summary = _summary(out, manifest, work.tokenizer) | {
        "encoded_now": fresh,
        "seconds": round(seconds, 3),
        "images_per_second": round(fresh / seconds, 1) if fresh else None,
    }
    return summary | ({"verified": _verify(writer)} if options.verify else {})


def _writer(work: Work, place: Place) -> CacheWriter:
    """The writer of a cache; the latent scale is that of the cache in `out` where it is not known."""
    settings, options = work.settings, work.options
    if settings.kind == "moments" and settings.latent_scale is None:
        scale = earlier_scale(work.out, settings.tokenizer_hash)
        settings = replace(settings, latent_scale=scale)
    height, width = settings.size
    return CacheWriter(
        work.out,
        work.source,
        settings,
        image_encoder(work.tokenizer, settings, place.device),
        batch_size=options.batch_size or min(max(64 * 256**2 // (height * width), 1), 512),
        workers=work.workers,
        strict=options.strict,
        report=_Reporter(),
    )


def _with_latent_scale(work: Work, writer: CacheWriter, place: Place) -> CacheWriter:
    """The writer, with a latent scale that the first process measures where it is not known yet."""
    settings = writer.settings
    if settings.latent_scale is not None or not isinstance(work.tokenizer, KlAutoencoder):
        return writer
    measured = None
    if place.rank == 0:
        measured = measure_latent_scale(work.tokenizer, work.source, settings, writer.batch_size)
        console.print(f"measured the latent scale: {measured:g}", highlight=False)
    work = replace(work, settings=replace(settings, latent_scale=gather(measured)[0]))
    return _writer(work, place)


class _Reporter:
    """Names the first skipped images on the screen."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, example: Example) -> None:
        self.count += 1
        if self.count <= SHOWN:
            text = f"skipped image {example.index}: {example.error}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.count == SHOWN + 1:
            console.print("skipped more images; manifest.json lists them all")


def _run(writer: CacheWriter, place: Place) -> int:
    """Make this process's shards; the first process shows its share as a bar. Returns the images encoded."""
    rank, world = place.share
    if rank > 0:
        return writer.run(rank, world)
    title = "tokenizing" if world == 1 else f"tokenizing (one of {world} processes)"
    done = writer.done(rank, world)
    if done:
        console.print(f"going on after {done} images that are done", highlight=False)
    with progress(title, writer.share(rank, world), completed=done) as bar:
        writer.advance = bar.advance
        return writer.run(rank, world)


def _description(settings: CacheSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """What both a plan and a summary say of the content."""
    shapes = {name: list(shape) for name, shape in view_shapes(settings, tokenizer).items()}
    first = next(iter(shapes.values()))
    about: dict[str, Any] = {
        "kind": settings.kind,
        "views": settings.views,
        "tokens": first[-1] * (first[-2] if len(first) > 1 else 1),
        "shapes": shapes,
        "classes": len(settings.class_names),
        "class_names": list(settings.class_names),
        "tokenizer_hash": settings.tokenizer_hash,
    }
    if settings.kind == "moments":
        about["latent_scale"] = settings.latent_scale
    if settings.text:
        about |= {"captions": settings.captions, "text": settings.text}
    return about


def _plan(writer: CacheWriter, tokenizer: Tokenizer, place: Place) -> dict[str, Any]:
    """What would be done."""
    settings = writer.settings
    size = None
    if settings.length is not None and (not settings.text or settings.text.startswith("ids:")):
        ids = 2 * int(settings.text.removeprefix("ids:")) if settings.text else 0
        size = settings.length * (settings.views * _view_bytes(settings, tokenizer) + settings.captions * ids)
    return _description(settings, tokenizer) | {
        "out": str(writer.out),
        "source": settings.source,
        "images": settings.length,
        "done": writer.done(),
        "transform": settings.transform,
        "bytes": size,
        "batch_size": writer.batch_size,
        "device": str(place.device),
        "processes": place.world,
    }


def _summary(out: Path, manifest: Manifest, tokenizer: Tokenizer) -> dict[str, Any]:
    return _description(manifest, tokenizer) | {
        "out": str(out),
        "source": manifest.source,
        "images": manifest.count,
        "label_counts": dict(zip(manifest.class_names, manifest.label_counts, strict=True)),
        "skipped": [dict(entry) for entry in manifest.skipped],
        "bytes": sum(file["bytes"] for shard in manifest.shards for file in shard["files"].values()),
    }


def _verify(writer: CacheWriter) -> dict[str, Any]:
    """Compare all checksums, and a sample of the images with what the encoders make of them now."""
    cache = Cache.open(writer.out, checksums=True)
    images, shares = verify_sample(
        cache, writer.source, writer.encode, writer.encode_text, workers=writer.workers
    )
    worst, equal = min(shares.items(), key=lambda share: share[1])
    if equal < AGREEMENT:
        raise UserError(
            f"verification failed: of {images} images encoded again, only {equal:.1%} of the {worst} are as cached",
            "the source, the tokenizer or the cache has changed; make the cache again in another --out",
        )
    return {
        "files": len(cache.files()),
        "images": images,
        "equal": equal,
        "arrays": shares,
        "read_images_per_second": round(reading_speed(cache)),
    }


def reading_speed(cache: Cache, seconds: float = 1.0) -> float:
    """Measure how many images a second one process gets from a cache, in the shuffled batches of training."""
    batch = min(256, len(cache))
    stream, read = cache_batches(cache, batch_size=batch, seed=0), 0
    for _ in range(20):  # maps the files
        next(stream)
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        read += len(next(stream)["label"])
    return read / passed
