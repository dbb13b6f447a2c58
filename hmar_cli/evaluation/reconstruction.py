"""How well tokenizers reconstruct images, and how they use their codes or latents.

Every number is of reconstructions of 8 bits, as they would be saved. They are made as sampling makes images: from the
tokens of a multi-scale VQ tokenizer, from the posterior's mean of a KL autoencoder.

Letters: B images of a batch, H W their height and width, K scales, V codes, F features.
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hmar_cli.data.frames import as_tensor
from hmar_cli.data.sharing import gather
from hmar_cli.data.transforms import Pixels, image_transform
from hmar_cli.evaluation.codes import count_codes, perplexity, usage
from hmar_cli.evaluation.extractors import Extractor
from hmar_cli.evaluation.frechet import FeatureStatistics
from hmar_cli.evaluation.observing import image_digest
from hmar_cli.models.scales import Side
from hmar_cli.tokenizers.kl import KlAutoencoder, posterior
from hmar_cli.tokenizers.losses import Lpips, psnr
from hmar_cli.tokenizers.msvq import MultiScaleVQ

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation, in pixels, of the Gaussian window of SSIM."""

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""What keeps SSIM's fractions finite, for levels of 0 to 255."""


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004, with its window and constants), 1 where they are equal.

    It is computed for each colour and for each place where the whole window lies inside the image, and averaged over
    both; scikit-image gives the same with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=255, channel_axis=...`.

    Args:
        images: [B, 3, H, W], levels of 0 to 255, sides of at least `WINDOW`.
        reconstructions: the same shape.

    Returns:
        [B] float64.

    Raises:
        ValueError: other shapes.
    """
    if images.shape != reconstructions.shape or images.ndim != 4 or min(images.shape[2:]) < WINDOW:
        shapes = f"{list(images.shape)} and {list(reconstructions.shape)}"
        raise ValueError(f"expected two batches of one shape with sides of at least {WINDOW}, got {shapes}")
    x, y = (
        each.double().flatten(0, 1).unsqueeze(1) for each in (images, reconstructions)
    )  # B 3 H W -> 3B 1 H W
    place = torch.arange(WINDOW, dtype=torch.double, device=x.device) - WINDOW // 2
    bell = (-0.5 * (place / SIGMA) ** 2).exp()
    bell = bell / bell.sum()

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(
            F.conv2d(z, bell[None, None, :, None]), bell[None, None, None]
        )  # [3B, 1, H - 10, W - 10]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    shared = mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * shared + C2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return likeness.view(len(images), -1).mean(dim=1)  # 3B 1 h w -> B


class _Codes:
    """Reconstructs through tokens, and counts them by scale."""

    def __init__(self, model: MultiScaleVQ) -> None:
        self.model = model
        self.counts = torch.zeros(len(model.scales), model.vocab_size, dtype=torch.long)

    def __call__(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        model = self.model.at_size((height, width))
        tokens = model.encode(images)  # [B, L]
        self.counts += count_codes(tokens, model.scales, model.vocab_size)
        return model.decode_tokens(tokens)

    def sums(self) -> list[Tensor]:
        return [self.counts]

    def result(self) -> dict[str, Any]:
        return {
            "usage": usage(self.counts.sum(dim=0)).item(),
            "tokens_per_scale": self.counts.sum(dim=1).tolist(),
            "usage_per_scale": usage(self.counts).tolist(),
            "perplexity_per_scale": perplexity(self.counts).tolist(),
        }


class _Latents:
    """Reconstructs through the posterior's mean, and keeps sums of the latents."""

    def __init__(self, model: KlAutoencoder) -> None:
        self.model = model
        self.totals = torch.zeros(4, dtype=torch.double)  # of means, their squares, variances; and how many

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = posterior(self.model.moments(images))  # 2 x [B, Z, h, w]
        self.totals[:3] += torch.stack([x.double().sum() for x in (mean, mean.square(), std.square())]).cpu()
        self.totals[3] += mean.numel()
        return self.model.decode(mean).clamp(-1, 1)

    def sums(self) -> list[Tensor]:
        return [self.totals]

    def result(self) -> dict[str, Any]:
        mean, square, variance = (self.totals[:3] / self.totals[3]).tolist()
        return {"latent_std": (square - mean**2 + variance) ** 0.5, "posterior_std": variance**0.5}


class Reconstructions:
    """What a tokenizer makes of images, which come in batches; of the reconstructions only the first ones are kept.

    Args:
        tokenizer: in evaluation mode, on its device.
        extractor: gives the features of the rFID, of images and reconstructions alike; without one there is no rFID.
        shown: pairs of the first images and their reconstructions that are kept.
        perceptual: gives the LPIPS of each pair, on the tokenizer's device; without one there is none.

    Attributes:
        digests: SHA-256 of each image.
        psnr: of each image in dB, over all its pixels and colours.
        ssim: of each image; none of images smaller than its window.
        l1: mean absolute difference of each image, where black is -1 and white 1.
        lpips: of each image; none of images whose sides are below 16.
        pairs: the first images and their reconstructions, each [H, W, 3].
        seconds: that all took, with reading the images.
    """

    def __init__(
        self,
        tokenizer: MultiScaleVQ | KlAutoencoder,
        extractor: Extractor | None = None,
        shown: int = 0,
        perceptual: Lpips | None = None,
    ) -> None:
        self.extractor, self.shown, self.perceptual = extractor, shown, perceptual
        self.digests: list[bytes] = []
        self.psnr: list[float] = []
        self.ssim: list[float] = []
        self.l1: list[float] = []
        self.lpips: list[float] = []
        self.pairs: list[tuple[Pixels, Pixels]] = []
        self.seconds = 0.0
        self._device = next(tokenizer.parameters()).device
        self._bottleneck = _Codes(tokenizer) if isinstance(tokenizer, MultiScaleVQ) else _Latents(tokenizer)
        self._statistics = FeatureStatistics(), FeatureStatistics()  # of images, of reconstructions

    @property
    def count(self) -> int:
        """Images so far."""
        return len(self.psnr)

    @property
    def features(self) -> int:
        """F of the extractor; 0 without one, or before there are images."""
        return len(self._statistics[0].mean) if self._statistics[0].count else 0

    @torch.inference_mode()
    def add(self, images: Tensor) -> Tensor:
        """Reconstruct images and compare.

        Args:
            images: [B, 3, H, W] uint8, of a size that the tokenizer's stride divides.

        Returns:
            The reconstructions, [B, 3, H, W] uint8.

        Raises:
            ValueError: other images, or ones that are too small for the tokenizer's scales.
            FloatingPointError: reconstructions that are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        self.digests += (image_digest(_pixels(each)) for each in images)
        images = images.to(self._device)
        wanted = images.float() / 127.5 - 1
        reconstructions = self._bottleneck(wanted)
        if not reconstructions.isfinite().all():
            raise FloatingPointError("the tokenizer's reconstructions are not finite")
        reconstructions = ((reconstructions + 1) * 127.5).round().to(torch.uint8)  # [B, 3, H, W]
        got = reconstructions.float() / 127.5 - 1
        self.psnr += psnr(wanted, got).tolist()
        self.l1 += (wanted - got).abs().double().mean(dim=(1, 2, 3)).tolist()
        if min(images.shape[2:]) >= WINDOW:
            self.ssim += ssim(images, reconstructions).tolist()
        if self.perceptual is not None and min(images.shape[2:]) >= 16:
            self.lpips += self.perceptual(wanted, got).double().tolist()
        if self.extractor is not None:
            for statistics, pixels in zip(self._statistics, (images, reconstructions), strict=True):
                statistics.add(self.extractor(_scaled(pixels, self.extractor.size)).pooled)
        room = self.shown - len(self.pairs)
        self.pairs += [
            (_pixels(a), _pixels(b)) for a, b in zip(images[:room], reconstructions[:room], strict=True)
        ]
        return reconstructions

    def gather(self) -> None:
        """Join what all processes found, where there are several; the pairs stay those of each one."""
        statistics = tuple(each.cpu() for each in self._statistics)
        lists = ("digests", "psnr", "ssim", "l1", "lpips")
        self.seconds = max(gather(self.seconds))
        mine = (*(getattr(self, name) for name in lists), statistics, self._bottleneck.sums())
        found = gather(mine)
        for place, name in enumerate(lists):
            setattr(self, name, [value for part in found for value in part[place]])
        joined = FeatureStatistics(), FeatureStatistics()
        for *_, parts, _ in found:
            for into, part in zip(joined, parts, strict=True):
                into.join(part)
        self._statistics = joined
        for total, *each in zip(self._bottleneck.sums(), *(part[-1] for part in found), strict=True):
            total.copy_(torch.stack(each).sum(dim=0))

    def rfid(self) -> float | None:
        """Fréchet distance of the reconstructions' features from those of the images; None without an extractor.

        Raises:
            ValueError: fewer than two images.
        """
        if self.extractor is None:
            return None
        images, reconstructions = self._statistics
        return reconstructions.distance(images)

    def summary(self) -> dict[str, Any]:
        """Means over the images, and what is known of codes or latents.

        Returns:
            `count`; `psnr`, `ssim`, `l1` and `lpips`, each a mean over images, None where no image has one; `rfid`
            where there is an extractor.
            Of a multi-scale VQ tokenizer `usage`, the share of the V codes that any scale uses; `tokens_per_scale`,
            `usage_per_scale` and `perplexity_per_scale`, the exponential of the entropy of the codes in nats, K
            numbers each. Of a KL
            autoencoder `latent_std`, the standard deviation of all numbers of drawn latents, before any scale, and
            `posterior_std`, the root mean square of the posteriors' own.

        Raises:
            ValueError: no image came, or too few for an rFID.
        """
        if not self.count:
            raise ValueError("expected at least one batch of images, got none")
        means = {
            name: math.fsum(values) / len(values) if values else None
            for name in ("psnr", "ssim", "l1", "lpips")
            for values in (getattr(self, name),)
        }
        distance = {} if self.extractor is None else {"rfid": self.rfid()}
        return {"count": self.count, **means, **distance, **self._bottleneck.result()}


def _scaled(pixels: Tensor, size: Side | None) -> Tensor:
    """Images [B, 3, H, W] uint8 at the size that an extractor needs, scaled and centre-cropped as ADM does."""
    if size is None:
        return pixels
    cut = image_transform(size, "adm", train=False)
    if tuple(pixels.shape[2:]) == cut.size:
        return pixels
    return as_tensor([cut(Image.fromarray(_pixels(each))) for each in pixels]).to(pixels.device)


def _pixels(image: Tensor) -> Pixels:
    """An image [3, H, W] uint8 as an array [H, W, 3]."""
    pixels: Pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def evaluate_tokenizer(
    tokenizer: MultiScaleVQ | KlAutoencoder,
    images: Iterable[Tensor],
    extractor: Extractor | None = None,
    shown: int = 0,
    perceptual: Lpips | None = None,
) -> Reconstructions:
    """Measure how well a tokenizer reconstructs images, and how it uses its codes or latents.

    Args:
        tokenizer: in evaluation mode, on its device.
        images: batches [B, 3, H, W] uint8; each batch may have its own size.
        extractor: of the rFID's features.
        shown: pairs of images and reconstructions that are kept.
        perceptual: of LPIPS, on the tokenizer's device.

    Raises:
        ValueError: as `Reconstructions.add`.
    """
    found = Reconstructions(tokenizer, extractor, shown, perceptual)
    start = time.perf_counter()
    for batch in images:
        found.add(batch)
    found.seconds = time.perf_counter() - start
    return found
