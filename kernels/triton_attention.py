"""Triton: the operation as a custom operator of PyTorch, its launches, and the tables of tile sizes.

Letters: B batch, L keys, N queries, H heads, D head size, T tiles, P numbers of a head with what aligns them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from hmar_kernels.common import to_device
from hmar_kernels.tiles import Schedule, schedule
from hmar_kernels.triton_backward import keys_kernel, queries_kernel
from hmar_kernels.triton_forward import forward_kernel, norms_kernel
from torch import Tensor

LOG2E = math.log2(math.e)
HEAD_SIZES = (32, 64, 96, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGN = 4
"""Bulk copies of float32 numbers begin at multiples of this, 16 bytes; elsewhere they fail."""
NORM_TOKENS, NORM_HEADS = 16, 8
"""Of how many heads of how many tokens one program computes the norms."""


@dataclass(frozen=True)
class Setting:
    """How a kernel cuts its work.

    Attributes:
        rows: rows of a tile.
        block: columns that a step of the inner loop takes.
        warps: of a program.
        stages: of the inner loop's pipeline.
        bulk: read by tensor descriptors (bulk copies) where the layout allows it.
        inline: compute the norms of keys from each block, not in a kernel of its own; in the forward pass alone.
        registers: at most so many for a thread, so that more programs have room on a processor; 0 sets no limit.
    """

    rows: int
    block: int
    warps: int = 4
    stages: int = 2
    bulk: bool = False
    inline: bool = False
    registers: int = 0


class Settings(NamedTuple):
    """The settings of all kernels for one kind of call.

    Attributes:
        forward: of the forward pass, a tile a few queries.
        queries: of the first backward pass, a tile a few queries.
        keys: of the second, a tile a few keys.
    """

    forward: Setting
    queries: Setting
    keys: Setting


SMALL = Setting(64, 64, 4, 2)
"""By pointers, heads up to 64 in half precision: where memory is no matrix of tokens and heads."""
SHALLOW = Setting(64, 32, 4, 2)
"""By pointers, heads of 96 and 128 in half precision. Like those for float32 it is not measured; compiled for sm_90
they spill at most 56 bytes of registers."""


def settings_for(
    lengths: Sequence[int], causal: bool, head_size: int, dtype: torch.dtype, normalized: bool
) -> Settings:
    """The settings for a list of scales.

    Those of heads up to 64 in half precision are the fastest of about 20 for each kernel, measured on one H100 at
    the scales of 256, 512 and 1024 px in both patterns, with PyTorch 2.11, Triton 3.6, bf16, 24 heads of 64, batch 16
    or 4 (docs/results/attention-h100.md). What tells them apart is how many keys a query sees: 162, 679 and 2602 on
    average in the diagonal pattern, 421, 1460 and 6027 in the causal one.
    """
    if dtype == torch.float32:
        if head_size > 64:
            same = Setting(32, 16, 8, 2)
            return Settings(same, same, same)
        same = Setting(32, 32, 4, 2)
        return Settings(same, same, replace(same, warps=8))
    if head_size > 64:
        return Settings(SHALLOW, SHALLOW, replace(SHALLOW, warps=8))
    seen = sum(n * (sum(lengths[: i + 1]) if causal else n) for i, n in enumerate(lengths)) / sum(lengths)
    narrow, square = Setting(64, 32, 4, 3, bulk=True), Setting(64, 64, 4, 3, bulk=True)
    tall = Setting(128, 64, 4, 3, bulk=True)
    if normalized:
        if seen < 300:
            return Settings(replace(square, inline=True), replace(narrow, registers=128), narrow)
        forward = replace(square, registers=128) if seen < 2000 else tall
        return Settings(forward, replace(square, registers=168), narrow if seen < 1000 else square)
    forward = narrow if seen < 1000 else replace(square, stages=4) if seen < 2000 else tall
    keys = replace(narrow, registers=128) if seen < 1000 else replace(square, registers=168)
    return Settings(forward, narrow if seen < 600 else square, keys)


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


def _pitch(length: int) -> int:
    """Numbers from one head to the next in arrays of a number for each of `length` tokens."""
    return -(-length // ALIGN) * ALIGN


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


def _sources(
    blocks: Sequence[tuple[Tensor, int]], setting: Setting
) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """What a kernel reads tensors [B, L, H, D] by, with the strides: pointers, or descriptors of blocks of rows."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    sources: list[Any] = []
    strides = []
    for x, rows in blocks:
        if not setting.bulk:
            sources.append(x)
            strides.append(_strides(x))
            continue
        batch, length, heads, size = x.shape
        shape = [batch * length, heads * size]
        sources.append(TensorDescriptor(x, shape, [x.stride(1), 1], [rows, size]))
        strides.append((length, 1, size))
    return sources, strides


