"""Learning rate and weight decay as functions of the step, as VAR and HMAR schedule them."""

import math

from hmar_cli.settings import Optim

FLAT = {"lin0": 0.05, "lin": 0.15, "lin00": 0.0, "exp": 0.15}
"""Share of the steps after the warm-up during which the named schedules stay at their peak."""


def learning_rate_factor(settings: Optim, step: int, steps: int) -> float:
    """Learning rate of a step, as a factor on the peak.

    A straight line leads from `start_ratio` to 1 during the warm-up: `warmup_steps`, or else the share `warmup`
    of the run. After it, with x the share of what remains: `lin`, `lin0` and `lin00` stay flat for 15, 5 and 0 %
    and then fall in a straight line, `lin<T>` falls in two straight pieces that meet at x = T, halfway in height
    between the peak and the plain line, `cos` is half a cosine, `exp` stays flat for 15 % and then falls
    exponentially. All but `constant` end at `end_ratio`.

    Args:
        settings: the recipe's optimizer.
        step: optimizer steps done before this one, 0 to steps - 1.
        steps: optimizer steps of the whole run.

    Raises:
        ValueError: an unknown schedule.
    """
    warm = settings.warmup_steps or round(settings.warmup * steps)
    if step < warm:
        return settings.start_ratio + (1 - settings.start_ratio) * step / warm
    x = (step - warm) / max(steps - 1 - warm, 1)  # 0 to 1
    kind, end = settings.schedule, settings.end_ratio
    if kind == "constant":
        return 1.0
    if kind == "cos":
        return end + (1 - end) * (1 + math.cos(math.pi * x)) / 2
    if kind in FLAT:
        if x < FLAT[kind]:
            return 1.0
        fall = (x - FLAT[kind]) / (1 - FLAT[kind])
        return float(end**fall) if kind == "exp" else end + (1 - end) * (1 - fall)
    knee = _knee(kind)
    height = (1 + end + (1 - end) * (1 - knee)) / 2
    if x < knee:
        return 1 + (height - 1) * x / knee
    return end + (height - end) * (1 - x) / (1 - knee)


def weight_decay(settings: Optim, step: int, steps: int) -> float:
    """Weight decay of a step: half a cosine from its first to its last value, the warm-up included."""
    first = settings.weight_decay
    last = first if settings.weight_decay_end is None else settings.weight_decay_end
    return last + (first - last) * (1 + math.cos(math.pi * step / max(steps - 1, 1))) / 2


def _knee(kind: str) -> float:
    """The T of `lin<T>`."""
    try:
        knee = float(kind.removeprefix("lin")) if kind.startswith("lin") else 0.0
    except ValueError:
        knee = 0.0
    if not 0 < knee < 1:
        names = "lin0, lin, lin00, lin<share between 0 and 1>, cos, exp or constant"
        raise ValueError(f"expected a schedule {names}, got {kind!r}")
    return knee
