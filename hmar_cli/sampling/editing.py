"""Edits without training: a region of a picture is drawn anew, the rest stays known to the model.

A token's coverage is the share of what it stands for that lies in the region. On the finest grid every token with
any coverage is drawn. Pixels come out of the tokenizer's decoder everywhere; putting those outside the region back
is the caller's part.

VAR and HMAR. The picture is encoded to token maps. At every scale tokens of the region are drawn, the others kept.
A coarse token covers both what is kept and what is new. Drawn anew it knows nothing of what is kept beside it in
the same token, and the colours inside the region come out at odds with those outside; so it is kept up to a
`least_coverage`, and finer scales do the rest. Feature maps are blended by coverage on the last grid: what scale k
adds to f_hat is M h(new map) + (1 - M) h(picture's map). Outside the region features stay the picture's, at every
scale; a coarse token that is drawn counts inside alone. `keep_scales` keeps the first scales whole, and with them
the picture's layout and colours inside the region; a `strength` below 1 does the same by a share of the scales.
Refinement redraws tokens of the region only, and sees the kept ones beside them.

MAR and Hi-MAR. Tokens outside the region are known from the start, as the encoder's posterior means, and stay known
in every step: the transformer sees them, and a transformer head has them imposed where the sampler's settings say
so. Hi-MAR's first phase does the same with the pivots of the shrunken picture, where any coverage makes a pivot
unknown; its second one sees conditional tokens of the pivots that were drawn and, as in training, the learned empty
pivots where they were known. `strength` is the share of the region's tokens that are drawn, those that come last in
the random order of the image; the others are known too.

What lies inside the region is seen by the tokenizer's encoder: coarse tokens that are kept hold some of it, and
tokens beside the region carry traces of it. A caller who wants nothing of it to be left fills the region before,
best with a smooth continuation of what surrounds it.

Letters: B images, H W their size, K scales, L tokens of all scales, n tokens of one grid, h w the last grid, C latent
channels, M coverage.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.sampling.images import autocast, decode, name_broken_numbers, parts, require_finite
from hmar_cli.sampling.masked import KnownTokens, sample_masked
from hmar_cli.sampling.next_scale import KeptTokens, sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import MaskedArSample, NextScaleSample
from hmar_cli.tokenizers.kl import KlAutoencoder, posterior
from hmar_cli.tokenizers.msvq import MultiScaleVQ


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How much of the region is drawn anew.

    Attributes:
        strength: in (0, 1]. VAR and HMAR: the first round((1 - strength) K) scales are kept in the region too, but
            never all. MAR and Hi-MAR: the share of the region's tokens that are drawn, rounded up.
        keep_scales: VAR and HMAR: the first scales that are kept whole, 0 to K - 1; the larger of both counts.
        least_coverage: in [0, 1). VAR and HMAR: a token of any scale but the last is drawn if its coverage is above
            this. 0 draws every token that the region touches.

    Raises:
        ValueError: a value out of range.
    """

    strength: float = 1.0
    keep_scales: int = 0
    least_coverage: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"expected a strength above 0 and up to 1, got {self.strength}")
        if self.keep_scales < 0:
            raise ValueError(f"expected 0 or more scales to keep, got {self.keep_scales}")
        if not 0 <= self.least_coverage < 1:
            raise ValueError(f"expected a least coverage from 0 to below 1, got {self.least_coverage}")


@dataclass(frozen=True)
class RegionView:
    """A region as the model sees it on one of its token grids.

    Attributes:
        name: "scale 3 of 10", "pivots" or "tokens".
        coverage: [h, w] float32, share of each token's area that lies in the region.
        drawn: [h, w] bool, tokens that are drawn anew. For MAR and Hi-MAR with a strength below 1 those that may
            be: which of them are differs between images.
    """

    name: str
    coverage: Tensor
    drawn: Tensor


def model_size(
    model: NextScaleTransformer | MaskedTransformer, tokenizer: MultiScaleVQ | KlAutoencoder
) -> tuple[int, int]:
    """Height and width of the images that a model draws."""
    rows, columns = _finest_grid(model)
    return rows * tokenizer.stride, columns * tokenizer.stride


