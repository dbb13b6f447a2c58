"""A checkpoint as a painter: it draws in pictures of its own size, of a condition or of none."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.pictures.compositing import Floats
from hmar_cli.pictures.editing import TokenView
from hmar_cli.pictures.picture import Pixels
from hmar_cli.report import to_uint8
from hmar_cli.sampling.editing import EditSettings, edit_images, model_size, region_views
from hmar_cli.sampling.images import Conditions, resolve_precision
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import MaskedArSample, NextScaleSample
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ

STEP = 32
"""Bits of a random number's image index that are the variation's; those above them are the window's."""


@dataclass(frozen=True)
class Unconditional:
    """No class and no text."""

    def encode(self, indices: Sequence[int], device: torch.device) -> None:
        """Nothing."""

    def describe(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _unguided(settings: NextScaleSample | MaskedArSample) -> NextScaleSample | MaskedArSample:
    """Settings without guidance: where there is no condition, it would cost time alone."""
    if isinstance(settings, NextScaleSample):
        return replace(settings, cfg=0.0, refine_cfg=0.0)
    return replace(settings, cfg=1.0, pivot_cfg=1.0)


class ModelPainter:
    """Draws with a model.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer, there too.
        conditions: what the variations are of, or None.
        settings: as for sampling; guidance counts where there are conditions.
        edit: how much is drawn.
        seed: of all random numbers.
        precision: as for sampling.

    Raises:
        UserError: an unknown precision.
    """

    def __init__(
        self,
        model: NextScaleTransformer | MaskedTransformer,
        tokenizer: MultiScaleVQ | KlAutoencoder,
        conditions: Conditions | None,
        settings: NextScaleSample | MaskedArSample,
        edit: EditSettings,
        *,
        seed: int = 0,
        precision: str = "auto",
    ) -> None:
        self.model, self.tokenizer, self.edit = model, tokenizer, edit
        self.conditions = conditions or Unconditional()
        self.settings = settings if conditions else _unguided(settings)
        self.seed, self.precision, self.settled = seed, precision, False
        self.size, self.token = model_size(model, tokenizer), tokenizer.stride
        self.device = next(model.parameters()).device
        resolve_precision(self.device, precision)  # refuses an unknown one before anything is done

    def select_attention(self, together: int) -> str:
        """Settle which implementation of attention runs; a line that says so, empty if there is nothing to settle."""
        if self.settled or not isinstance(self.model, NextScaleTransformer):
            return ""
        self.settled = True
        rows = together * (2 if self.settings.cfg else 1)
        bf16 = resolve_precision(self.device, self.precision) == "bf16"
        dtype = torch.bfloat16 if bf16 else self.model.pos_embed.dtype
        name, reason = self.model.select_attention(rows, dtype, sampling=True)
        return f"attention: {name} ({reason})"

    def paint(self, images: Pixels, region: Floats, variations: Sequence[int], step: int) -> Floats:
        """Draw the region [h, w] of images [B, h, w, 3] anew: [B, h, w, 3], 0 to 255."""
        if (images == images[:1]).all():
            images = images[:1]  # is encoded once
        indices = torch.tensor([(step << STEP) + v for v in variations], device=self.device)
        drawn = edit_images(
            self.model,
            self.tokenizer,
            self._tensor(images),
            torch.from_numpy(region).to(self.device),
            self.conditions.encode(variations, self.device),
            self.settings,
            self.edit,
            PhiloxNoise(self.seed, indices),
            precision=self.precision,
        )
        result: Floats = (
            drawn.float().add(1).mul(127.5).permute(0, 2, 3, 1).cpu().numpy()
        )  # B 3 h w -> B h w 3
        return result

    def reconstruct(self, image: Pixels) -> Pixels:
        """What the tokenizer makes of an image [h, w, 3]."""
        again: Pixels = to_uint8(self.tokenizer.reconstruct(self._tensor(image[None])))[0]
        return again

    def views(self, region: Floats) -> Sequence[TokenView]:
        """The region [h, w] on each token grid, coarse to fine."""
        found = region_views(self.model, torch.from_numpy(region), self.edit)
        return [TokenView(v.name, v.coverage.cpu().numpy(), v.drawn.cpu().numpy()) for v in found]

    def _tensor(self, images: Pixels) -> Tensor:
        """[B, h, w, 3] uint8 as [B, 3, h, w] in [-1, 1]."""
        tensor = torch.from_numpy(np.array(images)).to(self.device)
        return tensor.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
