"""Whether a cache still is what its source and its encoders say."""

from collections import Counter
from functools import partial

import numpy as np

from hmar_cli.data.ahead import ordered_map
from hmar_cli.data.cache import Array, Cache, Indices
from hmar_cli.data.images import ImageSource
from hmar_cli.data.writer import Encode, EncodeText, Viewed, encode_batch, views_of
from hmar_cli.errors import UserError

CLOSE = 0.01
"""Numbers agree that differ by no more than this, plus this share of them. Stored half floats are twenty times as
fine, and so is what another machine rounds differently; latents and embeddings of other images or captions differ
by about 1. Tokens and ids must be the same."""


def verify_sample(
    cache: Cache,
    source: ImageSource,
    encode: Encode,
    encode_text: EncodeText | None = None,
    *,
    batches: int = 4,
    workers: int = 2,
    seed: int = 0,
) -> tuple[int, dict[str, float]]:
    """Encode random batches again, each made up as it was, and compare.

    Args:
        cache: the cache.
        source: the images that it was made of.
        encode: the encoder that made it.
        encode_text: the encoder of its captions, where it holds encoded ones.
        batches: how many to compare.
        workers: threads that decode images.
        seed: which ones.

    Returns:
        How many images were compared, and of each array the share of numbers that agree.

    Raises:
        UserError: an image that cannot be read any more, or has another label or other captions.
    """
    shards = [shard for shard in cache.manifest.shards if shard["count"]]
    starts = np.cumsum([0, *(shard["count"] for shard in shards)])
    places = [
        (number, first)
        for number, shard in enumerate(shards)
        for first in range(0, shard["count"], shard["batch_size"])
    ]
    chosen = sorted(np.random.default_rng(seed).permutation(len(places))[:batches])
    images, equal, total = 0, Counter[str](), Counter[str]()
    for number, first in (places[i] for i in chosen):
        size = shards[number]["batch_size"]
        indices = starts[number] + np.arange(first, min(first + size, shards[number]["count"]))
        batch = _again(cache, source, indices, workers)
        arrays = encode_batch(batch, encode, encode_text, cache.manifest.captions, size)
        for name, again in arrays.items():
            every = np.arange(cache.rows(name))
            stored = cache.fetch(name, indices.repeat(len(every)), np.tile(every, len(indices)))
            equal[name] += int(_agree(stored, again.reshape(stored.shape)).sum())
            total[name] += stored.size
        images += len(indices)
    return images, {name: equal[name] / total[name] for name in total}


def _agree(stored: Array, again: Array) -> Array:
    if stored.dtype.kind != "f":
        return np.asarray(stored == again)
    return np.isclose(again.astype(np.float32), stored.astype(np.float32), rtol=CLOSE, atol=CLOSE)


def _again(cache: Cache, source: ImageSource, indices: Indices, workers: int) -> list[Viewed]:
    """Read images again that the cache holds at `indices`."""
    labels, captions = cache.labels[indices].tolist(), cache.captions(indices)
    wanted = dict(zip(cache.index[indices].tolist(), zip(labels, captions, strict=True), strict=True))
    result: list[Viewed] = []
    decoded = source.deferred(min(wanted), max(wanted) + 1)
    for example, views in ordered_map(partial(views_of, cache.manifest), decoded, workers):
        if example.index not in wanted:
            continue
        label, texts = wanted[example.index]
        other = example.error
        if not other and example.label != label:
            other = f"label {example.label} instead of {label}"
        elif not other and example.captions[: len(texts) or None] != texts:
            other = f"captions {example.captions} instead of {texts}"
        if other or views is None:
            raise UserError(f"image {example.index} of {source.name} is not what was cached: {other}")
        result.append((example, views))
    if len(result) < len(wanted):
        raise UserError(f"{source.name} has fewer images than when it was cached")
    return result
