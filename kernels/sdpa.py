"""One dense call of PyTorch's scaled-dot-product attention per scale: no mask of any size is ever built."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], pattern: str, softmax_scale: float
) -> Tensor:
    """See `hmar_kernels.scale_attention`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    missing = k.shape[2] - q.shape[2]  # keys before the first query
    outputs, start = [], 0
    for length in lengths:
        stop = start + length
        if start >= missing:
            keys = slice(start if pattern == "diagonal" else 0, stop)
            queries = q[:, :, start - missing : stop - missing]
            outputs.append(
                scaled_dot_product_attention(queries, k[:, :, keys], v[:, :, keys], scale=softmax_scale)
            )
        start = stop
    return torch.cat(outputs, dim=2).transpose(1, 2)  # [B, N, H, D]
