"""Attention over scales, block-causal (VAR) and block-diagonal (HMAR); passes between products and convolutions."""

from hmar_kernels.api import (
    IMPLEMENTATIONS,
    Choice,
    Pattern,
    Side,
    choose,
    measure,
    scale_attention,
    unavailable,
)
from hmar_kernels.common import fuses, unserved
from hmar_kernels.feature_maps import add_biased, group_norm
from hmar_kernels.tokens import gated_sum, modulated_norm, unit_heads

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Pattern",
    "Side",
    "add_biased",
    "choose",
    "fuses",
    "gated_sum",
    "group_norm",
    "measure",
    "modulated_norm",
    "scale_attention",
    "unavailable",
    "unit_heads",
    "unserved",
]
