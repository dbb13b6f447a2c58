"""PyTorch's FlexAttention: a block mask that is made once, and one compiled kernel for each shape.

Letters: B batch, L keys, N queries, H heads, D head size.
"""

import functools
import importlib.util
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from hmar_kernels.common import TABLES, normalize, scale_index, table
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

STATISTICS: dict[str, Any] = (
    {"return_aux": library.AuxRequest(lse=True)} if hasattr(library, "AuxRequest") else {"return_lse": True}
)
"""How the log-sum-exp is asked for, in PyTorch from 2.9 on and before."""


BLOCK = 128
"""Rows and columns of a block."""

PARTS = [
    f"{whole}{side}_{what}"
    for whole in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
]
"""The tensors of a block mask."""


@table
def _scales(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return scale_index(lengths, device).int()  # [L]


def _rule(
    lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device
) -> Callable[..., Tensor]:
    """The mask as a function of places; the queries are the last N tokens."""
    scale, missing = _scales(lengths, device), sum(lengths) - queries

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, other = scale[query + missing], scale[key]
        return own >= other if causal else own == other

    return sees


@functools.lru_cache(maxsize=TABLES)
def _made_mask(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> BlockMask:
    with torch.inference_mode(False), torch.no_grad():
        rule = _rule(lengths, causal, queries, device)
        return create_block_mask(
            rule, None, None, queries, sum(lengths), device=str(device), BLOCK_SIZE=(BLOCK, BLOCK)
        )


@table
def _part(name: str, lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> Tensor:
    found: Tensor = getattr(_made_mask(lengths, causal, queries, device), name)
    return found


def block_mask(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> BlockMask:
    """Which blocks of scores are seen, in part or whole; in a compiled graph, put together from constants."""
    if not torch.compiler.is_compiling():
        return _made_mask(lengths, causal, queries, device)
    parts: dict[str, Any] = {name: _part(name, lengths, causal, queries, device) for name in PARTS}
    rule = _rule(lengths, causal, queries, device)
    return BlockMask(seq_lengths=(queries, sum(lengths)), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=rule, **parts)


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
    mask = block_mask(lengths, causal, operator.index(q.shape[1]), q.device)
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
