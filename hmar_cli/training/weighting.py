"""Weights of the next-scale loss over scales (HMAR supplement C.2, Fig. 13, Table 4)."""

import math
import statistics

from hmar_cli.models.scales import Scales
from hmar_cli.settings import Weighting


def scale_weights(scales: Scales, weighting: Weighting) -> list[float]:
    """Total weight of each scale; its tokens share it equally.

    With p_k the side of scale k (geometric mean of a rectangle's) and r_k = (k - 1) / (K - 1):

    - `none`: p_k^2 / L, so that every token weighs the same.
    - `linear`: proportional to p_k.
    - `sqrt`: proportional to the square root of p_k.
    - `equal`: 1 for every scale, K in total.
    - `exp-decay`: proportional to exp(-2 r_k).
    - `lognormal`: the standard normal density of the side ratio at the mirrored place in the list, after the
      ratios p_k / p_K are standardised by their mean and sample standard deviation.

    All but `equal` sum to 1. The supplement names the functions and gives no formulas; `none`, `equal` and
    `lognormal` are those of the published checkpoints, the others continue the series of powers of p_k.
    """
    count = len(scales)
    sides = [math.sqrt(n) for n in scales.lengths]
    if weighting == "equal":
        return [1.0] * count
    if weighting == "none":
        shares = [float(n) for n in scales.lengths]
    elif weighting == "linear":
        shares = sides
    elif weighting == "sqrt":
        shares = [math.sqrt(p) for p in sides]
    elif weighting == "exp-decay":
        shares = [math.exp(-2 * k / max(1, count - 1)) for k in range(count)]
    elif count == 1:
        shares = [1.0]
    else:
        ratios = [p / sides[-1] for p in sides]
        normal = statistics.NormalDist(statistics.mean(ratios), statistics.stdev(ratios))
        shares = [normal.pdf(r) for r in reversed(ratios)]
    return [share / sum(shares) for share in shares]
