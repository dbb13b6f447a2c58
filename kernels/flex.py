"""PyTorch's FlexAttention: a block mask that is made once, and one compiled kernel for each shape.

Letters: B batch, L keys, N queries, H heads, D head size.
"""

import functools
import importlib.util
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from hmar_kernels.common import TABLES, constant, normalize, scale_index
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

STATISTICS: dict[str, Any] = (
    {"return_aux": library.AuxRequest(lse=True)} if hasattr(library, "AuxRequest") else {"return_lse": True}
)
"""How the log-sum-exp is asked for, in PyTorch from 2.9 on and before."""


@functools.lru_cache(maxsize=TABLES)
def _made_mask(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False), torch.no_grad():
        scale = scale_index(lengths, device).int()  # [L]
        missing = len(scale) - queries

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own, other = scale[query + missing], scale[key]
            return own >= other if causal else own == other

        return create_block_mask(sees, None, None, queries, len(scale), device=device)


@constant
def block_mask(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> BlockMask:
    """Which blocks of 128 x 128 scores are seen, in part or whole; the queries are the last N tokens."""
    return _made_mask(lengths, causal, queries, device)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Any:
    return flex_attention(q, k, v, block_mask=mask, scale=scale, **STATISTICS)


@functools.cache
def _compiled(shape: tuple[object, ...]) -> Callable[..., Any]:
    """The call, compiled for one shape.

    It is a function of its own, since PyTorch counts recompilations by function and gives up after eight.
    """
    own = FunctionType(_call.__code__.replace(), globals(), f"flex_{abs(hash(shape))}")
    return torch.compile(own, dynamic=False)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `hmar_kernels.reference.attention`."""
    mask = block_mask(lengths, causal, q.shape[1], q.device)
    q, k = normalize(q, k, head_scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    if torch.compiler.is_compiling():
        out, statistics = _call(q, k, v, mask, softmax_scale)
    else:
        shape = (lengths, causal, *q.shape, q.dtype, q.device)
        out, statistics = _compiled(shape)(q, k, v, mask, softmax_scale)
    lse = statistics if isinstance(statistics, Tensor) else statistics.lse
    return out.transpose(1, 2).contiguous(), lse.detach()  # [B, N, H, D], [B, H, N]


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """What FlexAttention lacks."""
    if device.type != "cuda":
        return f"FlexAttention has a backward on CUDA GPUs alone, the tensors are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if head_size < 16:
        return f"it takes head sizes from 16 on, not {head_size}"
    return None