def _finest_grid(model: NextScaleTransformer | MaskedTransformer) -> tuple[int, int]:
    return model.scales.grid if isinstance(model, NextScaleTransformer) else model.grid


def region_views(
    model: NextScaleTransformer | MaskedTransformer, region: Tensor, edit: EditSettings
) -> list[RegionView]:
    """Show a region as the model will see it, from the coarsest token grid to the finest.

    Coverage on the last grid is the mean over a token's pixels; on a coarser scale it is the mean of that over the
    last grid's tokens, as the tokenizer makes its features smaller.

    Args:
        model: VAR, HMAR: a view for each scale. Hi-MAR: pivots, then tokens. MAR: tokens.
        region: [H, W] float in [0, 1], 1 where all is drawn anew; of the model's size, or any that is no smaller than
            the token grid.
        edit: which tokens are kept.

    Raises:
        ValueError: a region of another shape or range, or more scales to keep than the model can.
    """
    rows, columns = _finest_grid(model)
    if region.ndim != 2 or region.shape[0] < rows or region.shape[1] < columns:
        raise ValueError(f"expected a region of at least {rows} x {columns}, got {list(region.shape)}")
    if not (region.min() >= 0 and region.max() <= 1):  # NaN is neither
        raise ValueError("expected a region of numbers from 0 to 1, got others")
    finest = _shrink(region.float()[None, None], (rows, columns))
    if isinstance(model, MaskedTransformer):
        if edit.keep_scales:
            raise ValueError(f"expected no scales to keep for a model without, got {edit.keep_scales}")
        pivots = [] if model.pivot_grid is None else [_view("pivots", _shrink(finest, model.pivot_grid))]
        return [*pivots, _view("tokens", finest)]
    scales = model.scales
    if edit.keep_scales >= len(scales):
        raise ValueError(f"expected at most {len(scales) - 1} scales to keep, got {edit.keep_scales}")
    weak = min(math.floor((1 - edit.strength) * len(scales) + 0.5), len(scales) - 1)
    first = max(edit.keep_scales, weak)
    views = []
    for k, grid in enumerate(scales.grids):
        least = edit.least_coverage if k + 1 < len(scales) else 0.0
        view = _view(f"scale {k + 1} of {len(scales)}", _shrink(finest, grid), least)
        views.append(view if k >= first else replace(view, drawn=torch.zeros_like(view.drawn)))
    return views


