"""One dense call of PyTorch's scaled-dot-product attention per scale: no mask of any size is ever built."""

import torch
from hmar_kernels.common import normalize
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, None]:
    """See `hmar_kernels.reference.attention`; there is no log-sum-exp."""
    q, k = normalize(q, k, head_scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    missing = k.shape[2] - q.shape[2]  # keys before the first query
    outputs, start = [], 0
    for length in lengths:
        stop = start + length
        if start >= missing:
            keys = slice(0 if causal else start, stop)
            queries = q[:, :, start - missing : stop - missing]
            out = scaled_dot_product_attention(queries, k[:, :, keys], v[:, :, keys], scale=softmax_scale)
            outputs.append(out.transpose(1, 2))  # [B, n_k, H, D]
        start = stop
    return torch.cat(outputs, dim=1), None  # [B, N, H, D]


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """Runs everywhere."""
    return None
