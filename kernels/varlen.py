"""PyTorch's attention over sequences of different lengths: every scale of every image is a sequence.

Letters: B batch, L keys, N queries, H heads, D head size, K scales.
"""

import importlib.util
import inspect
import itertools
import math
import operator
from typing import Any

import torch
from hmar_kernels.common import normalize, table
from torch import Tensor

library: Any = None
if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
    from torch.nn.attention import varlen as library

TAKES_SCALE = library is not None and "scale" in inspect.signature(library.varlen_attn).parameters
"""Whether the scale of the scores can be given; otherwise it is 1 / sqrt(D)."""


@table
def boundaries(lengths: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Where each scale of each image starts in [B N], and the end: [B K + 1] int32."""
    return torch.tensor([0, *itertools.accumulate(lengths * batch)], dtype=torch.int32, device=device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """See `hmar_kernels.reference.attention`; the diagonal pattern alone."""
    batch, queries, heads, head_size = q.shape
    while sum(lengths) > queries:
        lengths = lengths[1:]
    k, v = k[:, k.shape[1] - queries :], v[:, v.shape[1] - queries :]  # [B, N, H, D]
    q, k = normalize(q, k, head_scale)
    scale = {"scale": softmax_scale} if TAKES_SCALE else {}
    if not TAKES_SCALE:
        q = q * (softmax_scale * math.sqrt(head_size))
    starts = boundaries(lengths, operator.index(batch), q.device)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B N, H, D]
    out, lse = library.varlen_attn(
        *(q, k, v, starts, starts, max(lengths), max(lengths)),
        return_aux=library.AuxRequest(lse=True),
        **scale,
    )
    out = out.unflatten(0, (batch, queries)).contiguous()  # [B, N, H, D]
    if lse.shape != (heads, batch * queries):
        return out, None
    return out, lse.detach().unflatten(1, (batch, queries)).transpose(0, 1)  # [B, H, N]


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """What it lacks."""
    if pattern != "diagonal":
        return "it has no mask between sequences, so that tokens see their own scale alone"
    if library is None:
        return f"torch.nn.attention.varlen came with PyTorch 2.10, this is {torch.__version__}"
    if device.type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs a GPU of compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_size % 8 or head_size > 256:
        return f"it takes head sizes that 8 divides, up to 256, not {head_size}"
    return None
