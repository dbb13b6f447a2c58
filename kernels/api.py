"""The public operation: checks its arguments and calls the implementation that was named or chosen.

Letters: B batch, L keys, N queries, H heads, D head size, n_k tokens of scale k.
"""

import functools
import importlib
import operator
import statistics
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch
from hmar_kernels import flex, masked, reference, sdpa, varlen
from hmar_kernels.common import constant
from torch import Tensor

Pattern = Literal["causal", "diagonal"]
Side = int | tuple[int, int]
"""One scale: 8 is 8x8 tokens, (8, 12) is 8 rows of 12."""

IMPLEMENTATIONS = ("reference", "triton", "sdpa", "flex", "varlen", "masked")
"""Every implementation by name; they compute the same function and never import each other."""

MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "sdpa": sdpa,
    "flex": flex,
    "varlen": varlen,
    "masked": masked,
}
"""Of each implementation; "triton" joins when it is first asked for."""


class Choice(NamedTuple):
    """An implementation by name, and why it runs, in one line."""

    name: str
    reason: str


def unavailable(
    implementation: str, *, device: torch.device, dtype: torch.dtype, head_size: int, pattern: Pattern
) -> str | None:
    """Say in one line why an implementation cannot run; None where it can.

    Args:
        implementation: a name in `IMPLEMENTATIONS`.
        device: of the tensors.
        dtype: of the tensors.
        head_size: D.
        pattern: "causal" or "diagonal".

    Raises:
        ValueError: unknown name.
    """
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(["auto", "measure", *IMPLEMENTATIONS])
        raise ValueError(f"expected an attention implementation of {choices}, got {implementation!r}")
    try:
        module = _load(implementation)
    except ImportError as error:
        return f"it cannot be imported: {error}"
    reason = module.unavailable(device=device, dtype=dtype, head_size=head_size, pattern=pattern)
    return reason or None


def _load(name: str) -> ModuleType:
    """The module of an implementation.

    Raises:
        ImportError: Triton is not installed.
    """
    if name not in MODULES:
        MODULES[name] = importlib.import_module("hmar_kernels.triton_attention")
    return MODULES[name]


@functools.cache
def choose(
    implementation: str, *, device: torch.device, dtype: torch.dtype, head_size: int, pattern: Pattern
) -> Choice:
    """Name the implementation that runs, and why.

    Args:
        implementation: a name in `IMPLEMENTATIONS`, or "auto": "triton" where that runs on a GPU, else "sdpa".
        device: of the tensors.
        dtype: of the tensors.
        head_size: D.
        pattern: "causal" or "diagonal".

    Raises:
        ValueError: unknown name, or an implementation that cannot run here.
    """
    named = "triton" if implementation == "auto" else implementation
    reason = unavailable(named, device=device, dtype=dtype, head_size=head_size, pattern=pattern)
    if implementation == "auto":
        if device.type != "cuda":
            return Choice("sdpa", "one dense call per scale is the fastest without a GPU")
        if reason:
            return Choice("sdpa", f"one dense call per scale; not triton: {reason}")
        return Choice("triton", "one kernel over all scales is the fastest on a GPU")
    if reason:
        raise ValueError(f"attention implementation {implementation!r} cannot run here: {reason}")
    return Choice(implementation, "asked for by name")


