"""How far attention in a dtype may be from the exact result: a bound for every number, derived from the dtype.

The exact result is that of plain formulas in float64, forward and backward. Beside each quantity goes a bound on its
error, carried through the formulas to first order and by the worst signs. Errors enter where an exact implementation
rounds, and nowhere else:

- `kept`: a number that is stored or multiplied in the dtype is off by its unit roundoff u, relative, or by its
  smallest number. These are normalised queries and keys, weights, gradients of scores, outputs, gradients. Gradients
  of keys and values may be summed over scales in the dtype, one addition a scale.
- a sum of n products in float32 is off by n u32 times the sum of their absolute values, whatever its order.
- the argument of an exponential is off by a few float32 roundings of what it is the difference of, the exponential
  itself by 2^-22, which GPUs promise; a softmax that meets its keys in blocks scales its sums down once a block of at
  least 16, by one more exponential (together less than another n u32).

No number here was found by trying.

Letters: B batch, L keys, N queries, H heads, D head size; E(x) is the bound on the error of x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT32 = 2.0**-24
EXPONENTIAL = 2.0**-22
EPS = 1e-12


@dataclass
class Bounded:
    """Exact numbers and how far they may be off."""

    exact: Tensor
    error: Tensor

    def share(self, found: Tensor) -> float:
        """The largest error over what is allowed; infinite where `found` is no number."""
        if not found.isfinite().all():
            return float("inf")
        return float(((found.double() - self.exact).abs() / self.error).nan_to_num(0).max())

    def check(self, found: Tensor, what: str) -> None:
        """Fail where `found` is no number or further off than allowed."""
        assert found.shape == self.exact.shape, f"{what}: {[*found.shape]}, expected {[*self.exact.shape]}"
        share = self.share(found)
        assert share <= 1, f"{what}: {share:.3g} times what rounding allows"


def budget(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    head_scale: Tensor | None,
    lengths: tuple[int, ...],
    causal: bool,
    softmax_scale: float,
) -> dict[str, Bounded]:
    """The exact results and their bounds for inputs as they are, in the dtype that is judged.

    Args:
        q: [B, N, H, D].
        k: [B, L, H, D].
        v: [B, L, H, D].
        grad: of the output, [B, N, H, D].
        head_scale: [H] or None.
        lengths: tokens of each scale.
        causal: whether earlier scales are seen.
        softmax_scale: factor on the scores.

    Returns:
        "out", "dq" [B, N, H, D], "dk", "dv" [B, L, H, D], "lse" [B, H, N] and, with a head scale, "dscale" [H].
    """
    kept = Kept(q.dtype)
    q, k, v, grad = (x.double().transpose(1, 2) for x in (q, k, v, grad))  # [B, H, L, D]
    ones = None if head_scale is None else torch.ones_like(head_scale, dtype=torch.float64)[:, None, None]
    scale = None if head_scale is None else head_scale.double()[:, None, None]  # [H, 1, 1]
    a, b = unit(q, scale, kept), unit(k, ones, kept)
    sees = visible(lengths, causal, q.shape[2], q.device)
    weights, lse = softmax(a, b, sees, softmax_scale)
    used = Bounded(weights.exact, weights.error + torch.where(sees, kept(weights.exact), 0))
    out = through(used, plain(v), sees, [slice(None)], kept, blocks=True)
    scores = score_gradient(weights, v, grad, out, sees, softmax_scale, kept)
    slices = query_slices(lengths, q.shape[2])
    da = through(scores, b, sees, [slice(None)], kept)
    db = through(turned(scores), a, sees.T, slices, kept)
    found = {"out": out, "dv": through(turned(used), plain(grad), sees.T, slices, kept)}
    found["dq"], found["dk"] = before_unit(q, scale, da, kept), before_unit(k, ones, db, kept)
    by_token = {name: Bounded(x.exact.transpose(1, 2), x.error.transpose(1, 2)) for name, x in found.items()}
    share = {} if scale is None else {"dscale": scale_gradient(q, da)}
    return by_token | {"lse": lse} | share


class Kept:
    """The bound on the error of numbers that are rounded to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        limits = torch.finfo(dtype)
        self.unit = limits.eps / 2
        # a GPU may take float32 numbers below the smallest normal one for 0; bfloat16 ones are computed as float32
        self.least = limits.tiny * limits.eps if dtype == torch.float16 else limits.tiny

    def __call__(self, x: Tensor) -> Tensor:
        return self.unit * x.abs() + self.least


def plain(x: Tensor) -> Bounded:
    """Numbers without an error."""
    return Bounded(x, torch.zeros_like(x))


def visible(lengths: tuple[int, ...], causal: bool, queries: int, device: torch.device) -> Tensor:
    """Whether a query sees a key, [N, L], worked out number by number."""
    scales = [k for k, n in enumerate(lengths) for _ in range(n)]
    rows = torch.tensor(scales, device=device)
    own = rows[len(scales) - queries :, None]
    return own >= rows if causal else own == rows


def query_slices(lengths: tuple[int, ...], queries: int) -> list[slice]:
    """The queries of each scale."""
    ends = [sum(lengths[: i + 1]) - sum(lengths) + queries for i in range(len(lengths))]
    return [slice(max(0, end - n), end) for n, end in zip(lengths, ends, strict=True) if end > 0]


def turned(x: Bounded) -> Bounded:
    """The same matrices, transposed."""
    return Bounded(x.exact.mT, x.error.mT)


