"""Feature maps of convolutions in channels-last memory: GroupNorm with SiLU, and sums, by Triton, without gradients.

Both add the bias of the convolution before them, so that it needs no pass over memory of its own.

Letters: B batch, C channels, H W height and width.
"""

import importlib
from collections.abc import Sequence
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
    conv_bias: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """SiLU(GroupNorm(x + conv_bias)), or without SiLU; all arithmetic is float32, and the result is rounded once.

    Nothing waits for the device, and the same numbers come out every time, whatever else is in the batch.

    Args:
        x: [B, C, H, W], bfloat16, float16 or float32, as everything here; copied where it isn't channels-last.
        groups: divides C.
        weight: [C].
        bias: [C].
        eps: is added to the variance.
        conv_bias: [C], of the convolution that made x.
        silu: whether SiLU follows.

    Returns:
        [B, C, H, W], channels-last, in x's dtype.

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    _check([x], weight, bias, conv_bias)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"expected groups that divide {x.shape[1]} channels, got {groups}")
    numbers = [None if n is None else n.contiguous() for n in (weight, bias, conv_bias)]
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().group_norm(_channels_last(x), groups, *numbers, eps, silu)
    return out


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Add x + y + bias in one pass; the sum is in float32 and rounded once.

    Args:
        x: [B, C, H, W], bfloat16, float16 or float32, as everything here; copied where it isn't channels-last.
        y: [B, C, H, W], likewise.
        bias: [C], of the convolutions that made x and y.

    Returns:
        [B, C, H, W], channels-last, in the wider dtype of x and y.

    Raises:
        ValueError: shapes that don't fit, or what `unserved` says.
    """
    _check([x, y], bias)
    with torch.cuda.device_of(x):
        out: Tensor = _kernels().add_biased(_channels_last(x), _channels_last(y), bias.contiguous())
    return out


def _check(maps: Sequence[Tensor], *numbers: Tensor | None) -> None:
    """Check feature maps and numbers for each of their channels.

    Raises:
        ValueError: what doesn't fit.
    """
    if reason := unserved(*maps, *numbers):
        raise ValueError(reason)
    shape, given = maps[0].shape, [n for n in numbers if n is not None]
    if len(shape) != 4 or any(m.shape != shape for m in maps) or any(n.shape != shape[1:2] for n in given):
        shapes = ", ".join(str([*t.shape]) for t in (*maps, *given))
        raise ValueError(f"expected feature maps of one shape [B, C, H, W] and numbers [C], got {shapes}")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _kernels() -> ModuleType:
    """Triton's, which `unserved` has seen to be there."""
    return importlib.import_module("hmar_kernels.triton_feature_maps")
