"""Encoders of images as caches take them, and the scale of a new tokenizer's latents.

Letters: n images; H W their size; L tokens, or 2Z h w means and log-variances of a grid of latents.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from hmar_cli.data.cache import Array, CacheSettings
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.transforms import Pixels, image_transform, shrink, to_tensor
from hmar_cli.data.writer import Encode
from hmar_cli.errors import UserError
from hmar_cli.tokenizers.kl import KlAutoencoder, sample_posterior
from hmar_cli.tokenizers.msvq import MultiScaleVQ

Tokenizer = MultiScaleVQ | KlAutoencoder
MEASURED = 1024  # images from which a latent scale is measured


def view_shapes(settings: CacheSettings, tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """The arrays that a tokenizer makes, and their shape for one view; their numbers have two bytes."""
    if isinstance(tokenizer, MultiScaleVQ):
        return {"tokens": (tokenizer.scales.total,)}
    shapes = {"moments": settings.size, "pivot_moments": settings.pivot_size}
    return {
        name: (2 * tokenizer.z_channels, *(side // tokenizer.stride for side in size))
        for name, size in shapes.items()
        if size is not None
    }


def image_encoder(tokenizer: Tokenizer, settings: CacheSettings, device: torch.device) -> Encode:
    """Make the encoder of a tokenizer."""
    if isinstance(tokenizer, MultiScaleVQ):
        return token_encoder(tokenizer, device)
    pivot = settings.pivot_size
    return moment_encoder(tokenizer, (pivot[0], pivot[1]) if pivot else None, device)


def token_encoder(tokenizer: MultiScaleVQ, device: torch.device) -> Encode:
    """Make the encoder of a tokenizer: images to {"tokens": (n, L) uint16}; recipes allow no larger codebook."""
    tokenizer = tokenizer.to(device).eval()

    @torch.inference_mode()
    def encode(pixels: Pixels) -> dict[str, Array]:
        return {"tokens": tokenizer.encode(_images(pixels, device)).cpu().numpy().astype(np.uint16)}

    return _within_memory(encode)


def moment_encoder(
    tokenizer: KlAutoencoder, pivot_size: tuple[int, int] | None, device: torch.device
) -> Encode:
    """Make the encoder of a KL autoencoder: images to means and log-variances, float16.

    Args:
        tokenizer: the autoencoder.
        pivot_size: pixels of the smaller copy of each image (`shrink`) that is encoded too, if any.
        device: where.

    Returns:
        A function from images (n, H, W, 3) to {"moments": (n, 2Z, h, w), "pivot_moments": (n, 2Z, h', w')}; it
        raises UserError where a number is not finite, or beyond a half float.
    """
    tokenizer = tokenizer.to(device).eval()

    def moments(pixels: Pixels) -> Array:
        halves = tokenizer.moments(_images(pixels, device)).half()
        if not torch.isfinite(halves).all():
            raise UserError("the tokenizer encodes an image to numbers that are not finite", "train it anew")
        return halves.cpu().numpy()

    @torch.inference_mode()
    def encode(pixels: Pixels) -> dict[str, Array]:
        arrays = {"moments": moments(pixels)}
        return arrays | ({"pivot_moments": moments(shrink(pixels, pivot_size))} if pivot_size else {})

    return _within_memory(encode)


def _images(pixels: Pixels, device: torch.device) -> torch.Tensor:
    return to_tensor(torch.from_numpy(pixels).to(device))


def _within_memory(encode: Encode) -> Encode:
    def checked(pixels: Pixels) -> dict[str, Array]:
        try:
            return encode(pixels)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"out of memory with {len(pixels)} images at once", f"--batch-size {max(len(pixels) // 2, 1)}"
            ) from error

    return checked


def measure_latent_scale(
    tokenizer: KlAutoencoder, source: ImageSource, settings: CacheSettings, batch_size: int
) -> float:
    """Measure what latents must be multiplied by for a standard deviation of 1.

    The deviation is that of all numbers together, of one draw from the posterior of each of 1024 images
    from all over the source (as Rombach et al. 2022 rescale theirs).

    Args:
        tokenizer: the autoencoder, on the device that it is to run on.
        source: the images; the central crop of each is taken.
        settings: how they are cut.
        batch_size: images encoded at once.

    Returns:
        The scale, to four digits.

    Raises:
        UserError: no image can be used, or the latents do not vary.
    """
    cut = image_transform(settings.size, settings.crop, train=False)
    limit = MEASURED if settings.length is None else min(MEASURED, settings.length)
    device, rng = next(tokenizer.parameters()).device, np.random.default_rng(0)
    count, total, squares = 0, 0.0, 0.0
    for batch in _groups(_spread(source, settings.length, limit), batch_size):
        pixels = np.stack([cut(image) for image in batch])
        with torch.inference_mode():
            moments = tokenizer.moments(_images(pixels, device)).cpu()
        noise = torch.from_numpy(
            rng.standard_normal((len(moments), moments.shape[1] // 2, *moments.shape[2:]))
        )
        latents = sample_posterior(moments.double(), noise)
        count, total = count + latents.numel(), total + float(latents.sum())
        squares += float(latents.square().sum())
    if not count:
        raise UserError(f"none of {limit} images of {source.name} could be used")
    variance = squares / count - (total / count) ** 2
    if not variance > 0 or not math.isfinite(variance):
        raise UserError(f"the tokenizer's latents have variance {variance}", "train it anew")
    return float(f"{variance**-0.5:.4g}")


def _spread(source: ImageSource, length: int | None, limit: int) -> Iterator[Example]:
    """Images at even distances, since folders come sorted by class; of a stream the first ones."""
    if length is None or not source.random_access:
        return source.read(0, limit)
    return (decode() for decode in source.pick(np.linspace(0, length - 1, limit).astype(int).tolist()))


def _groups(examples: Iterator[Example], size: int) -> Iterator[list[Image.Image]]:
    """The usable ones among some images, `size` at a time."""
    group: list[Image.Image] = []
    for example in examples:
        if example.image is not None:
            group.append(example.image)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
