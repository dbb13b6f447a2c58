"""Feature maps of convolutions in channels-last memory: GroupNorm with SiLU, and sums, by Triton, without gradients.

Both take the bias of the convolution that came before, as `shift`, so that it needs no pass over memory of its own.

Letters: B batch, C channels, H W height and width.
"""

import importlib
from types import ModuleType

import torch
from hmar_kernels.common import unserved
from torch import Tensor


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """SiLU(GroupNorm(x + shift)), or without SiLU; all arithmetic is float32, and the result is rounded once.

    Nothing waits for the device, and the same numbers come out every time, whatever else is in the batch.

    Args:
        x: [B, C, H, W], bfloat16, float16 or float32; copied where it isn't channels-last.
        groups: divides C.
        weight: [C], of any floating dtype, as `bias` and `shift`.
        bias: [C].
        eps: is added to the variance.
        shift: [C], is added to x first.
        silu: whether SiLU follows.

    Returns:
        [B, C, H, W], channels-last, in x's dtype.

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    _check(x, weight, bias, shift)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"expected groups that divide {x.shape[1]} channels, got {groups}")
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().group_norm(_channels_last(x), groups, weight, bias, eps, shift, silu)
    return out


def add_shifted(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """Add x + y + shift in one pass; the sum is in float32 and rounded once.

    Args:
        x: [B, C, H, W], bfloat16, float16 or float32; copied where it isn't channels-last, as is `y`.
        y: as x, of any of these dtypes.
        shift: [C], of any floating dtype.

    Returns:
        [B, C, H, W], channels-last, in x's dtype.

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    _check(x, shift)
    if y.shape != x.shape:
        raise ValueError(f"expected two feature maps of one shape, got {[*x.shape]} and {[*y.shape]}")
    if reason := unserved(y):
        raise ValueError(reason)
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().add_shifted(_channels_last(x), _channels_last(y), shift)
    return out


def _check(x: Tensor, *numbers: Tensor | None) -> None:
    """Check a feature map and numbers for each channel.

    Raises:
        ValueError: what doesn't fit.
    """
    if reason := unserved(x, *numbers):
        raise ValueError(reason)
    if x.ndim != 4 or any(n is not None and n.shape != x.shape[1:2] for n in numbers):
        shapes = ", ".join(str([*n.shape]) for n in numbers if n is not None)
        raise ValueError(f"expected x [B, C, H, W] and numbers [C] beside it, got {[*x.shape]} and {shapes}")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _kernels() -> ModuleType:
    """Triton's, which `unserved` has seen to be there."""
    return importlib.import_module("hmar_kernels.triton_feature_maps")
