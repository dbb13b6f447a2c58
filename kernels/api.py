"""The public operation: checks its arguments and calls the implementation that was named.

Letters: B batch, L keys, N queries, H heads, D head size, n_k tokens of scale k.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from hmar_kernels.reference import attention as reference
from hmar_kernels.sdpa import attention as sdpa
from torch import Tensor

Pattern = Literal["causal", "diagonal"]
Implementation = Callable[[Tensor, Tensor, Tensor, Sequence[int], Pattern, float], Tensor]

IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference, "sdpa": sdpa}
"""Every implementation by name; they compute the same function and never import each other."""


def choose(implementation: str) -> tuple[str, str]:
    """Name the implementation that runs, and why.

    Raises:
        ValueError: unknown name.
    """
    if implementation == "auto":
        return "sdpa", "one dense SDPA call per scale is the fastest implementation present"
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"expected an attention implementation of {choices}, got {implementation!r}")
    return implementation, "asked for by name"


def scale_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    pattern: Pattern,
    *,
    softmax_scale: float = 1.0,
    implementation: str = "auto",
) -> Tensor:
    """Exact attention over a sequence of scales (HMAR supplement B.3, Fig. 10).

    A token attends to all tokens of its own scale and, where the pattern is causal, of every earlier one.

    Args:
        q: [B, N, H, D], the last N tokens of the sequence; N is L, or ends on a scale boundary when the earlier
            keys come from a cache.
        k: [B, L, H, D].
        v: [B, L, H, D].
        lengths: tokens n_k of each scale, summing to L.
        pattern: "causal" (VAR) or "diagonal" (HMAR).
        softmax_scale: factor on the scores.
        implementation: a name in `IMPLEMENTATIONS`, or "auto".

    Returns:
        [B, N, H, D], in q's dtype.

    Raises:
        ValueError: shapes, lengths, pattern or implementation that don't fit.
    """
    same = k.shape == v.shape and q.ndim == k.ndim == 4
    if not same or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"expected q [B, N, H, D] and k, v [B, L, H, D], got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if sum(lengths) != k.shape[1] or min(lengths) < 1:
        raise ValueError(f"expected positive lengths that sum to {k.shape[1]} keys, got {list(lengths)}")
    if pattern not in ("causal", "diagonal"):
        raise ValueError(f"expected the pattern 'causal' or 'diagonal', got {pattern!r}")
    if not any(sum(lengths[i:]) == q.shape[1] for i in range(len(lengths))):
        raise ValueError(f"expected {q.shape[1]} queries to be whole scales at the end of {list(lengths)}")
    name, _ = choose(implementation)
    return IMPLEMENTATIONS[name](q, k, v, lengths, pattern, softmax_scale)
