"""Triton: the operation as a custom operator of PyTorch, its launches, and the tables of tile sizes.

Letters: B batch, L keys, N queries, H heads, D head size, T tiles, P numbers of a head with what aligns them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from hmar_kernels.common import to_device, triton_unavailable
from hmar_kernels.tiles import Schedule, schedule
from hmar_kernels.triton_backward import keys_kernel, queries_kernel
from hmar_kernels.triton_forward import forward_kernel, norms_kernel
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = math.log2(math.e)
HEAD_SIZES = (32, 64, 96, 128)
ALIGN = 4
"""Bulk copies of float32 numbers begin at multiples of this, 16 bytes; elsewhere they fail."""
POINTERS_ALONE = ("queries",) if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5) else ()
"""Kernels that this Triton cannot compile with descriptors: 3.4 fails at `queries_kernel` for sm_90."""
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

    Those of heads up to 64 in half precision are within 4 % of the fastest `candidates` of each kernel, measured on
    one H100 at the scales of 256, 512 and 1024 px in both patterns, with PyTorch 2.11, Triton 3.6, bf16, 24 heads of
    64, batch 16 or 4 (docs/results/attention-h100.md). What tells them apart is how many keys a query sees: 162, 679
    and 2602 on average in the diagonal pattern, 421, 1460 and 6027 in the causal one.
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
            forward = replace(square, inline=True, registers=128)
            return Settings(forward, replace(narrow, registers=128), narrow)
        forward = replace(square, registers=128) if seen < 4000 else tall
        return Settings(forward, replace(square, registers=168), narrow if seen < 1000 else square)
    forward = narrow if seen < 1000 else replace(square, stages=4) if seen < 2000 else tall
    keys = replace(narrow, registers=128) if seen < 1000 else replace(square, registers=168)
    return Settings(forward, narrow if seen < 600 else square, keys)


def unavailable(*, device: torch.device, dtype: torch.dtype, head_size: int, pattern: str) -> str | None:
    """Why this implementation can't serve such tensors, in one line; None where it can."""
    if reason := triton_unavailable(device, dtype):
        return reason
    if head_size not in HEAD_SIZES:
        return f"Triton's kernels serve heads of {', '.join(map(str, HEAD_SIZES))}, not {head_size}"
    return None


