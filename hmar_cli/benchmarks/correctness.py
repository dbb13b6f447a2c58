"""Is an implementation right? Its output and gradients against the reference in float64, within what rounding allows.

The budget follows from the dtype. Attention of one image and head is computed by hand in float64, forward and
backward, with an error wherever an exact implementation in that dtype rounds:

- a number kept in the dtype (normalised queries and keys, weights, output, gradients of scores and of inputs) is
  off by up to its unit roundoff u, relative, or half its smallest number;
- a sum of n products in float32 is off by u32 sqrt(n / 2) times the root of its summed squares: n roundings of
  partial sums that walk at random;
- an exponential is off by 2^-22, which GPUs promise, and its argument by two float32 roundings of each part; the
  backward pass computes the weights once more, from scores and their log-sum-exp.

The errors are drawn uniformly, sixteen times. For every scale, an implementation may be off by three times the worst
draw, in the root mean square of all rows and in its worst row. So rounding passes, while a key too few in 4096 does
not.
The gradient of a head's scale is one number, a sum over rows: it may be off by five standard deviations of that sum.

Letters: B batch, L tokens, H heads, D head size, n rows of a scale.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from hmar_kernels import scale_attention, unavailable
from torch import Tensor

from hmar_cli.benchmarks.cases import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT32 = 2.0**-24
EXPONENTIAL = 2.0**-22
DRAWS = 16
FACTOR = 3.0
DEVIATIONS = 5.0

Run = Callable[[Tensor, Tensor | None], Tensor]
"""An implementation at work: packed [B, L, 3, H, D] and head scale [H] or None -> [B, L, H, D]."""


@dataclass(frozen=True)
class Finding:
    """The worst deviation of one tensor.

    Attributes:
        tensor: "out", "dq", "dk", "dv" or "dscale".
        share: error over budget; above 1 is wrong.
        error: relative to the size of the tensor there.
        where: the scale, for people.
    """

    tensor: str
    share: float
    error: float
    where: str


def softmax_scale(case: Case) -> float:
    """Factor on the scores: 1 under normalisation, as in the models, else 1 / sqrt(D)."""
    return 1.0 if case.normalised else case.head_size**-0.5


def draw_inputs(
    case: Case, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Random packed projections [B, L, 3, H, D], head scale [H] or None, and output gradient [B, L, H, D]."""
    dtype, shape = DTYPES[case.dtype], (case.batch, case.scales.total, 3, case.heads, case.head_size)
    qkv = torch.randn(shape, device=device, dtype=dtype, generator=generator)
    grad = torch.randn(qkv[:, :, 0].shape, device=device, dtype=dtype, generator=generator)
    if not case.normalised:
        return qkv, None, grad
    draw = torch.rand(case.heads, device=device, generator=generator)
    return qkv, 2 + 8 * draw, grad


