"""Pictures that a training run shows now and then: reconstructions of a tokenizer, samples of a model.

What draws them raises FloatingPointError where they are not finite.
"""

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hmar_cli.builders import Tokenizer
from hmar_cli.data.cache import Cache
from hmar_cli.data.images import ImageSource
from hmar_cli.data.transforms import image_transform, to_tensor
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.report import image_grid, to_uint8
from hmar_cli.sampling.images import autocast, require_finite
from hmar_cli.sampling.masked import sample_masked
from hmar_cli.sampling.next_scale import sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import MaskedArSample, NextScaleSample, Recipe
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ
from hmar_cli.training.trainer import Preview

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = 16
HEAD_STEPS = 12
"""Steps of DPM-Solver++ that previews give a diffusion head; the recipe's own may take minutes on a CPU."""


def reconstruction_preview(recipe: Recipe, source: ImageSource) -> Preview:
    """Rows of images above their reconstructions, the first that can be used."""

    def draw(model: nn.Module) -> "Image":
        assert isinstance(model, MultiScaleVQ | KlAutoencoder)
        cut = image_transform(recipe.data.size, recipe.data.crop, train=False)
        usable = (cut(example.image) for example in source.read(0, len(source)) if example.image is not None)
        pixels = list(islice(usable, IMAGES))
        device = next(model.parameters()).device
        images = to_tensor(np.stack(pixels)).to(device)
        again = require_finite(model.reconstruct(images))
        tiles, columns = [], 8
        for i in range(0, len(images), columns):
            tiles += [*to_uint8(images[i : i + columns]), *to_uint8(again[i : i + columns])]
        return image_grid(tiles, columns=min(columns, len(images)))

    return draw


def sample_preview(recipe: Recipe, tokenizer: Tokenizer, cache: Cache) -> Preview:
    """Samples of the first classes, or of the first captions, the same random numbers every time."""

    def draw(model: nn.Module) -> "Image":
        device = next(model.parameters()).device
        noise = PhiloxNoise(0, torch.arange(IMAGES, device=device))
        decoder = tokenizer.to(device).eval()
        if isinstance(model, NextScaleTransformer):
            assert isinstance(decoder, MultiScaleVQ) and isinstance(recipe.sample, NextScaleSample)
            columns = min(model.num_classes, 8)
            chosen = recipe.sample if model.masked is not None else replace(recipe.sample, schedule=())
            labels = torch.arange(IMAGES, device=device) % columns
            with autocast(device, recipe.train.precision):  # in which attention was chosen
                _, features = sample_next_scale(model, decoder.quantizer, labels, chosen, noise)
            return image_grid(require_finite(decoder.decode(features)), columns=columns)
        assert isinstance(model, MaskedTransformer) and isinstance(decoder, KlAutoencoder)
        assert isinstance(recipe.sample, MaskedArSample)
        settings = replace(
            recipe.sample,
            head_sampler="dpm++",
            head_steps=HEAD_STEPS,
            pivot_head_steps=HEAD_STEPS,
            temperature=1.0,
        )
        condition, columns = _conditions(model, cache)
        sampled = sample_masked(model, condition.to(device), settings, noise)
        return image_grid(require_finite(decoder.decode_latents(sampled.latents)), columns=columns)

    return draw


def _conditions(model: MaskedTransformer, cache: Cache) -> tuple[Tensor, int]:
    """The first classes or captions, and how many differ (at most 8)."""
    if model.class_embed is not None:
        columns = min(model.num_classes, 8)
        return torch.arange(IMAGES) % columns, columns
    rows = np.arange(IMAGES) % min(len(cache), 8)
    text = torch.from_numpy(cache.fetch("text", rows, np.zeros_like(rows)))
    return text.float() if text.is_floating_point() else text.long(), min(len(cache), 8)
