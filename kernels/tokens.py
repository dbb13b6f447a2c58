"""What transformers do to tokens between matrix products, each in one pass by Triton, without gradients.

All arithmetic is float32; results are rounded once. What is given of fewer tokens or samples is broadcast.

Letters: B batch, N tokens, C width, H heads, D head size.
"""

import importlib
from types import ModuleType

import torch
from hmar_kernels.common import TRITON_DTYPES, unserved
from torch import Tensor


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift.

    Args:
        x: [B, N, C], bfloat16, float16 or float32, as everything here.
        scale: broadcast to x's shape.
        shift: broadcast to x's shape.
        eps: is added to the variance.
        dtype: of the result, one of these.

    Returns:
        [B, N, C].

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    scale, shift = _broadcast(x, scale, shift)
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"expected bfloat16, float16 or float32 as the result's dtype, got {dtype}")
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().modulated_norm(x.contiguous(), scale, shift, eps, dtype)
    return out


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """X + gate * y.

    Args:
        x: [B, N, C], bfloat16, float16 or float32, as everything here.
        gate: broadcast to x's shape.
        y: broadcast to x's shape.

    Returns:
        [B, N, C], in the wider dtype of x and y.

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    gate, y = _broadcast(x, gate, y)
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().gated_sum(x.contiguous(), gate, y)
    return out


def unit_heads(x: Tensor, head_scale: Tensor | None = None) -> Tensor:
    """Divide x [B, N, H, D] by its length over D, at least 1e-12, and multiply it by head_scale [H].

    Args:
        x: bfloat16, float16 or float32, of any strides.
        head_scale: of any of these dtypes.

    Returns:
        [B, N, H, D], contiguous, in x's dtype.

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    if reason := unserved(x, head_scale):
        raise ValueError(reason)
    if x.ndim != 4 or (head_scale is not None and head_scale.shape != x.shape[2:3]):
        shape = None if head_scale is None else [*head_scale.shape]
        raise ValueError(f"expected x [B, N, H, D] and a scale [H] or None, got {[*x.shape]} and {shape}")
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().unit_heads(x, None if head_scale is None else head_scale.contiguous())
    return out


def _broadcast(x: Tensor, *others: Tensor) -> list[Tensor]:
    """Views of x's shape whose last dimension is contiguous.

    Raises:
        ValueError: what doesn't fit.
    """
    if reason := unserved(x, *others):
        raise ValueError(reason)
    try:
        views = [each.expand_as(x) for each in others]
    except RuntimeError:
        views = []
    if x.ndim != 3 or not views:
        shapes = ", ".join(str([*each.shape]) for each in others)
        raise ValueError(f"expected x [B, N, C] and what broadcasts to it, got {[*x.shape]} and {shapes}")
    return [view if view.stride(2) == 1 else view.contiguous() for view in views]


def _kernels() -> ModuleType:
    """Triton's, which `unserved` has seen to be there."""
    return importlib.import_module("hmar_kernels.triton_tokens")