def _pitch(length: int) -> int:
    """Numbers from one head to the next in arrays of a number for each of `length` tokens."""
    return -(-length // ALIGN) * ALIGN


def _contiguous_heads(x: Tensor) -> Tensor:
    """X [B, L, H, D] itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


@cache  # forever: recorded CUDA graphs read it
def _schedule(cut: tuple[Any, ...], device: torch.device) -> Schedule:
    """A schedule on a device."""
    plan = schedule(*cut)
    tiles, bounds = to_device(plan[:2], device)
    return Schedule(tiles, bounds, plan.size)


class _Descriptor(TensorDescriptor):  # type: ignore[misc]
    """A descriptor of what `_Layout.readable` has checked."""

    def __post_init__(self) -> None:
        """Check nothing: it would take as long as a launch."""


class _Layout(NamedTuple):
    """How [B, L, H, D] lies in memory; `aligned`: its address is a multiple of 16 bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool

    def readable(self, dtype: torch.dtype) -> bool:
        """Whether it is a matrix of B L rows with the heads side by side, which a descriptor can address."""
        (batch, length, heads, size), (sample, token, head, _) = self.shape, self.strides
        fits = (heads == 1 or head == size) and (batch == 1 or sample == length * token)
        aligned = self.aligned and token * dtype.itemsize % 16 == 0
        return fits and aligned and size & (size - 1) == 0 and batch * length < 2**31

    def descriptor(self, rows: int) -> tuple[list[int], list[int], list[int]]:
        """Shape, strides and block of its descriptor."""
        batch, length, heads, size = self.shape
        return [batch * length, heads * size], [self.strides[1], 1], [rows, size]


class _Launch(NamedTuple):
    """All that a launch of a kernel takes beside tensors.

    Attributes:
        kernel: the kernel with its grid.
        descriptors: shape, strides and block of each, those of tensors and then of numbers; none where by pointers.
        rest: the arguments from q_strides on.
        constants: the kernel's constants.
        tiles: T.
        inline: see `Setting`.
    """

    kernel: Any
    descriptors: tuple[Any, ...]
    rest: tuple[Any, ...]
    constants: dict[str, Any]
    tiles: int
    inline: bool

    def __call__(self, blocks: Sequence[Tensor | None], *others: Any) -> None:
        """Launch it on what it reads block by block, tensors and then numbers, and on the arguments behind those."""
        if self.descriptors:
            pairs = zip(blocks, self.descriptors, strict=True)
            blocks = [x if x is None else _Descriptor(x, *how) for x, how in pairs]
        self.kernel(*blocks, *others, *self.rest, **self.constants)


@cache
def _launch(
    kind: str,
    setting: Setting | None,
    layouts: tuple[_Layout, ...],
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    normalized: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> _Launch:
    """The launch of the kernel of a kind, a field of `Settings`: found by all that it depends on, made once.

    The layouts are those of q, k, v and, in the backward pass, of the output's gradient.
    """
    (batch, queries, heads, size), keys = layouts[0].shape, layouts[1].shape[1]
    s = setting or getattr(settings_for(lengths, causal, size, dtype, normalized), kind)
    small = batch * heads * max(_pitch(queries), _pitch(keys)) < 2**31
    if s.bulk and not (kind not in POINTERS_ALONE and small and all(x.readable(dtype) for x in layouts)):
        by_pointers = SMALL if size <= 64 else SHALLOW
        rows, block = min(s.rows, by_pointers.rows), min(s.block, by_pointers.block)
        s = replace(s, bulk=False, rows=rows, block=block, warps=4, stages=2, registers=0)
    by_keys = kind == "keys"
    cut = (lengths, queries, causal, by_keys, s.rows, s.block, ALIGN if s.bulk else 1)
    tiles, bounds, count = _schedule(cut, device)
    descriptors: tuple[Any, ...] = ()
    strides: tuple[Any, ...] = tuple(x.strides[:3] for x in layouts)
    if s.bulk:
        cuts = (s.block, s.rows, s.rows, s.block) if by_keys else (s.rows, s.block, s.block, s.rows)
        numbers = [batch * heads * _pitch(queries if by_keys else keys)], [1], [s.block]
        descriptors = (
            *(x.descriptor(rows) for x, rows in zip(layouts, cuts, strict=False)),
            *[numbers] * (3 if by_keys else 1),
        )
        strides = (None,) * len(layouts)
    fold = _folds(dtype)
    kernel, own = {
        "forward": (forward_kernel, {"M": s.rows, "INLINE": s.inline, "STEADY": fold}),
        "queries": (queries_kernel, {"M": s.rows, "FOLD": fold}),
        "keys": (keys_kernel, {"J": s.rows, "FOLD": fold}),
    }[kind]
    constants = {
        "D": size, "WIDTH": triton.next_power_of_2(size), "BLOCK": s.block, "NORMALIZE": normalized, "BULK": s.bulk,
        "STAGES": s.stages, "num_warps": s.warps, "maxnreg": s.registers or None, "enable_fp_fusion": True,
    }  # fmt: skip
    rest = (*strides, tiles, bounds, count, heads, queries, keys, softmax_scale)
    grid = (count * batch * heads,)
    return _Launch(kernel[grid], descriptors, rest, own | constants, count, s.inline)


def _folds(dtype: torch.dtype) -> bool:
    """Whether factors may be folded into weights and gradients of scores: float16 has not the range."""
    return dtype != torch.float16


class _Call:
    """The tensors of a call, heads contiguous, and what its launches depend on.

    Attributes:
        tensors: q [B, N, H, D], k [B, L, H, D], v [B, L, H, D], and in the backward pass the output's gradient.
        softmax_scale: factor on the scores.
        head_scale: [H], or None where nothing is normalised.
        key: the last arguments of `_launch`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        lengths: tuple[int, ...],
        causal: bool,
        softmax_scale: float,
        head_scale: Tensor | None,
    ) -> None:
        self.tensors = [_contiguous_heads(x) for x in tensors]
        self.head_scale = None if head_scale is None else head_scale.contiguous()
        layouts = tuple(_Layout(x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in self.tensors)
        q, self.softmax_scale = self.tensors[0], softmax_scale
        self.key = layouts, lengths, causal, softmax_scale, head_scale is not None, q.dtype, q.device

    def launch(self, kind: str, setting: Setting | None) -> _Launch:
        """That of a kernel, with the setting or its own."""
        return _launch(kind, setting, *self.key)

    def numbers(self, length: int) -> Tensor:
        """A float32 for each of `length` tokens of all heads, [B, H, P] with P from `_pitch`."""
        batch, _, heads, _ = self.tensors[0].shape
        return self.tensors[0].new_empty((batch, heads, _pitch(length)), dtype=torch.float32)

    def norms(self, x: Tensor, into: Tensor, factor: float = 1.0, scaled: bool = False) -> Tensor:
        """`factor` / |row| of x [B, L, H, D], times the head scale where `scaled`: to the numbers `into`."""
        batch, length, heads, size = x.shape
        programs = batch * -(-length // NORM_TOKENS) * -(-heads // NORM_HEADS)
        norms_kernel[(programs,)](
            x, into, self.head_scale, x.stride()[:3], heads, length, factor, D=size,
            WIDTH=triton.next_power_of_2(size), TOKENS=NORM_TOKENS, HEADS=NORM_HEADS, SCALED=scaled,
        )  # fmt: skip
        return into


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
    call = _Call(parts, lengths, causal, softmax_scale, head_scale)
    launch, (q, k, v) = call.launch("forward", settings and settings.forward), call.tensors
    out, lse = q.new_empty(q.shape), call.numbers(q.shape[1])
    norms = None
    if head_scale is not None and not launch.inline:
        norms = call.norms(k, call.numbers(k.shape[1]))
    launch([q, k, v, norms], out, lse, call.head_scale)
    return out, lse


def _over_queries(
    call: _Call,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    products: Tensor,
    inverses: Tensor | None,
    setting: Setting | None = None,
) -> Tensor | None:
    """Write dq and what the pass over keys needs; return the parts of head_scale's gradient, [B, H, T].

    The norms of keys and then of queries take the same memory, `inverses`.
    """
    launch, (q, k, *_) = call.launch("queries", setting), call.tensors
    d_scale = None
    if inverses is not None:
        call.norms(k, inverses)
        d_scale = lse.new_empty((*lse.shape[:2], launch.tiles))
    given = out, dq, lse, products, call.head_scale, d_scale, dq.stride()[:3]
    launch([*call.tensors, inverses], *given)
    if inverses is not None:
        fold = _folds(q.dtype)
        call.norms(q, inverses, call.softmax_scale * LOG2E if fold else 1.0, fold)
    return d_scale


def _over_keys(
    call: _Call,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    products: Tensor,
    inverses: Tensor | None,
    setting: Setting | None = None,
) -> None:
    """Write dk and dv."""
    blocks = [*call.tensors, lse, products, inverses]
    call.launch("keys", setting)(blocks, dk, dv, call.head_scale, dk.stride()[:3], dv.stride()[:3])


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
) -> Tensor | None:
    """Write the gradients of q, k and v into `gradients`; return that of head_scale, [H].

    `lse` is that of `forward`. Beside it, each head takes one row of float32 numbers, or two where normalised.
    """
    call = _Call((*parts, dout), lengths, causal, softmax_scale, head_scale)
    (_, queries, *_), keys = out.shape, parts[1].shape[1]
    (dq, dk, dv), products = gradients, call.numbers(queries)
    inverses = None if head_scale is None else call.numbers(max(queries, keys))
    d_scale = _over_queries(call, out, lse, dq, products, inverses, settings and settings.queries)
    _over_keys(call, lse, dk, dv, products, inverses, settings and settings.keys)
    return None if d_scale is None else d_scale.sum(dim=(0, 2))


SHAPES = {
    "forward": ((64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4),
                (128, 64, 4, 4), (128, 64, 8, 3), (64, 128, 4, 2)),
    "queries": ((64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 4, 4), (64, 64, 4, 2), (128, 64, 8, 3), (128, 32, 4, 3)),
    "keys": ((64, 64, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
}  # fmt: skip
"""Rows, block, warps and stages worth measuring for each kernel, likeliest first."""


def candidates(kind: str, head_size: int, normalized: bool) -> list[Setting]:
    """Settings worth measuring for "forward", "queries" or "keys", likeliest first."""
    found = [Setting(*shape, bulk=True) for shape in SHAPES[kind]]
    likely = found[:4]
    if kind == "forward" and normalized:
        inline = [replace(s, inline=True) for s in likely]
        found += [*inline, *(replace(s, registers=128) for s in inline[:2])]
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


def _steps(
    kind: str, qkv: Tensor, rest: tuple[tuple[int, ...], bool, float, Tensor | None]
) -> Callable[[Setting], Any]:
    """What runs one kind of kernel with a setting; everything that it reads is there."""
    parts, (dq, dk, dv) = qkv.unbind(2), torch.empty_like(qkv).unbind(2)
    out, lse = forward(parts, *rest)
    call = _Call((*parts, torch.ones_like(out)), *rest)
    products = call.numbers(out.shape[1])
    inverses = None if rest[-1] is None else call.numbers(out.shape[1])
    _over_queries(call, out, lse, dq, products, inverses, SMALL)  # what the pass over keys reads
    run: dict[str, Callable[[Setting], Any]] = {
        "forward": lambda s: forward(parts, *rest, Settings(s, s, s)),
        "queries": lambda s: _over_queries(call, out, lse, dq, products, inverses, s),
        "keys": lambda s: _over_keys(call, lse, dk, dv, products, inverses, s),
    }
    return run[kind]


def _milliseconds(run: Callable[[Setting], None], setting: Setting) -> float:
    """The median time of a kernel, with a cold cache; 0 where it does not compile or has no room on the chip."""
    try:
        ms = triton.testing.do_bench(lambda: run(setting), warmup=10, rep=50, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return 0.0
    return float(ms)


def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute out and lse; without k and v, q holds all three, [B, L, 3, H, D]."""
    parts: Any = q.unbind(2) if k is None else (q, k, v)
    with torch.cuda.device_of(q):
        return forward(parts, tuple(lengths), causal, softmax_scale, head_scale)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> list[Tensor]:
    """Compute the gradients of all tensors that were given."""
    gradients = [x.new_empty(x.shape) for x in (q, k, v) if x is not None]
    parts: Any = (q, k, v)
    into: Sequence[Tensor] = gradients
    if k is None:
        parts, into = q.unbind(2), gradients[0].unbind(2)
    with torch.cuda.device_of(q):
        d_scale = backward(dout, parts, out, lse, into, tuple(lengths), causal, softmax_scale, head_scale)
    return gradients if d_scale is None else [*gradients, d_scale]


_operator = torch.library.custom_op("hmar::scale_attention", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("hmar::scale_attention_backward", _backward, mutates_args=())


@_operator.register_fake
def _shapes(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, size = *q.shape[:2], *q.shape[-2:]
    lse = q.new_empty((batch, heads, _pitch(queries)), dtype=torch.float32)
    return q.new_empty((batch, queries, heads, size)), lse


@_backward_operator.register_fake
def _backward_shapes(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
) -> list[Tensor]:
    head_scale = rest[-1]
    gradients = [x.new_empty(x.shape) for x in (q, k, v) if x is not None]
    return gradients if head_scale is None else [*gradients, lse.new_empty(head_scale.shape)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the tensors of a call, the last of them head_scale or None, and its plain arguments."""
    *tensors, ctx.lengths, ctx.causal, ctx.softmax_scale, head_scale = inputs
    ctx.save_for_backward(*tensors, *output, head_scale)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for its gradient


def _differentiate(
    run: Callable[..., list[Tensor]], ctx: Any, dout: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, head_scale = ctx.saved_tensors
    found = run(dout, *tensors, ctx.lengths, ctx.causal, ctx.softmax_scale, head_scale)
    gradients = found if head_scale is None else found[:-1]
    absent = (None,) * (3 - len(gradients))
    return (*gradients, *absent, None, None, None, None if head_scale is None else found[-1])


_operator.register_autograd(partial(_differentiate, _backward_operator), setup_context=_save)


class _ScaleAttention(torch.autograd.Function):
    """The operator without the dispatcher, which would take the host as long as the launches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """See `_forward`."""
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, of_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `_backward`."""
        return _differentiate(_backward, ctx, dout, of_lse)


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `hmar_kernels.scale_attention`; q [B, N, H, D], k and v [B, L, H, D].

    Or q [B, L, 3, H, D] alone, whose gradient is one tensor of that shape. The log-sum-exp has zeros beyond N.
    """
    plain = type(q) is Tensor and not torch.compiler.is_compiling()
    run: Any = _ScaleAttention.apply if plain else _operator
    return run(q, k, v, lengths, causal, softmax_scale, head_scale)  # type: ignore[no-any-return]
