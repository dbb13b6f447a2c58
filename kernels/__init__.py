"""Attention over scales, block-causal (VAR) and block-diagonal (HMAR); norms and sums of feature maps."""

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
from hmar_kernels.feature_maps import add_shifted, group_norm, unserved

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Pattern",
    "Side",
    "add_shifted",
    "choose",
    "group_norm",
    "measure",
    "scale_attention",
    "unavailable",
    "unserved",
]