def _numbers(x: Tensor, setting: Setting) -> Any:
    """What a kernel reads blocks of a contiguous array of numbers by: the tensor, or a descriptor."""
    if not setting.bulk:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, [x.numel()], [1], [setting.block])


@cache  # forever: recorded CUDA graphs read it
def _schedule(cut: tuple[Any, ...], device: torch.device) -> Schedule:
    """A schedule on a device."""
    plan = schedule(*cut)
    tiles, bounds = to_device(plan[:2], device)
    return Schedule(tiles, bounds, plan.size)


@dataclass(frozen=True)
class _Call:
    """What all launches of one call share.

    Attributes:
        q: [B, N, H, D], the last dimension contiguous, as in k and v.
        k: [B, L, H, D].
        v: [B, L, H, D].
        lengths: tokens of each scale.
        causal: scales see earlier scales.
        softmax_scale: factor on the scores.
        head_scale: [H], or None where nothing is normalised.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]
    causal: bool
    softmax_scale: float
    head_scale: Tensor | None

    @property
    def samples(self) -> int:
        """Heads of all samples, B H."""
        return self.q.shape[0] * self.q.shape[2]

    def schedule(self, s: Setting, by_keys: bool = False) -> Schedule:
        """The tiles of a kernel."""
        align = ALIGN if s.bulk else 1
        cut = (self.lengths, self.q.shape[1], self.causal, by_keys, s.rows, s.block, align)
        return _schedule(cut, self.q.device)

    def suited(self, setting: Setting, *others: Tensor) -> Setting:
        """The setting, or one that reads by pointers where memory is not laid out for descriptors."""
        numbers = self.samples * max(_pitch(self.q.shape[1]), _pitch(self.k.shape[1]))
        readable = numbers < 2**31 and all(map(_bulk_readable, (self.q, self.k, self.v, *others)))
        if not setting.bulk or readable:
            return setting
        by_pointers = SMALL if self.q.shape[3] <= 64 else SHALLOW
        rows, block = min(setting.rows, by_pointers.rows), min(setting.block, by_pointers.block)
        return replace(setting, bulk=False, rows=rows, block=block, warps=4, stages=2)

    def numbers(self, length: int) -> Tensor:
        """A float32 for each of `length` tokens of all heads, [B, H, P] with P from `_pitch`."""
        shape = self.q.shape[0], self.q.shape[2], _pitch(length)
        return torch.empty(shape, device=self.q.device, dtype=torch.float32)

    def sizes(self, plan: Schedule) -> tuple[Any, ...]:
        """The arguments tiles, bounds, count, heads, queries, keys and scale of every kernel."""
        _, queries, heads, _ = self.q.shape
        return plan.tiles, plan.bounds, plan.size, heads, queries, self.k.shape[1], self.softmax_scale

    def constants(self, setting: Setting) -> dict[str, Any]:
        """The constants of every kernel."""
        size = self.q.shape[3]
        return {
            "D": size, "WIDTH": triton.next_power_of_2(size), "BLOCK": setting.block,
            "NORMALIZE": self.head_scale is not None, "BULK": setting.bulk, "STAGES": setting.stages,
            "num_warps": setting.warps, "maxnreg": setting.registers or None, "enable_fp_fusion": True,
        }  # fmt: skip

    def norms(self, x: Tensor, into: Tensor, factor: float = 1.0, scaled: bool = False) -> Tensor:
        """`factor` / |row| of x [B, L, H, D], times the head scale where `scaled`: to the numbers `into`."""
        batch, length, heads, size = x.shape
        programs = batch * triton.cdiv(length, NORM_TOKENS) * triton.cdiv(heads, NORM_HEADS)
        norms_kernel[(programs,)](
            x, into, self.head_scale, _strides(x), heads, length, factor, D=size,
            WIDTH=triton.next_power_of_2(size), TOKENS=NORM_TOKENS, HEADS=NORM_HEADS, SCALED=scaled,
        )  # fmt: skip
        return into


def _call(
    parts: Sequence[Tensor],
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> _Call:
    q, k, v = map(_contiguous_heads, parts)
    return _Call(
        q, k, v, lengths, causal, softmax_scale, None if head_scale is None else head_scale.contiguous()
    )


def forward(
    parts: Sequence[Tensor],
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
    settings: Settings | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute out [B, N, H, D] and lse [B, H, P] from q, k and v; see `hmar_kernels.scale_attention`.

    P is `_pitch` of N; numbers beyond N are 0.
    """
    call = _call(parts, lengths, causal, softmax_scale, head_scale)
    q, k, v, head_scale = call.q, call.k, call.v, call.head_scale
    queries, size = q.shape[1], q.shape[3]
    s = call.suited(
        (settings or settings_for(lengths, causal, size, q.dtype, head_scale is not None)).forward
    )
    out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
    lse = call.numbers(queries)
    if lse.shape[2] > queries:
        lse[:, :, queries:] = 0
    norms: Any = lse
    if head_scale is not None and not s.inline:
        norms = _numbers(call.norms(k, call.numbers(k.shape[1])), s)
    plan = call.schedule(s)
    sources, strides = _sources([(q, s.rows), (k, s.block), (v, s.block)], s)
    forward_kernel[(plan.size * call.samples,)](
        *sources, out, lse, norms, lse if head_scale is None else head_scale, *strides, *call.sizes(plan),
        M=s.rows, INLINE=s.inline, STEADY=_folds(q.dtype), **call.constants(s),
    )  # fmt: skip
    return out, lse


