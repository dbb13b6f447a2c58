"""From a source of images to a cache of tokens: the work of `hmar tokenize`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hmar_cli.console import console, progress
from hmar_cli.data.batches import cache_batches
from hmar_cli.data.cache import Cache, CacheSettings, CacheWriter, Encode, Manifest
from hmar_cli.data.sources import Example, ImageSource
from hmar_cli.data.transforms import Pixels, height_width, to_tensor
from hmar_cli.errors import UserError
from hmar_cli.settings import Data

if TYPE_CHECKING:
    from hmar_cli.tokenizers.msvq import MultiScaleVQ

SHOWN = 20  # skipped images that are named on the screen
AGREEMENT = 0.98
"""Share of numbers that a verification must find equal. On the machine that made the cache all are; another one
rounds differently, which moves a token in a thousand, while a wrong image or tokenizer changes most."""


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
    source: ImageSource, tokenizer: "MultiScaleVQ", data: Data, *, limit: int, shard_size: int, seed: int
) -> CacheSettings:
    """Describe the cache that a recipe's `[data]` and a tokenizer make of a source.

    Raises:
        UserError: a size that the tokenizer cannot encode.
    """
    height, width = height_width(data.size)
    rows, columns = tokenizer.scales.grid
    fits = (rows * tokenizer.stride, columns * tokenizer.stride)
    if (height, width) != fits:
        raise UserError(
            f"this tokenizer encodes images of {fits[0]} x {fits[1]} pixels, the recipe asks for "
            f"{height} x {width}",
            f"--set data.size={fits[0] if fits[0] == fits[1] else list(fits)}",
        )
    length = source.length if source.random_access else None  # a stream may be wrong about its length
    if limit:
        length = limit if length is None else min(limit, length)
    return CacheSettings(
        source=source.name,
        length=length,
        class_names=source.class_names,
        tokenizer_hash=tokenizer.fingerprint(),
        scales=tokenizer.scales.sides(),
        vocab_size=tokenizer.vocab_size,
        size=(height, width),
        crop=data.crop,
        crops=data.crops,
        mirror=data.mirror,
        seed=seed,
        shard_size=shard_size,
    )


def token_encoder(tokenizer: "MultiScaleVQ", device: torch.device) -> Encode:
    """Make the encoder of a tokenizer: images to {"tokens": (n, L) uint16}; recipes allow no larger codebook."""
    tokenizer = tokenizer.to(device).eval()

    @torch.inference_mode()
    def encode(pixels: Pixels) -> dict[str, np.ndarray[Any, Any]]:
        try:
            tokens = tokenizer.encode(to_tensor(torch.from_numpy(pixels).to(device)))
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with {len(pixels)} images at once", f"--batch-size {max(len(pixels) // 2, 1)}"
            ) from error
        return {"tokens": tokens.cpu().numpy().astype(np.uint16)}

    return encode


def encode_source(
    source: ImageSource,
    tokenizer: "MultiScaleVQ",
    settings: CacheSettings,
    out: Path,
    options: Options,
    carry: Callable[[Path], None],
    workers: int,
) -> dict[str, Any] | None:
    """Make a cache, together with the other processes of this run; goes on where it was interrupted.

    Args:
        source: the images.
        tokenizer: what encodes them.
        settings: the cache's.
        out: the cache's folder.
        options: how.
        carry: writes the tokenizer's checkpoint into a folder.
        workers: threads that decode images.

    Returns:
        What was done, in the first process; None in the others.

    Raises:
        UserError: another cache in `out`, an unusable image when strict, or a verification that fails.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    # the last process may be at work long after the first is done
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    height, width = settings.size
    writer = CacheWriter(
        out,
        source,
        settings,
        token_encoder(tokenizer, state.device),
        batch_size=options.batch_size or min(max(64 * 256**2 // (height * width), 1), 512),
        workers=workers,
        strict=options.strict,
        report=_Reporter(),
    )
    if options.dry_run:
        return _plan(writer, tokenizer, state) if state.is_main_process else None
    state.wait_for_everyone()  # all have seen what the folder held before it changes
    if state.is_main_process:
        writer.begin()
        if not (out / "tokenizer").is_dir():
            carry(out / "tokenizer")
    state.wait_for_everyone()
    started = time.perf_counter()
    fresh = sum(gather_object([_run(writer, state)]))  # waits for all
    if state.num_processes > 1:
        state.destroy_process_group()
    if not state.is_main_process:
        return None
    seconds = time.perf_counter() - started
    manifest = writer.finish()
    summary = _summary(out, manifest, tokenizer) | {
        "encoded_now": fresh,
        "seconds": round(seconds, 3),
        "images_per_second": round(fresh / seconds, 1) if fresh else None,
    }
    return summary | ({"verified": _verify(writer)} if options.verify else {})


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


def _run(writer: CacheWriter, state: Any) -> int:
    """Make this process's shards; the first process shows its share as a bar. Returns the images encoded."""
    rank, world = state.process_index, state.num_processes
    if not state.is_main_process:
        return writer.run(rank, world)
    title = "tokenizing" if world == 1 else f"tokenizing (one of {world} processes)"
    done = writer.done(rank, world)
    if done:
        console.print(f"going on after {done} images that are done", highlight=False)
    with progress(title, writer.share(rank, world), completed=done) as bar:
        writer.advance = bar.advance
        return writer.run(rank, world)


def _plan(writer: CacheWriter, tokenizer: "MultiScaleVQ", state: Any) -> dict[str, Any]:
    """What would be done."""
    settings = writer.settings
    size = None
    if settings.length is not None:
        size = settings.length * settings.views * tokenizer.scales.total * 2
    return {
        "out": str(writer.out),
        "source": settings.source,
        "images": settings.length,
        "done": writer.done(),
        "views": settings.views,
        "tokens": tokenizer.scales.total,
        "classes": len(settings.class_names),
        "class_names": list(settings.class_names),
        "transform": settings.transform,
        "tokenizer_hash": settings.tokenizer_hash,
        "bytes": size,
        "batch_size": writer.batch_size,
        "device": str(state.device),
        "processes": state.num_processes,
    }


def _summary(out: Path, manifest: Manifest, tokenizer: "MultiScaleVQ") -> dict[str, Any]:
    return {
        "out": str(out),
        "source": manifest.source,
        "images": manifest.count,
        "views": manifest.views,
        "tokens": tokenizer.scales.total,
        "classes": len(manifest.class_names),
        "label_counts": dict(zip(manifest.class_names, manifest.label_counts, strict=True)),
        "skipped": [dict(entry) for entry in manifest.skipped],
        "tokenizer_hash": manifest.tokenizer_hash,
        "bytes": sum(file["bytes"] for shard in manifest.shards for file in shard["files"].values()),
    }


def _verify(writer: CacheWriter) -> dict[str, Any]:
    """Compare all checksums, and a sample of the images with what the encoder makes of them now."""
    cache = Cache.open(writer.out, checksums=True)
    images, equal = cache.verify_sample(writer.source, writer.encode, workers=writer.workers)
    if equal < AGREEMENT:
        raise UserError(
            f"verification failed: of {images} images encoded again, only {equal:.1%} of the tokens are as cached",
            "the source, the tokenizer or the cache has changed; make the cache again in another --out",
        )
    return {
        "files": len(cache.files()),
        "images": images,
        "equal": equal,
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
