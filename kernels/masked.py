"""One call of PyTorch's scaled-dot-product attention with the whole mask: the baseline of HMAR, Fig. 11.

In bfloat16 the mask is a number added to the scores. Of a boolean mask, PyTorch 2.11 and older make -65504 for cuDNN,
which larger scores outweigh. In float16, where cuDNN has no other number, scores must not differ by so much.
"""

import torch
from hmar_kernels.common import normalize, scale_index, table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HIDDEN = -1e38
"""Added to scores that nobody sees; times log2(e) it is still a number."""


@table
def added_mask(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> Tensor:
    """0 where a query sees a key, `HIDDEN` elsewhere, [N, L] bfloat16."""
    sees = dense_mask(lengths, causal, queries, device)
    return torch.zeros(sees.shape, device=device, dtype=torch.bfloat16).masked_fill_(~sees, HIDDEN)


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
    make = added_mask if q.dtype == torch.bfloat16 else dense_mask
    mask = make(lengths, causal, q.shape[1], q.device)
    q, k = normalize(q, k, head_scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2).contiguous(), None  # [B, N, H, D]


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """Runs everywhere."""
    return None
