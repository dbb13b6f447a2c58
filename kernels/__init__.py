"""Attention over sequences of scales: block-causal (VAR) and block-diagonal (HMAR)."""

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

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Pattern",
    "Side",
    "choose",
    "measure",
    "scale_attention",
    "unavailable",
]
