"""Scale lists, and sampling schedules over them.

Letters: K scales; p_k the side of scale k in tokens; n_k = p_k^2 its tokens; L = sum of n_k.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Side = int | Sequence[int]
"""One scale as a recipe writes it: `8` for 8x8 tokens, `[8, 12]` for 8 rows of 12."""


@dataclass(frozen=True)
class Scales:
    """An increasing list of token grids, coarse to fine (HMAR supplement B.1; VAR's patch numbers).

    Attributes:
        grids: K pairs (rows, columns).
    """

    grids: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sides: Sequence[Side]) -> "Scales":
        """Build from sides as recipes write them.

        Raises:
            ValueError: no scale, a side below 1, or a list that does not grow.
        """
        grids = tuple((s, s) if isinstance(s, int) else (int(s[0]), int(s[1])) for s in sides)
        if not grids or any(side < 1 for grid in grids for side in grid):
            raise ValueError(f"expected one or more scales with sides of at least 1, got {list(sides)}")
        for smaller, larger in itertools.pairwise(grids):
            if smaller[0] > larger[0] or smaller[1] > larger[1] or smaller == larger:
                raise ValueError(f"expected scales that grow, got {smaller} before {larger}")
        return cls(grids)

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last scale, on which the tokenizer's feature map lives."""
        return self.grids[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale, n_k."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Place of each scale's first token in the sequence."""
        return tuple(sum(self.lengths[:k]) for k in range(len(self)))

    @cached_property
    def total(self) -> int:
        """Length of the whole sequence, L."""
        return sum(self.lengths)

    def slice(self, k: int) -> slice:
        """The positions of scale k in the sequence."""
        return slice(self.offsets[k], self.offsets[k] + self.lengths[k])

    def for_grid(self, grid: tuple[int, int]) -> "Scales":
        """The same scales for a last grid of another size: every side in proportion, rounded, at least 1.

        A token of each scale stands for about as many tokens of the last one as before, so that codes which were
        trained at one size have the same meaning at another.

        Args:
            grid: rows and columns of the last scale.

        Raises:
            ValueError: a grid so small that two scales would be alike, or that has no rows or columns.
        """
        if min(grid) < 1:
            raise ValueError(f"expected a grid with sides of at least 1, got {list(grid)}")
        pairs = (zip(each, grid, self.grid, strict=True) for each in self.grids)
        sides = [[max((2 * side * new + old) // (2 * old), 1) for side, new, old in pair] for pair in pairs]
        return Scales.of(sides)

    def sides(self) -> list[int | list[int]]:
        """The list as a recipe writes it: a number for a square grid, a pair otherwise."""
        return [h if h == w else [h, w] for h, w in self.grids]


Schedule = tuple[tuple[int, ...], ...]
"""Tokens kept by each sampling pass of each scale, e.g. ((1,), (1, 3)): a draft alone, then a draft and one
refinement. Each scale's entries sum to its n_k."""


def check_schedule(schedule: Sequence[Sequence[int]], scales: Scales) -> Schedule:
    """Return `schedule` as tuples.

    Raises:
        ValueError: not one entry a scale, a pass that keeps no token, a scale whose passes do not sum to n_k, or a
            first scale in several passes: a refinement looks at the scales before.
    """
    if len(schedule) != len(scales):
        raise ValueError(f"expected a schedule of {len(scales)} scales, got {len(schedule)}")
    for k, (passes, length) in enumerate(zip(schedule, scales.lengths, strict=True), start=1):
        if not passes or min(passes) < 1 or sum(passes) != length:
            raise ValueError(f"scale {k}: expected positive numbers that sum to {length}, got {list(passes)}")
    if len(schedule[0]) > 1:
        raise ValueError(f"scale 1: expected one pass, as nothing comes before it, got {list(schedule[0])}")
    return tuple(tuple(passes) for passes in schedule)


def split_passes(length: int, passes: int) -> tuple[int, ...]:
    """Share `length` tokens over `passes` sampling passes, few first and many last (MaskGIT's cosine law).

    Raises:
        ValueError: fewer tokens than passes.
    """
    if not 1 <= passes <= length:
        raise ValueError(f"expected 1 to {length} passes for {length} tokens, got {passes}")
    kept, shares = 0, []
    for i in range(1, passes + 1):
        target = length - math.floor(length * math.cos(math.pi / 2 * i / passes) + 1e-9)
        target = min(max(target, kept + 1), length - (passes - i))
        shares.append(target - kept)
        kept = target
    return tuple(shares)
