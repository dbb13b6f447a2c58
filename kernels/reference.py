"""The meaning of the operation, with its mask written out. Every other implementation is compared with it.

Letters: B batch, L keys, N queries, H heads, D head size.
"""

import torch
from torch import Tensor

EPS = 1e-12
"""Least length that a query or key is divided by."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `hmar_kernels.scale_attention`; everything is computed in float32, or in float64 for float64 inputs.

    Args:
        q: [B, N, H, D], the last N tokens.
        k: [B, L, H, D].
        v: [B, L, H, D].
        lengths: tokens of each scale, L in all.
        causal: see earlier scales, too.
        softmax_scale: factor on the scores.
        head_scale: [H] or None, see `hmar_kernels.scale_attention`.

    Returns:
        The output [B, N, H, D] in q's dtype, and the log of the sum of exp of the scores [B, H, N].
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if head_scale is not None:
        q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(EPS) for x in (q, k))
        q = q * head_scale.to(wide)[:, None]
    scale = torch.cat([torch.full((n,), i, device=q.device) for i, n in enumerate(lengths)])  # [L]
    query_scale = scale[k.shape[1] - q.shape[1] :]  # [N]
    sees = query_scale[:, None] >= scale if causal else query_scale[:, None] == scale  # [N, L]
    scores = torch.einsum("bnhd,blhd->bhnl", q, k) * softmax_scale
    scores = scores.masked_fill(~sees, float("-inf"))
    out = torch.einsum("bhnl,blhd->bnhd", scores.softmax(dim=-1), v)
    return out.to(dtype).contiguous(), scores.detach().logsumexp(dim=-1)


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """The reference runs everywhere."""
    return None