class Judge:
    """Compares implementations of one case, at the full shape, with the reference in float64.

    Two pairs of image and head are compared, the first and the last; no other has a gradient, and what an
    implementation returns for the others' inputs must be 0.

    Args:
        case: the shape.
        device: where the implementations run.
        seed: of the inputs and of the drawn errors.
        gradients: compare those, too.
    """

    def __init__(self, case: Case, device: torch.device, seed: int, gradients: bool = True) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.gradients = gradients
        self.qkv, self.head_scale, self.grad = draw_inputs(case, device, generator)
        self.pairs = sorted({(0, 0), (case.batch - 1, case.heads - 1)})
        self.mask = torch.zeros(case.batch, 1, case.heads, 1, device=device, dtype=torch.bool)
        for b, h in self.pairs:
            self.mask[b, :, h] = True
        self.grad *= self.mask
        self.exact, self.budgets = [], []
        for b, h in self.pairs:
            scale = None if self.head_scale is None else self.head_scale[h]
            parts = self.qkv[b, :, :, h], self.grad[b, :, h], scale
            self.exact.append(_reference(case, *parts, gradients))
            self.budgets.append(Budget(case, *parts, generator))

    def check(self, run: Run) -> list[Finding]:
        """The worst deviation of each tensor that an implementation gives."""
        found = _outcome(run, self.qkv, self.head_scale, self.grad, self.gradients)
        findings = list(_strays(found, self.mask))
        for (b, h), exact, budget in zip(self.pairs, self.exact, self.budgets, strict=True):
            ours = {name: x[b, :, h] for name, x in found.items() if name != "dscale"}
            findings += budget.compare(ours, exact, f"image {b}, head {h}")
        if "dscale" in found:
            findings += self._judge_scales(found["dscale"])
        worst: dict[str, Finding] = {}
        for finding in findings:  # a NaN is the worst of all
            known = worst.get(finding.tensor)
            if known is None or not finding.share <= known.share:
                worst[finding.tensor] = finding
        return [worst[name] for name in found]

    def _judge_scales(self, found: Tensor) -> Iterator[Finding]:
        """Judge the gradients [H] of the heads' scales; pairs that share a head add up."""
        for h in {head for _, head in self.pairs}:
            own = [i for i, (_, head) in enumerate(self.pairs) if head == h]
            exact = sum(float(self.exact[i]["dscale"]) for i in own)
            spread = math.sqrt(sum(self.budgets[i].scale_variance() for i in own))
            error = abs(float(found[h]) - exact)
            allowed = DEVIATIONS * spread + UNIT32 * abs(exact)
            yield Finding("dscale", _over(error, allowed), _over(error, abs(exact)), f"head {h}")


def _outcome(
    run: Run, qkv: Tensor, head_scale: Tensor | None, grad: Tensor, gradients: bool
) -> dict[str, Tensor]:
    """What an implementation gives: "out" [B, L, H, D], "dq", "dk", "dv" alike and "dscale" [H]."""
    if not gradients:
        with torch.no_grad():
            return {"out": run(qkv, head_scale)}
    leaves = [x.detach().requires_grad_() for x in (qkv, head_scale) if x is not None]
    out = run(leaves[0], leaves[1] if head_scale is not None else None)
    grads = torch.autograd.grad(out, leaves, grad)
    found = {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), grads[0].unbind(2), strict=True))
    return found | {"dscale": grads[1]} if head_scale is not None else found


def _strays(found: dict[str, Tensor], mask: Tensor) -> Iterator[Finding]:
    """Look for outputs that are no numbers anywhere, and for gradients where there can be none."""
    for name, x in found.items():
        if name == "dscale":
            continue
        if not bool(x.isfinite().all()):
            yield Finding(name, math.inf, math.nan, "somewhere, where it is not finite")
        elif name != "out" and bool(x.masked_fill(mask, 0).any()):
            yield Finding(name, math.inf, math.inf, "an image or head without a gradient")


def _reference(
    case: Case, qkv: Tensor, grad: Tensor, head_scale: Tensor | None, gradients: bool
) -> dict[str, Tensor]:
    """The reference in float64 of one pair: qkv [L, 3, D] and the output's gradient [L, D]."""

    def run(packed: Tensor, scale: Tensor | None) -> Tensor:
        return attend(case, "reference", packed, scale)

    scale = None if head_scale is None else head_scale[None]
    found = _outcome(run, qkv[None, :, :, None].double(), scale, grad[None, :, None].double(), gradients)
    return {name: x if name == "dscale" else x[0, :, 0] for name, x in found.items()}


def attend(case: Case, implementation: str, qkv: Tensor, head_scale: Tensor | None) -> Tensor:
    """Attention of a case by an implementation, by name: [B, L, H, D]."""
    return scale_attention(
        qkv,
        case.scales.grids,
        "causal" if case.pattern == "causal" else "diagonal",
        softmax_scale=softmax_scale(case),
        head_scale=head_scale,
        implementation=implementation,
    )