def _shrink(coverage: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average coverage [1, 1, H, W] over the tokens of a grid: [1, 1, h, w]."""
    return F.interpolate(coverage, size=grid, mode="area")


def _view(name: str, coverage: Tensor, least: float = 0.0) -> RegionView:
    plain = coverage[0, 0]  # [h, w]
    return RegionView(name, plain, plain > least)


@torch.inference_mode()
def edit_images(
    model: NextScaleTransformer | MaskedTransformer,
    tokenizer: MultiScaleVQ | KlAutoencoder,
    images: Tensor,
    region: Tensor,
    condition: Tensor | None,
    settings: NextScaleSample | MaskedArSample,
    edit: EditSettings,
    noise: PhiloxNoise,
    *,
    precision: str = "auto",
) -> Tensor:
    """Draw a region of pictures anew.

    A full region with strength 1 gives what the sampler draws of the same noise; an empty one what the tokenizer
    makes of the pictures. As by `Sampler`, a picture comes out the same in any batch: its random numbers are those
    of its index in `noise`, and on a CPU it is encoded and decoded alone.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer, on the same device.
        images: [B, 3, H, W] float32 in [-1, 1], of the size `model_size`; or [1, 3, H, W] for B variations of one
            picture, which is then encoded once.
        region: [H, W] float in [0, 1] for all pictures: 1 is drawn anew, 0 kept. Values between are the weight of
            the new features (VAR, HMAR); a token with any weight is drawn.
        condition: B rows as `Conditions.encode` gives them: classes [B] int64 (VAR, HMAR: `num_classes` is "no
            class"), token ids [B, T] int64 or text embeddings [B, T, W] float32. None asks for nothing.
        settings: as for plain sampling. MAR and Hi-MAR take at most as many steps as there are tokens to draw.
        edit: how much is drawn.
        noise: random numbers of B images: `PhiloxNoise(seed, indices)`.
        precision: "auto" (bf16 on a GPU), "bf16" or "fp32".

    Returns:
        Decoded images [B, 3, H, W] float32 in [-1, 1], not composited with the pictures.

    Raises:
        ValueError: arguments of other shapes or ranges, settings of the other family, or scales to keep where there
            are none.
        UserError: the model gave numbers that are not finite, or an unknown precision.
    """
    batch = len(noise.images)
    if condition is not None and len(condition) != batch:
        raise ValueError(f"expected {batch} conditions, as many as the noise is for, got {len(condition)}")
    if len(images) not in (1, batch):
        raise ValueError(f"expected 1 image or {batch}, as many as the noise is for, got {len(images)}")
    size = model_size(model, tokenizer)
    if tuple(images.shape[1:]) != (3, *size) or tuple(region.shape) != size:
        got = f"images {list(images.shape)} and a region {list(region.shape)}"
        raise ValueError(f"expected images [B, 3, {size[0]}, {size[1]}] and a region of that size, got {got}")
    views = region_views(model, region.to(images.device), edit)
    with name_broken_numbers(noise.images.tolist()):
        if isinstance(model, NextScaleTransformer):
            if not isinstance(tokenizer, MultiScaleVQ) or not isinstance(settings, NextScaleSample):
                raise ValueError("expected the tokenizer and the settings of a next-scale model")
            if condition is None:
                condition = torch.full((batch,), model.num_classes, device=images.device)
            return _edit_token_maps(model, tokenizer, images, views, condition, settings, noise, precision)
        if not isinstance(tokenizer, KlAutoencoder) or not isinstance(settings, MaskedArSample):
            raise ValueError("expected the tokenizer and the settings of a masked autoregressive model")
        known = _known_tokens(tokenizer, images, views, edit, batch)
        with autocast(images.device, precision):
            sampled = sample_masked(model, condition, settings, noise, known=known)
            return require_finite(decode(tokenizer.decode_latents, parts(sampled.latents)))


def _edit_token_maps(
    model: NextScaleTransformer,
    tokenizer: MultiScaleVQ,
    images: Tensor,
    views: list[RegionView],
    condition: Tensor,
    settings: NextScaleSample,
    noise: PhiloxNoise,
    precision: str,
) -> Tensor:
    """`edit_images` of VAR and HMAR."""
    batch, quantizer = len(condition), tokenizer.quantizer
    drawn = tuple(view.drawn.flatten() for view in views)  # [n_k] each
    kept = KeptTokens(
        tokens=torch.cat([tokenizer.encode(part) for part in parts(images)]).expand(batch, -1),
        drawn=drawn,
        counts=tuple(int(each.sum()) for each in drawn),
        weight=views[-1].coverage,
    )
    with autocast(images.device, precision):
        tokens, f_hat = sample_next_scale(model, quantizer, condition, settings, noise, kept=kept)
        if images.is_cuda:
            return require_finite(tokenizer.decode(f_hat))
        alone = [replace(kept, tokens=kept.tokens[i : i + 1]) for i in range(batch)]
        maps = [each.f_hat(part, quantizer) for each, part in zip(alone, tokens.split(1), strict=True)]
        return require_finite(decode(tokenizer.decode, maps))


def _known_tokens(
    tokenizer: KlAutoencoder, images: Tensor, views: list[RegionView], edit: EditSettings, batch: int
) -> tuple[KnownTokens | None, KnownTokens]:
    """What MAR, or Hi-MAR in its two phases, knows of the pictures."""

    def known(view: RegionView) -> KnownTokens:
        side = [tokenizer.stride * n for n in view.drawn.shape]
        small = images if list(images.shape[2:]) == side else F.interpolate(images, size=side, mode="area")
        means = [posterior(tokenizer.moments(part))[0] for part in parts(small)]  # [1, C, h, w] each
        latents = torch.cat(means).flatten(2).transpose(1, 2) * tokenizer.latent_scale  # [B, n, C]
        count = math.ceil(edit.strength * int(view.drawn.sum()) - 1e-9)  # 0.1 of 30 are 3
        return KnownTokens(latents.expand(batch, -1, -1), view.drawn.flatten(), count)

    return known(views[0]) if len(views) > 1 else None, known(views[-1])
