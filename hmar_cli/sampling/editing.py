"""Edits without training: a region of a picture is drawn anew, the rest stays known to the model.

A token belongs to the region if any part of what it stands for does: its coverage, the share of its area that lies
in the region, is above 0. Pixels come out of the tokenizer's decoder everywhere; putting those outside the region
back is the caller's part.

VAR and HMAR. The picture is encoded to token maps. At every scale tokens of the region are drawn, the others kept.
A coarse token covers both what is kept and what is new, so feature maps are blended by coverage on the last grid:
what scale k adds to f_hat is M h(new map) + (1 - M) h(picture's map). Outside the region features stay the
picture's, at every scale; a coarse token that is drawn counts inside alone. `keep_scales` keeps the first scales
whole, and with them the picture's layout and colours inside the region; a `strength` below 1 does the same by a
share of the scales. Refinement redraws tokens of the region only, and sees the kept ones beside them.

MAR and Hi-MAR. Tokens outside the region are known from the start, as the encoder's posterior means, and stay known
in every step: the transformer sees them, and a transformer head has them imposed where the sampler's settings say
so. Hi-MAR's first phase does the same with the pivots of the shrunken picture; its second one sees conditional
tokens of the pivots that were drawn and, as in training, the learned empty pivots where they were known. `strength`
is the share of the region's tokens that are drawn, those that come last in the random order of the image; the
others are known too.

Whatever lies inside the region is seen by the tokenizer's encoder, whose view is wide: tokens next to the region
carry traces of it. A caller who wants nothing of it to be left fills the region before.

Letters: B images, H W their size, K scales, L tokens of all scales, n tokens of one grid, h w the last grid, C latent
channels, M coverage.
"""

from dataclasses import dataclass

from torch import Tensor

from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import MaskedArSample, NextScaleSample
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """How much of the region is drawn anew.

    Attributes:
        strength: in (0, 1]. VAR and HMAR: the first round((1 - strength) K) scales are kept in the region too, but
            never all. MAR and Hi-MAR: the share of the region's tokens that are drawn, rounded up.
        keep_scales: VAR and HMAR: the first scales that are kept whole, 0 to K - 1; the larger of both counts.

    Raises:
        ValueError: a value out of range.
    """

    strength: float = 1.0
    keep_scales: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"expected a strength above 0 and up to 1, got {self.strength}")
        if self.keep_scales < 0:
            raise ValueError(f"expected 0 or more scales to keep, got {self.keep_scales}")


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
    raise NotImplementedError


def region_views(
    model: NextScaleTransformer | MaskedTransformer, region: Tensor, edit: EditSettings
) -> list[RegionView]:
    """Show a region as the model will see it, from the coarsest token grid to the finest.

    Args:
        model: VAR, HMAR: a view for each scale. Hi-MAR: pivots, then tokens. MAR: tokens.
        region: [H, W] float in [0, 1], 1 where all is drawn anew.
        edit: which scales are kept.

    Raises:
        ValueError: a region of another shape or range, or more scales to keep than the model has.
    """
    raise NotImplementedError


def edit_images(
    model: NextScaleTransformer | MaskedTransformer,
    tokenizer: MultiScaleVQ | KlAutoencoder,
    images: Tensor,
    region: Tensor,
    condition: Tensor,
    settings: NextScaleSample | MaskedArSample,
    edit: EditSettings,
    noise: PhiloxNoise,
    *,
    precision: str = "auto",
) -> Tensor:
    """Draw a region of pictures anew.

    A full region with strength 1 gives what the sampler draws of the same noise; an empty one what the tokenizer
    makes of the pictures. As in `generate`, a picture comes out the same in any batch: its random numbers are those
    of its index in `noise`, and on a CPU it is encoded and decoded alone.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer, on the same device.
        images: [B, 3, H, W] float32 in [-1, 1], of the size `model_size`; or [1, 3, H, W] for B variations of one
            picture, which is then encoded once.
        region: [H, W] float in [0, 1] for all pictures: 1 is drawn anew, 0 kept. Values between are the weight of
            the new features (VAR, HMAR); a token with any weight is drawn.
        condition: B rows as `Conditions.encode` gives them: classes [B] int64 (VAR, HMAR: `num_classes` is "no
            class"), token ids [B, T] int64 or text embeddings [B, T, W] float32.
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
    raise NotImplementedError