def _folds(dtype: torch.dtype) -> bool:
    """Whether factors may be folded into weights and gradients of scores: float16 has not the range."""
    return dtype != torch.float16


def _over_queries(
    call: _Call,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    products: Tensor,
    inverses: Tensor,
    s: Setting,
) -> Tensor:
    """Write dq and what the pass over keys needs; return the parts of head_scale's gradient, [B, H, T].

    The norms of keys and then of queries take the same memory, `inverses`.
    """
    s = call.suited(s, dout)
    head_scale, fold = call.head_scale, _folds(call.q.dtype)
    plan = call.schedule(s)
    d_scale = lse
    if head_scale is not None:
        call.norms(call.k, inverses)
        d_scale = lse.new_empty((*lse.shape[:2], plan.size))
    blocks = [(call.q, s.rows), (call.k, s.block), (call.v, s.block), (dout, s.rows)]
    (q, k, v, d), strides = _sources(blocks, s)
    queries_kernel[(plan.size * call.samples,)](
        q, k, v, out, d, dq, lse, products, _numbers(inverses, s), lse if head_scale is None else head_scale,
        d_scale, *strides, _strides(dq), *call.sizes(plan), M=s.rows, FOLD=fold, **call.constants(s),
    )  # fmt: skip
    if head_scale is not None:
        call.norms(call.q, inverses, call.softmax_scale * LOG2E if fold else 1.0, fold)
    return d_scale


def _over_keys(
    call: _Call,
    dout: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    products: Tensor,
    inverses: Tensor,
    s: Setting,
) -> None:
    """Write dk and dv."""
    s = call.suited(s, dout)
    plan = call.schedule(s, by_keys=True)
    blocks = [(call.q, s.block), (call.k, s.rows), (call.v, s.rows), (dout, s.block)]
    sources, strides = _sources(blocks, s)
    keys_kernel[(plan.size * call.samples,)](
        *sources, dk, dv, *(_numbers(x, s) for x in (lse, products, inverses)),
        lse if call.head_scale is None else call.head_scale, *strides, _strides(dk), _strides(dv),
        *call.sizes(plan), J=s.rows, FOLD=_folds(call.q.dtype), **call.constants(s),
    )  # fmt: skip


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
    settings: Settings | None = None,
) -> Tensor:
    """Write the gradients of q, k and v into `gradients`; return that of head_scale, [H], or an empty tensor.

    `lse` is that of `forward`. Beside it, each head takes one row of float32 numbers, or two where normalised.
    """
    call, dout = _call(parts, lengths, causal, softmax_scale, head_scale), _contiguous_heads(dout)
    chosen = settings or settings_for(lengths, causal, call.q.shape[3], call.q.dtype, head_scale is not None)
    products = call.numbers(call.q.shape[1])
    inverses = products if head_scale is None else call.numbers(max(call.q.shape[1], call.k.shape[1]))
    dq, dk, dv = gradients
    d_scale = _over_queries(call, dout, out, lse, dq, products, inverses, chosen.queries)
    _over_keys(call, dout, lse, dk, dv, products, inverses, chosen.keys)
    return lse.new_empty(0) if head_scale is None else d_scale.sum(dim=(0, *range(2, d_scale.ndim)))


