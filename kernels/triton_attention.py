"""Triton: the operation as a custom operator of PyTorch, its launches, and the tables of tile sizes.

Letters: B batch, L keys, N queries, H heads, D head size, T tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from hmar_kernels.tiles import schedule
from hmar_kernels.triton_backward import keys_kernel, queries_kernel
from hmar_kernels.triton_forward import forward_kernel, norms_kernel
from torch import Tensor

HEAD_SIZES = (32, 64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORM_ROWS = 128
"""Keys whose norms one program computes."""


@dataclass(frozen=True)
class Setting:
    """How a kernel cuts its work.

    Attributes:
        rows: rows of a tile.
        block: columns that a step of the inner loop takes.
        warps: of a program.
        stages: of the inner loop's pipeline.
        bulk: read blocks by tensor descriptors (bulk copies) where the layout allows it.
        peel: give columns that all rows see a loop of their own, without a mask.
        inline: compute the norms of keys from each block, not in a kernel of its own.
        specialize: let warps specialise (Triton's automatic scheme).
    """

    rows: int
    block: int
    warps: int = 4
    stages: int = 2
    bulk: bool = False
    peel: bool = True
    inline: bool = False
    specialize: bool = False


def setting_for(
    kernel: str, lengths: Sequence[int], causal: bool, head_size: int, dtype: torch.dtype
) -> Setting:
    """The setting of a kernel: "forward", "queries" or "keys"."""
    if dtype == torch.float32:
        return Setting(32, 32, 4, 2, inline=True)
    if head_size > 64:
        return Setting(64, 64, 4, 2)
    small = max(lengths) <= 256 and not causal
    if kernel == "forward":
        return Setting(64, 64, 4, 3, inline=small) if small else Setting(128, 64, 4, 3)
    if kernel == "queries":
        return Setting(64, 64, 4, 2, inline=small)
    return Setting(64, 64, 4, 2)


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """Why this implementation can't serve such tensors, in one line; None where it can."""
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton's kernels need a GPU, the tensors are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need a GPU of compute capability 8.0 or newer"
    if dtype not in DTYPES:
        return f"Triton's kernels serve bfloat16, float16 and float32, not {dtype}"
    if head_size not in HEAD_SIZES:
        return f"Triton's kernels serve heads of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    return None


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Between samples, tokens and heads of [B, L, H, D]."""
    return x.stride(0), x.stride(1), x.stride(2)


def _contiguous_heads(x: Tensor) -> Tensor:
    """X [B, L, H, D] itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _bulk_readable(x: Tensor) -> bool:
    """Whether [B, L, H, D] is a matrix of B L rows with the heads side by side, which a descriptor can address."""
    batch, length, heads, size = x.shape
    fits = (heads == 1 or x.stride(2) == size) and (batch == 1 or x.stride(0) == length * x.stride(1))
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return fits and aligned and size & (size - 1) == 0 and batch * length < 2**31


def _source(x: Tensor, block: int, bulk: bool) -> tuple[Any, tuple[int, int, int]]:
    """What a kernel reads [B, L, H, D] by, with the strides: the tensor, or a descriptor of blocks of its rows."""
    if not bulk:
        return x, _strides(x)
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, length, heads, size = x.shape
    shape, strides = [batch * length, heads * size], [x.stride(1), 1]
    return TensorDescriptor(x, shape, strides, [block, size]), (length, 1, size)


def _norms(k: Tensor) -> Tensor:
    """1 / |key|, [B, H, L] float32."""
    batch, length, heads, size = k.shape
    norms = torch.empty(batch, heads, length, device=k.device, dtype=torch.float32)
    grid = (triton.cdiv(length, NORM_ROWS), batch * heads)
    norms_kernel[grid](
        k, norms, _strides(k), heads, length, D=size, WIDTH=triton.next_power_of_2(size), BLOCK=NORM_ROWS
    )
    return norms


def forward(
    parts: Sequence[Tensor],
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
    setting: Setting | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute out [B, N, H, D] and lse [B, H, N] from q, k and v; see `hmar_kernels.scale_attention`."""
    q, k, v = map(_contiguous_heads, parts)
    batch, queries, heads, size = q.shape
    keys, normalize = k.shape[1], head_scale is not None
    if not normalize and softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale  # the kernel's maximum is that of the scaled scores
    s = setting or setting_for("forward", lengths, causal, size, q.dtype)
    bulk = s.bulk and all(map(_bulk_readable, (q, k, v)))
    out = torch.empty(batch, queries, heads, size, device=q.device, dtype=q.dtype)
    lse = torch.empty(batch, heads, queries, device=q.device, dtype=torch.float32)
    plan = schedule(lengths, queries, causal, False, s.rows, s.block, q.device)
    norms = _norms(k) if normalize and not s.inline else lse
    (q_in, q_strides), *others = (_source(x, n, bulk) for x, n in ((q, s.rows), (k, s.block), (v, s.block)))
    (k_in, k_strides), (v_in, v_strides) = others
    half = q.dtype == torch.float16
    forward_kernel[(plan.size * batch * heads,)](
        q_in, k_in, v_in, out, lse, norms, lse if head_scale is None else head_scale.contiguous(),
        q_strides, k_strides, v_strides, plan.tiles, plan.bounds, plan.size, heads, queries, keys, softmax_scale,
        D=size, WIDTH=triton.next_power_of_2(size), M=s.rows, BLOCK=s.block, NORMALIZE=normalize,
        INLINE=s.inline, BULK=bulk, PEEL=s.peel, STAGES=s.stages, SPECIALIZE=s.specialize,
        LIMIT=13.5 if half else 60.0, LIFT=14.0 if half else 0.0, num_warps=s.warps,
    )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    parts: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: Sequence[Tensor],
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
    settings: tuple[Setting, Setting] | None = None,
) -> Tensor:
    """Write the gradients of q, k and v into `gradients`; return that of head_scale, [H], or an empty tensor."""
    q, k, v, dout = map(_contiguous_heads, (*parts, dout))
    batch, queries, heads, size = q.shape
    keys, normalize = k.shape[1], head_scale is not None
    names = ("queries", "keys")
    s, t = settings or (setting_for(name, lengths, causal, size, q.dtype) for name in names)
    dq, dk, dv = gradients
    delta = torch.empty_like(lse)
    inverses = torch.empty_like(lse) if normalize else lse
    norms = _norms(k) if normalize and not s.inline else lse
    plan = schedule(lengths, queries, causal, False, s.rows, s.block, q.device)
    count = plan.size * batch * heads
    d_scale = torch.empty(batch, heads, plan.size, device=q.device, dtype=torch.float32) if normalize else lse
    scales = lse if head_scale is None else head_scale.contiguous()
    shared = {
        "D": size, "WIDTH": triton.next_power_of_2(size), "NORMALIZE": normalize, "FOLD": q.dtype != torch.float16
    }  # fmt: skip
    bulk = s.bulk and all(map(_bulk_readable, (q, k, v, dout)))
    inputs = [_source(x, n, bulk) for x, n in ((q, s.rows), (k, s.block), (v, s.block), (dout, s.rows))]
    (q_in, q_strides), (k_in, k_strides), (v_in, v_strides), (dout_in, dout_strides) = inputs
    queries_kernel[(count,)](
        q_in, k_in, v_in, out, dout_in, dq, lse, delta, inverses, norms, scales, d_scale, q_strides, k_strides,
        v_strides, _strides(out), dout_strides, _strides(dq), plan.tiles, plan.bounds, plan.size, heads, queries,
        keys, softmax_scale, M=s.rows, BLOCK=s.block, INLINE=s.inline, BULK=bulk, PEEL=s.peel, STAGES=s.stages,
        SPECIALIZE=s.specialize, num_warps=s.warps, **shared,
    )  # fmt: skip
    plan = schedule(lengths, queries, causal, True, t.rows, t.block, q.device)
    bulk = t.bulk and all(map(_bulk_readable, (q, k, v, dout)))
    inputs = [_source(x, n, bulk) for x, n in ((q, t.block), (k, t.rows), (v, t.rows), (dout, t.block))]
    (q_in, q_strides), (k_in, k_strides), (v_in, v_strides), (dout_in, dout_strides) = inputs
    keys_kernel[(plan.size * batch * heads,)](
        q_in, k_in, v_in, dout_in, dk, dv, lse, delta, inverses, scales, q_strides, k_strides, v_strides,
        dout_strides, _strides(dk), _strides(dv), plan.tiles, plan.bounds, plan.size, heads, queries, keys,
        softmax_scale, J=t.rows, BLOCK=t.block, BULK=bulk, PEEL=t.peel, STAGES=t.stages, SPECIALIZE=t.specialize,
        num_warps=t.warps, **shared,
    )  # fmt: skip
    return d_scale.sum(dim=(0, 2)) if normalize else lse.new_empty(0)


@torch.library.custom_op("hmar::scale_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return forward((q, k, v), tuple(lengths), causal, softmax_scale, head_scale)


@_operator.register_fake
def _shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, size = q.shape
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    return q.new_empty((batch, queries, heads, size)), lse


@torch.library.custom_op("hmar::scale_attention_backward", mutates_args=())
def _backward_operator(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    with torch.cuda.device_of(q):
        d_scale = backward(
            dout, (q, k, v), out, lse, gradients, tuple(lengths), causal, softmax_scale, head_scale
        )
    dq, dk, dv = gradients
    return dq, dk, dv, d_scale


@_backward_operator.register_fake
def _backward_shapes(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_scale = lse.new_empty(0 if head_scale is None else q.shape[2])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_scale


@torch.library.custom_op("hmar::packed_scale_attention", mutates_args=())
def _packed_operator(
    qkv: Tensor, lengths: Sequence[int], causal: bool, softmax_scale: float, head_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(qkv):
        return forward(qkv.unbind(2), tuple(lengths), causal, softmax_scale, head_scale)


@_packed_operator.register_fake
def _packed_shapes(
    qkv: Tensor, lengths: Sequence[int], causal: bool, softmax_scale: float, head_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, size = qkv.shape
    lse = qkv.new_empty((batch, heads, length), dtype=torch.float32)
    return qkv.new_empty((batch, length, heads, size)), lse


@torch.library.custom_op("hmar::packed_scale_attention_backward", mutates_args=())
def _packed_backward_operator(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gradient = qkv.new_empty(qkv.shape)
    parts, gradients = qkv.unbind(2), gradient.unbind(2)
    with torch.cuda.device_of(qkv):
        d_scale = backward(
            dout, parts, out, lse, gradients, tuple(lengths), causal, softmax_scale, head_scale
        )
    return gradient, d_scale


@_packed_backward_operator.register_fake
def _packed_backward_shapes(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), lse.new_empty(0 if head_scale is None else qkv.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the tensors of a call, the last of them head_scale or None, and its plain arguments."""
    *tensors, ctx.lengths, ctx.causal, ctx.softmax_scale, head_scale = inputs
    ctx.save_for_backward(*tensors, *output, head_scale)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, head_scale = ctx.saved_tensors
    run = _packed_backward_operator if len(tensors) == 3 else _backward_operator
    *gradients, d_scale = run(dout, *tensors, ctx.lengths, ctx.causal, ctx.softmax_scale, head_scale)
    return (*gradients, None, None, None, None if head_scale is None else d_scale)


_operator.register_autograd(_differentiate, setup_context=_save)
_packed_operator.register_autograd(_differentiate, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `hmar_kernels.scale_attention`; q [B, N, H, D], k and v [B, L, H, D]."""
    out: tuple[Tensor, Tensor] = _operator(q, k, v, lengths, causal, softmax_scale, head_scale)
    return out


def packed_attention(
    qkv: Tensor, lengths: tuple[int, ...], causal: bool, softmax_scale: float, head_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `hmar_kernels.scale_attention`; qkv [B, L, 3, H, D], whose gradient is one tensor of that shape."""
    out: tuple[Tensor, Tensor] = _packed_operator(qkv, lengths, causal, softmax_scale, head_scale)
    return out