def unit(x: Tensor, scale: Tensor | None, kept: Kept) -> Bounded:
    """scale x / |x|: half of D roundings in the length, a root, a division, a product; then kept."""
    if scale is None:
        return plain(x)
    exact = scale * x / x.norm(dim=-1, keepdim=True).clamp_min(EPS)
    return Bounded(exact, (x.shape[-1] / 2 + 4) * UNIT32 * exact.abs() + kept(exact))


def softmax(a: Bounded, b: Bounded, sees: Tensor, softmax_scale: float) -> tuple[Bounded, Bounded]:
    """Weights [B, H, N, L] and their log-sum-exp [B, H, N]."""
    scores = softmax_scale * (a.exact @ b.exact.mT)
    size = a.exact.abs() @ b.exact.abs().mT
    error = a.exact.abs() @ b.error.mT + a.error @ (b.exact.abs() + b.error).mT
    error = softmax_scale * (error + (a.exact.shape[-1] + 4) * UNIT32 * size)
    n = sees.sum(-1, keepdim=True).double()  # keys of each query
    hidden = scores.masked_fill(~sees, float("-inf"))
    largest = scores.abs().masked_fill(~sees, 0).amax(-1, keepdim=True)
    error = error + 4 * UNIT32 * (scores.abs() + largest + n.log())
    weights, lse = hidden.softmax(-1), hidden.logsumexp(-1, keepdim=True)
    sums = 2 * n * UNIT32 + EXPONENTIAL
    shift = (weights * error.exp()).sum(-1, keepdim=True).log() + sums  # of the log-sum-exp
    return (
        Bounded(weights, weights * torch.expm1(error + shift + EXPONENTIAL)),
        Bounded(lse[..., 0], (shift + 2 * UNIT32 * lse.abs())[..., 0]),
    )


def score_gradient(
    weights: Bounded, v: Tensor, grad: Tensor, out: Bounded, sees: Tensor, softmax_scale: float, kept: Kept
) -> Bounded:
    """Gradient of q·k, [B, H, N, L]; the row's mean gradient is formed from the output, or from the weights."""
    size = v.shape[-1]
    seen = grad @ v.mT  # [B, H, N, L], gradient of the weights
    e_seen = size * UNIT32 * (grad.abs() @ v.abs().mT)
    mean = (grad * out.exact).sum(-1, keepdim=True)  # [B, H, N, 1]
    by_output = (grad.abs() * (out.error + size * UNIT32 * out.exact.abs())).sum(-1, keepdim=True)
    n = sees.sum(-1, keepdim=True)
    by_weights = weights.error * seen.abs() + (weights.exact + weights.error) * (
        e_seen + n * UNIT32 * seen.abs()
    )
    e_mean = torch.maximum(by_output, by_weights.sum(-1, keepdim=True))
    exact = weights.exact * (seen - mean)
    error = weights.error * (seen - mean).abs() + (weights.exact + weights.error) * (e_seen + e_mean)
    error = softmax_scale * (
        error + kept(exact) + 4 * UNIT32 * exact.abs()
    )  # kept before it is scaled, or after
    exact = softmax_scale * exact
    return Bounded(exact, torch.where(sees, error + kept(exact), 0))


def through(
    weights: Bounded, x: Bounded, sees: Tensor, parts: list[slice], kept: Kept, *, blocks: bool = False
) -> Bounded:
    """weights [B, H, M, n] @ x [B, H, n, D], summed in float32 within a part of n, and in the dtype over parts.

    `sees` [M, n] says which terms there are; sums over `blocks` are scaled down on the way.
    """
    exact = torch.zeros_like(weights.exact[..., :1] * x.exact[..., :1, :])
    bound = torch.zeros_like(exact)
    for part in parts:
        w, e = weights.exact[..., part], weights.error[..., part]
        own, size = x.exact[..., part, :], x.exact[..., part, :].abs()
        share = w @ own
        exact = exact + share
        terms = sees[:, part].sum(-1, keepdim=True) * (2 if blocks else 1)
        bound += e @ size + (w.abs() + e) @ x.error[..., part, :] + terms * UNIT32 * (w.abs() @ size)
        bound += kept(share) + kept(exact)
    return Bounded(exact, bound)


def before_unit(x: Tensor, scale: Tensor | None, gradient: Bounded, kept: Kept) -> Bounded:
    """Gradient of x from that of scale x / |x|."""
    if scale is None:
        return gradient
    length = x.norm(dim=-1, keepdim=True)
    factor = scale / length.clamp_min(EPS)
    direction = torch.where(
        length > EPS, x / length.clamp_min(EPS), 0
    )  # no length is felt below the least one

    def along(y: Tensor) -> Tensor:
        return direction.abs() * (direction.abs() * y).sum(-1, keepdim=True)

    exact = factor * (gradient.exact - direction * (direction * gradient.exact).sum(-1, keepdim=True))
    size = gradient.exact.abs() + 2 * along(gradient.exact.abs())
    error = factor.abs() * (gradient.error + along(gradient.error) + (x.shape[-1] + 8) * UNIT32 * size)
    return Bounded(exact, error + kept(exact))


def scale_gradient(q: Tensor, gradient: Bounded) -> Bounded:
    """Gradient [H] of the head scale: the sum over B, N and D of directions times gradients."""
    direction = q / q.norm(dim=-1, keepdim=True).clamp_min(EPS)
    exact, size = direction * gradient.exact, direction.abs() * gradient.exact.abs()
    terms = q.numel() / q.shape[1] + q.shape[-1] / 2 + 4
    error = (direction.abs() * gradient.error + terms * UNIT32 * size).sum((0, 2, 3))
    return Bounded(exact.sum((0, 2, 3)), error + torch.finfo(torch.float32).tiny)