def reason_against(case: Case, implementation: str, device: torch.device) -> str | None:
    """Why an implementation, by name, cannot run a case, in one line; None where it can."""
    return unavailable(
        implementation,
        device=device,
        dtype=DTYPES[case.dtype],
        head_size=case.head_size,
        pattern="causal" if case.pattern == "causal" else "diagonal",
    )


class Budget:
    """How far one image and head of a case may be off.

    Args:
        case: the shape.
        qkv: [L, 3, D].
        grad: [L, D], of the output.
        head_scale: scalar, or None.
        generator: of the drawn errors.
    """

    def __init__(
        self,
        case: Case,
        qkv: Tensor,
        grad: Tensor,
        head_scale: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.lengths, causal = case.scales.lengths, case.pattern == "causal"
        limits = torch.finfo(DTYPES[case.dtype])
        unit, least = limits.eps / 2, limits.smallest_normal * limits.eps / 2

        q, k, v = qkv.double().unbind(1)
        scale = None if head_scale is None else head_scale.double()

        def draw(noise: Noise) -> dict[str, Tensor]:
            return by_hand(q, k, v, grad.double(), self.lengths, causal, softmax_scale(case), scale, noise)

        exact = draw(Noise(0.0, 0.0, 0.0, generator))
        self.allowed: dict[str, list[tuple[float, float]]] = {}  # of each tensor and scale
        self.variance = 0.0
        for _ in range(DRAWS):
            drawn = {name: x - exact[name] for name, x in draw(Noise(unit, least, UNIT32, generator)).items()}
            if head_scale is not None:
                self.variance = max(self.variance, float(drawn.pop("dscale").square().sum()))
            for name, x in drawn.items():
                sizes = [_sizes(part) for part in x.split(self.lengths)]
                known = self.allowed.get(name, sizes)
                self.allowed[name] = [
                    (max(a, c), max(b, d)) for (a, b), (c, d) in zip(known, sizes, strict=True)
                ]

    def compare(self, found: dict[str, Tensor], exact: dict[str, Tensor], where: str) -> Iterator[Finding]:
        """Judge "out", "dq", "dk" and "dv" [L, D] scale by scale."""
        for name, x in found.items():
            errors = (x.double() - exact[name]).split(self.lengths)
            sizes = exact[name].split(self.lengths)
            for k, allowed in enumerate(self.allowed[name]):
                ours = _sizes(errors[k])
                share = max(_over(e, FACTOR * a) for e, a in zip(ours, allowed, strict=True))
                yield Finding(name, share, _over(ours[0], _sizes(sizes[k])[0]), f"scale {k + 1}, {where}")

    def scale_variance(self) -> float:
        """Variance of the gradient of the head's scale: that of a sum over rows, the worst of the draws."""
        return self.variance


def _sizes(x: Tensor) -> tuple[float, float]:
    """Root mean square and largest length of the rows [n, D]."""
    rows = x.square().sum(dim=1)
    return math.sqrt(float(rows.mean())), math.sqrt(float(rows.max()))


def _over(a: float, b: float) -> float:
    """a / b, where 0 / 0 is 0."""
    return a / b if b else (0.0 if a == 0 else math.inf)


class Noise:
    """Errors as an exact implementation makes them.

    Args:
        unit: unit roundoff of the dtype; 0 for none.
        least: half the smallest number of the dtype.
        unit32: unit roundoff of what is summed; 0 for none.
        generator: draws them.
    """

    def __init__(self, unit: float, least: float, unit32: float, generator: torch.Generator) -> None:
        self.unit, self.least, self.unit32, self.generator = unit, least, unit32, generator

    def off(self, x: Tensor, size: Tensor) -> Tensor:
        """Put numbers off by up to `size`."""
        if not self.unit32:
            return x
        draw = torch.rand(x.shape, device=x.device, dtype=x.dtype, generator=self.generator)
        return x + (2 * draw - 1) * size

    def rounded(self, x: Tensor) -> Tensor:
        """A number kept in the dtype."""
        return self.off(x, (self.unit * x.abs()).clamp_(min=self.least))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [n, m] @ b, summed in float32."""
        exact = a @ b
        if not self.unit32:
            return exact
        walk = (a.square() @ b.square()).mul_(a.shape[1] / 2).sqrt_()
        return self.off(exact, self.unit32 * walk)

    def weights(self, scores: Tensor) -> Tensor:
        """Softmax of scores [n, keys]."""
        weights = self.off(scores, 2 * self.unit32 * scores.abs()).softmax(dim=-1)
        return self.off(weights, EXPONENTIAL * weights)

    def weights_again(self, scores: Tensor) -> Tensor:
        """The same from the log-sum-exp that the forward pass has kept."""
        total = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - total).exp()
        return self.off(weights, (EXPONENTIAL + 2 * self.unit32 * (scores.abs() + total.abs())) * weights)


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lengths: Sequence[int],
    causal: bool,
    softmax_scale: float,
    head_scale: Tensor | None,
    noise: Noise,
) -> dict[str, Tensor]:
    """Attention of one image and head, forward and backward, with errors.

    Args:
        q: [L, D], as k, v, and the output's gradient `grad`.
        k: queries, keys and values are those before normalisation.
        v: values.
        grad: of the output.
        lengths: tokens of each scale.
        causal: a token sees earlier scales, too.
        softmax_scale: factor on the scores.
        head_scale: scalar; given, queries and keys are normalised.
        noise: the errors.

    Returns:
        "out", "dq", "dk", "dv" [L, D] and, with a head scale, "dscale" [L], the rows' shares of its gradient.
    """
    rounded, product = noise.rounded, noise.product
    a, b = q, k  # what the scores are products of
    if head_scale is not None:
        a, b = rounded(_unit(q, noise) * head_scale), rounded(_unit(k, noise))
    out, da, db, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    start = 0
    for length in lengths:
        rows, keys = slice(start, start + length), slice(0 if causal else start, start + length)
        scores = softmax_scale * product(a[rows], b[keys].T)  # [n, keys]
        out[rows] = rounded(product(rounded(noise.weights(scores)), v[keys]))
        weights = noise.weights_again(scores)
        seen = product(grad[rows], v[keys].T)  # [n, keys], gradient of the weights
        delta = product(grad[rows] * out[rows], torch.ones_like(grad[0, :, None]))  # [n, 1]
        dscores = rounded(softmax_scale * weights * (seen - delta))
        da[rows] = rounded(product(dscores, b[keys]))
        # an implementation may sum the gradients of keys over scales in the dtype
        db[keys] = rounded(db[keys] + rounded(product(dscores.T, a[rows])))
        dv[keys] = rounded(dv[keys] + rounded(product(rounded(weights).T, grad[rows])))
        start += length
    if head_scale is None:
        return {"out": out, "dq": da, "dk": db, "dv": dv}
    dq, dk = rounded(head_scale * _through_unit(q, da, noise)), rounded(_through_unit(k, db, noise))
    return {"out": out, "dq": dq, "dk": dk, "dv": dv, "dscale": (da * _unit(q, noise)).sum(dim=1)}


def _unit(x: Tensor, noise: Noise) -> Tensor:
    """Rows [L, D] of length 1, computed in float32."""
    direction = x / x.norm(dim=1, keepdim=True)
    return noise.off(direction, 2 * noise.unit32 * direction.abs())


def _through_unit(x: Tensor, gradient: Tensor, noise: Noise) -> Tensor:
    """Gradient of rows x [L, D] from that of their directions, computed in float32."""
    direction = _unit(x, noise)
    along = direction * noise.product(direction * gradient, torch.ones_like(x[0, :, None]))
    across: Tensor = (gradient - along) / x.norm(dim=1, keepdim=True)
    return across