@overload
def scale_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    sides: Sequence[Side],
    pattern: Pattern,
    *,
    softmax_scale: float = ...,
    head_scale: Tensor | None = ...,
    implementation: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def scale_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    sides: Sequence[Side],
    pattern: Pattern,
    *,
    softmax_scale: float = ...,
    head_scale: Tensor | None = ...,
    implementation: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def scale_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    sides: Sequence[Side],
    pattern: Pattern,
    *,
    softmax_scale: float = 1.0,
    head_scale: Tensor | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence of scales (HMAR supplement B.3, Fig. 10).

    A token attends to all tokens of its own scale and, where the pattern is causal, of every earlier one. The score
    of a query and a key is softmax_scale q·k; with a head scale it is softmax_scale head_scale[h] q̂·k̂ with
    x̂ = x / max(|x|, 1e-12), where |x| is the length over D in float32.

    Args:
        qkv: [B, L, 3, H, D], queries, keys and values as one projection wrote them, read in place; or q [B, N, H, D],
            k [B, L, H, D] and v [B, L, H, D]. All of one floating dtype, of any strides but the last, which is 1.
            N is L, or fewer whole scales at the end where the earlier keys come from a cache.
        sides: the scales, n_k = rows x columns tokens each, L in all.
        pattern: "causal" (VAR) or "diagonal" (HMAR).
        softmax_scale: factor on the scores, above 0.
        head_scale: [H], used in float32 (float64 for float64 inputs); given, queries and keys are normalised. It
            gets a gradient, too.
        implementation: a name in `IMPLEMENTATIONS`; "auto", see `choose`; or "measure", see `measure`.
        return_lse: also return the log of the sum of exp of each query's scores; it has no gradient.

    Returns:
        [B, N, H, D], contiguous, in the inputs' dtype; with `return_lse` also [B, H, N] float32 (float64 for float64
        inputs).

    Raises:
        ValueError: shapes, dtypes, sides, pattern or implementation that don't fit, an implementation that cannot
            run on these tensors, or that cannot give the log-sum-exp.
    """
    lengths = _lengths(sides)
    batch, queries, heads, head_size = _check(qkv, lengths, pattern, softmax_scale, head_scale)
    first = qkv if isinstance(qkv, Tensor) else qkv[0]
    device, dtype, causal = first.device, first.dtype, pattern == "causal"
    if implementation == "measure":
        shape = (batch, 0 if isinstance(qkv, Tensor) else queries, heads, head_size)
        backward = torch.is_grad_enabled()
        name = _measured(lengths, pattern, shape, dtype, device, head_scale is not None, backward).name
    else:
        name = _name(implementation, device, dtype, head_size, pattern)
    run = _load(name)
    if head_scale is not None:
        head_scale = head_scale.to(torch.promote_types(dtype, torch.float32))
    rest = lengths, causal, softmax_scale, head_scale
    if name == "triton":
        out, lse = run.attention(*(qkv, None, None) if isinstance(qkv, Tensor) else qkv, *rest)
    else:
        with torch.autocast(device.type, enabled=False):  # dtypes are those of the inputs
            out, lse = run.attention(*qkv.unbind(2) if isinstance(qkv, Tensor) else qkv, *rest)
    if not return_lse:
        return out  # type: ignore[no-any-return]
    if lse is None:
        raise ValueError(f"expected an implementation that gives the log-sum-exp, got {name!r}")
    return out, lse[:, :, :queries]  # Triton's has a pitch


def _lengths(sides: Sequence[Side]) -> tuple[int, ...]:
    """Tokens of each scale; `index` makes them constants where a graph is compiled."""
    pairs = [(side, side) if isinstance(side, int) else side for side in sides]
    if not pairs or any(rows < 1 or columns < 1 for rows, columns in pairs):
        raise ValueError(f"expected one or more scales with sides of at least 1, got {list(sides)}")
    return tuple(operator.index(rows) * operator.index(columns) for rows, columns in pairs)


def _check(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    pattern: str,
    softmax_scale: float,
    head_scale: Tensor | None,
) -> tuple[int, int, int, int]:
    """Check what `scale_attention` was given; B, N, H and D.

    Raises:
        ValueError: what doesn't fit.
    """
    if isinstance(qkv, Tensor):
        if qkv.ndim != 5 or qkv.shape[2] != 3:
            raise ValueError(f"expected qkv [B, L, 3, H, D], got {[*qkv.shape]}")
        tensors, (batch, keys, _, heads, head_size) = [qkv], qkv.shape
        queries = keys
    else:
        tensors = q, k, v = [*qkv]
        same = q.ndim == k.ndim == 4 and k.shape == v.shape
        if not same or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            raise ValueError(
                f"expected q [B, N, H, D] and k, v [B, L, H, D], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
            )
        (batch, queries, heads, head_size), keys = q.shape, k.shape[1]
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not tensors[0].is_floating_point() or any(x.stride(-1) != 1 for x in tensors):
        raise ValueError(
            "expected tensors of one floating dtype whose last stride is 1, got "
            + ", ".join(f"{x.dtype} with {x.stride(-1)}" for x in tensors)
        )
    if sum(lengths) != keys:
        raise ValueError(f"expected scales with {keys} tokens in all, got {sum(lengths)} in {list(lengths)}")
    if queries != keys and not any(sum(lengths[i:]) == queries for i in range(len(lengths))):
        raise ValueError(f"expected {queries} queries to be whole scales at the end of {list(lengths)}")
    if pattern not in ("causal", "diagonal"):
        raise ValueError(f"expected the pattern 'causal' or 'diagonal', got {pattern!r}")
    if not softmax_scale > 0:
        raise ValueError(f"expected a softmax scale above 0, got {softmax_scale}")
    if head_scale is not None and (head_scale.shape != (heads,) or not head_scale.is_floating_point()):
        raise ValueError(
            f"expected a floating head scale [{heads}], got {head_scale.dtype} {[*head_scale.shape]}"
        )
    return batch, queries, heads, head_size


@constant
def _name(
    implementation: str, device: torch.device, dtype: torch.dtype, head_size: int, pattern: Pattern
) -> str:
    """The name that `choose` gives, as a constant of compiled graphs."""
    return choose(implementation, device=device, dtype=dtype, head_size=head_size, pattern=pattern).name


def measure(
    sides: Sequence[Side],
    pattern: Pattern,
    *,
    batch: int,
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    queries: int = 0,
    normalized: bool = True,
    backward: bool = True,
) -> Choice:
    """Time every implementation that can run here and name the fastest; the result is kept.

    All but "reference" are timed, on random numbers: the median of ten calls after three that warm up. Compiling
    FlexAttention takes up to a minute.

    Args:
        sides: the scales.
        pattern: "causal" or "diagonal".
        batch: B.
        heads: H.
        head_size: D.
        dtype: of the tensors.
        device: a GPU; elsewhere there is nothing to measure and the answer is that of "auto".
        queries: N, where earlier keys come from a cache; 0 is all of L, packed with keys and values.
        normalized: with a head scale.
        backward: time forward and backward together, not the forward alone.

    Raises:
        ValueError: arguments that don't fit.
    """
    shape = (batch, queries, heads, head_size)
    return _measured(_lengths(sides), pattern, shape, dtype, torch.device(device), normalized, backward)


@functools.cache
def _measured(
    lengths: tuple[int, ...],
    pattern: Pattern,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    normalized: bool,
    backward: bool,
) -> Choice:
    """See `measure`; shape is B, N, H, D."""
    settings: Any = {"device": device, "dtype": dtype, "head_size": shape[3], "pattern": pattern}
    if device.type != "cuda":
        return choose("auto", **settings)
    times: dict[str, float] = {}
    for name in IMPLEMENTATIONS:
        if name == "reference" or unavailable(name, **settings):
            continue
        try:
            times[name] = _time(name, lengths, pattern, shape, dtype, device, normalized, backward)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    if not times:
        return choose("auto", **settings)
    ranked = sorted(times, key=lambda name: times[name])
    what = "forward and backward" if backward else "forward"
    return Choice(
        ranked[0], f"measured {what}: " + ", ".join(f"{name} {times[name]:.3f} ms" for name in ranked)
    )


def _time(
    name: str,
    lengths: tuple[int, ...],
    pattern: Pattern,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    normalized: bool,
    backward: bool,
) -> float:
    """Median milliseconds of one implementation on random numbers."""
    batch, queries, heads, head_size = shape
    sides = [(1, n) for n in lengths]
    generator = torch.Generator(device).manual_seed(0)  # the global one is the model's

    def draw(*size: int) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return drawn.requires_grad_(backward)

    events = []
    with torch.inference_mode(False), torch.set_grad_enabled(backward):
        keys = sum(lengths)
        qkv: Tensor | tuple[Tensor, Tensor, Tensor] = draw(batch, keys, 3, heads, head_size)
        if queries:
            k, v = (draw(batch, keys, heads, head_size) for _ in range(2))
            qkv = (draw(batch, queries, heads, head_size), k, v)
        scale = torch.full((heads,), 4.0, device=device).requires_grad_(backward) if normalized else None
        inputs = [x for x in (*(qkv if isinstance(qkv, tuple) else (qkv,)), scale) if x is not None]
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = scale_attention(qkv, sides, pattern, head_scale=scale, implementation=name)
            if backward:
                torch.autograd.grad(out, inputs, out.detach())
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(device)
    times: list[float] = [start.elapsed_time(end) for start, end in events[3:]]
    return statistics.median(times)
