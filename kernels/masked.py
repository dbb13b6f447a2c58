"""One call of PyTorch's scaled-dot-product attention with the whole mask: the baseline of HMAR, Fig. 11."""

import torch
from hmar_kernels.common import normalize, scale_index, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@table
def dense_mask(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> Tensor:
    """Whether a query sees a key, [N, L] bool; the queries are the last N tokens."""
    scale = scale_index(lengths, device)  # [L]
    query_scale = scale[len(scale) - queries :, None]  # [N, 1]
    return query_scale >= scale if causal else query_scale == scale


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
    mask = dense_mask(lengths, causal, q.shape[1], q.device)
    q, k = normalize(q, k, head_scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2).contiguous(), None  # [B, N, H, D]


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """Runs everywhere."""
    return None