SHAPES = {
    "forward": (
        *((64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4)),
        *((128, 64, 4, 4), (128, 64, 8, 3), (64, 128, 4, 2)),
    ),
    "queries": (
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 32, 4, 4),
        (64, 64, 4, 2),
        (128, 64, 8, 3),
        (128, 32, 4, 3),
    ),
    "keys": (
        (64, 64, 4, 2),
        (64, 32, 4, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 2),
    ),
}
"""Rows, block, warps and stages worth measuring for each kernel, likeliest first."""


def candidates(kind: str, head_size: int, normalized: bool) -> list[Setting]:
    """Settings worth measuring for "forward", "queries" or "keys", likeliest first."""
    found = [Setting(*shape, bulk=True) for shape in SHAPES[kind]]
    likely = found[:4]
    if kind == "forward" and normalized:
        found += [replace(s, inline=True) for s in likely]
    found += [replace(s, registers=limit) for limit in (128, 168) for s in likely[: 3 if limit == 168 else 2]]
    found += [SMALL]
    return found if head_size <= 64 else [s for s in found if s.rows <= 64]


def tune(
    lengths: Sequence[int],
    causal: bool,
    *,
    batch: int,
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    normalized: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Measure settings on random numbers and say which is the fastest; nothing is changed.

    Args:
        lengths: tokens of each scale.
        causal: scales see earlier scales.
        batch: B.
        heads: H.
        head_size: D.
        dtype: of the tensors.
        normalized: with a head scale.
        device: a GPU.

    Returns:
        For "forward", "queries" and "keys" a list of settings, each with its median milliseconds, the fastest
        first, those that don't compile left out; "chosen" holds what `settings_for` gives.
    """
    plain = tuple(lengths)
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, sum(plain), 3, heads, head_size)
    qkv = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    scale = torch.full((heads,), 4.0, device=device) if normalized else None
    rest = (plain, causal, 1.0 if normalized else head_size**-0.5, scale)
    chosen = settings_for(plain, causal, head_size, dtype, normalized)
    found: dict[str, Any] = {"chosen": {kind: asdict(s) for kind, s in chosen._asdict().items()}}
    with torch.no_grad(), torch.cuda.device_of(qkv):
        for kind in Settings._fields:
            run = _steps(kind, qkv, rest)
            ranked = [(_milliseconds(run, s), s) for s in candidates(kind, head_size, normalized)]
            ranked = sorted((pair for pair in ranked if pair[0]), key=lambda pair: pair[0])
            found[kind] = [{"ms": ms, **asdict(s)} for ms, s in ranked]
    return found


def _steps(kind: str, qkv: Tensor, rest: tuple[Any, ...]) -> Callable[[Setting], None]:
    """What runs one kind of kernel with a setting; everything that it reads is there."""
    parts = qkv.unbind(2)
    out, lse = forward(parts, *rest)
    call, dout, (dq, dk, dv) = _call(parts, *rest), torch.ones_like(out), torch.empty_like(qkv).unbind(2)
    products, inverses = call.numbers(out.shape[1]), call.numbers(out.shape[1])

    def run(s: Setting) -> None:
        if kind == "forward":
            lengths, causal, softmax_scale, head_scale = rest
            forward(parts, lengths, causal, softmax_scale, head_scale, Settings(s, s, s))
        elif kind == "queries":
            _over_queries(call, dout, out, lse, dq, products, inverses, s)
        else:
            _over_keys(call, dout, lse, dk, dv, products, inverses, s)

    _over_queries(call, dout, out, lse, dq, products, inverses, SMALL)  # what the pass over keys reads
    return run


def _milliseconds(run: Callable[[Setting], None], setting: Setting) -> float:
    """The median time of a kernel, with a cold cache; 0 where it does not compile or has no room on the chip."""
    try:
        ms = triton.testing.do_bench(lambda: run(setting), warmup=10, rep=50, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return 0.0
    return float(ms)


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
    lse = q.new_empty((batch, heads, _pitch(queries)), dtype=torch.float32)
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
    lse = qkv.new_empty((batch, heads, _pitch(length)), dtype=torch.float32)
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
    ctx.set_materialize_grads(False)  # no zeros for its gradient


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
    out, lse = _operator(q, k, v, lengths, causal, softmax_scale, head_scale)
    return out, lse[:, :, : q.shape[1]]


def packed_attention(
    qkv: Tensor, lengths: tuple[int, ...], causal: bool, softmax_scale: float, head_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `hmar_kernels.scale_attention`; qkv [B, L, 3, H, D], whose gradient is one tensor of that shape."""
    out, lse = _packed_operator(qkv, lengths, causal, softmax_scale, head_scale)
    return out, lse[:, :, : qkv.shape[1]]
