"""The meaning of the operation, with its mask written out. Every other implementation is compared with it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], pattern: str, softmax_scale: float
) -> Tensor:
    """See `hmar_kernels.scale_attention`; scores and softmax in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)  # [L]
    query_scale = scale[k.shape[1] - q.shape[1] :]  # [N]
    sees = query_scale[:, None] == scale if pattern == "diagonal" else query_scale[:, None] >= scale  # [N, L]
    scores = torch.einsum("bnhd,blhd->bhnl", q.to(wide), k.to(wide)) * softmax_scale
    weights = scores.masked_fill(~sees, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhnl,blhd->bnhd", weights, v.to(wide)).to(q.dtype)
