"""Attention over sequences of scales: block-causal (VAR) and block-diagonal (HMAR)."""

from hmar_kernels.api import IMPLEMENTATIONS, Pattern, choose, scale_attention

__all__ = ["IMPLEMENTATIONS", "Pattern", "choose", "scale_attention"]
