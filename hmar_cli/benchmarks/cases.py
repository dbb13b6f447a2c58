"""What is measured: scale lists, grids of shapes, and how much work they are.

Letters: B batch, L tokens, H heads, D head size, n_k tokens of scale k.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hmar_cli.errors import UserError
from hmar_cli.models.scales import Scales

RESOLUTIONS = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Sides of VAR's and HMAR's scales at each resolution in pixels; a token of the last scale is 16x16 pixels."""

STRIDE = 16
PATTERNS = ("diagonal", "causal")
DTYPE_NAMES = ("bf16", "fp16", "fp32")
BACKWARD_FACTOR = 2.5
FLOP_MODEL = (
    "useful FLOP of a forward pass: 4 D per visible pair of query and key and per head and image (a product for the "
    f"score, one for the output); of a backward pass {BACKWARD_FACTOR} times that (five products for two)"
)


def visible_pairs(lengths: Sequence[int], causal: bool) -> int:
    """Pairs of a query and a key that it sees, of one head.

    Args:
        lengths: tokens n_k of each scale.
        causal: a token sees earlier scales, too.
    """
    seen = itertools.accumulate(lengths) if causal else lengths
    return sum(n * keys for n, keys in zip(lengths, seen, strict=True))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of the operation.

    Attributes:
        name: of the scale list, for people: "256 px" or "1,2,3x4".
        scales: the scale list.
        pattern: "causal" or "diagonal".
        dtype: "bf16", "fp16" or "fp32".
        batch: B.
        heads: H.
        head_size: D.
        normalised: queries and keys are L2-normalised and have a scale per head, as in the models.
    """

    name: str
    scales: Scales
    pattern: str
    dtype: str
    batch: int
    heads: int
    head_size: int
    normalised: bool

    def flop(self, direction: str) -> float:
        """Useful FLOP of "forward" or "backward", see `FLOP_MODEL`."""
        pairs = visible_pairs(self.scales.lengths, self.pattern == "causal")
        forward = 4.0 * self.head_size * pairs * self.heads * self.batch
        return forward * BACKWARD_FACTOR if direction == "backward" else forward

    def title(self) -> str:
        """The case in one line."""
        return f"{self.pattern} {self.name}, L{self.scales.total}, {self.shape()}"

    def shape(self) -> str:
        """What the scale list and the pattern leave open, in one line."""
        norm = ", normalised" if self.normalised else ""
        return f"B{self.batch} H{self.heads} D{self.head_size}, {self.dtype}{norm}"

    def describe(self) -> dict[str, object]:
        """The case as JSON."""
        return {
            "name": self.name,
            "sides": self.scales.sides(),
            "length": self.scales.total,
            "pattern": self.pattern,
            "dtype": self.dtype,
            "batch": self.batch,
            "heads": self.heads,
            "head_size": self.head_size,
            "normalised": self.normalised,
            "visible_pairs": visible_pairs(self.scales.lengths, self.pattern == "causal"),
            "gflop_forward": self.flop("forward") / 1e9,
            "gflop_backward": self.flop("backward") / 1e9,
        }


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Shapes to measure: every combination of the lists.

    Attributes:
        scales: scale lists by name.
        patterns: "causal", "diagonal".
        dtypes: "bf16", "fp16", "fp32".
        batches: B of each scale list by name, or of all others by "".
        heads: several H.
        head_size: D.
        normalised: with and without normalisation of queries and keys.
    """

    scales: dict[str, Scales]
    patterns: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: dict[str, int]
    heads: tuple[int, ...]
    head_size: int
    normalised: tuple[bool, ...]

    def cases(self) -> list[Case]:
        """Every combination."""
        lists = itertools.product(self.dtypes, self.normalised, self.heads, self.patterns, self.scales)
        return [
            Case(
                name=name,
                scales=self.scales[name],
                pattern=pattern,
                dtype=dtype,
                batch=self.batches.get(name, self.batches[""]),
                heads=heads,
                head_size=self.head_size,
                normalised=normalised,
            )
            for dtype, normalised, heads, pattern, name in lists
        ]


def at_resolutions(resolutions: Iterable[int]) -> dict[str, Scales]:
    """Scale lists of some of `RESOLUTIONS`, by name."""
    return {f"{pixels} px": Scales.of(RESOLUTIONS[pixels]) for pixels in resolutions}


H100 = Grid(
    scales=at_resolutions(RESOLUTIONS),
    patterns=("diagonal", "causal"),
    dtypes=("bf16",),
    batches={"": 16, "1024 px": 4},
    heads=(24,),
    head_size=64,
    normalised=(False, True),
)
"""Shapes at which the alternatives were first measured on an H100."""

PAPER = replace(H100, dtypes=("fp16",), batches={"": 16}, heads=(16, 20, 24, 30), normalised=(False,))
"""HMAR supplement B.4, Fig. 11: batch 16, head size 64, as many heads as d16 to d30 have."""

PRESETS = {"paper": PAPER, "h100": H100}

SMALL = Grid(
    scales=at_resolutions([256]),
    patterns=("diagonal", "causal"),
    dtypes=("fp32",),
    batches={"": 1},
    heads=(2,),
    head_size=64,
    normalised=(False, True),
)
"""What a CPU does in seconds."""

DEFAULT = replace(H100, normalised=(True,))
"""What a GPU measures when nothing is said: the operation as the models call it."""


def parse_sides(text: str) -> Scales:
    """Read a scale list such as "1,2,3x4": 3x4 is 3 rows of 4 tokens.

    Raises:
        UserError: anything else, or a list that doesn't grow.
    """
    hint = "give sides that grow, such as 1,2,3x4,8"
    sides: list[tuple[int, int]] = []
    for part in text.split(","):
        rows, _, columns = part.strip().partition("x")
        if not rows.isdecimal() or (columns and not columns.isdecimal()) or part.strip().endswith("x"):
            raise UserError(f"--sides {text}: {part!r} is no side", hint)
        sides.append((int(rows), int(columns or rows)))
    try:
        return Scales.of(sides)
    except ValueError as error:
        raise UserError(f"--sides {text}: {error}", hint) from error


def parse_list(flag: str, text: str, choices: Iterable[str]) -> tuple[str, ...]:
    """Read a list of words such as "bf16,fp16".

    Raises:
        UserError: a word that is none of `choices`.
    """
    known = tuple(choices)
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in known:
            raise UserError(f"{flag} {text}: {word!r} is unknown", f"choose from {', '.join(known)}")
    return words


def parse_counts(flag: str, text: str) -> tuple[int, ...]:
    """Read a list of positive numbers such as "16,24".

    Raises:
        UserError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"{flag} {text}: expected positive whole numbers", f"such as {flag} 16,24")
    return tuple(dict.fromkeys(map(int, words)))


def change(
    grid: Grid,
    *,
    resolutions: str = "",
    sides: Sequence[str] = (),
    pattern: str = "",
    dtypes: str = "",
    batch: int = 0,
    heads: str = "",
    head_size: int = 0,
    normalise: str = "",
) -> Grid:
    """Change parts of a grid, as flags say; empty ones leave it as it is.

    Raises:
        UserError: a flag that cannot be read.
    """
    changed: dict[str, Any] = {}
    if resolutions or sides:
        names = parse_list("--resolutions", resolutions, map(str, RESOLUTIONS)) if resolutions else ()
        changed["scales"] = at_resolutions(map(int, names)) | {text: parse_sides(text) for text in sides}
    if pattern:
        changed["patterns"] = parse_list("--pattern", pattern, PATTERNS)
    if dtypes:
        changed["dtypes"] = parse_list("--dtypes", dtypes, DTYPE_NAMES)
    if batch:
        changed["batches"] = {"": batch}
    if heads:
        changed["heads"] = parse_counts("--heads", heads)
    if head_size:
        changed["head_size"] = head_size
    if normalise:
        changed["normalised"] = tuple(
            word == "on" for word in parse_list("--normalise", normalise, ("on", "off"))
        )
    return replace(grid, **changed)


# Sequence lengths


def lengths_by_resolution() -> list[dict[str, int]]:
    """Tokens of an image at each resolution: VAR and HMAR, and next-token prediction (supplement B.1, Fig. 7)."""
    return [
        {"pixels": pixels, "next_scale": Scales.of(sides).total, "next_token": (pixels // STRIDE) ** 2}
        for pixels, sides in RESOLUTIONS.items()
    ]


def lengths_by_steps(sides: Sequence[int]) -> list[dict[str, int]]:
    """Sequence lengths of VAR and HMAR as sampling steps are added (supplement B.1, Fig. 8).

    A step more is a scale more in VAR, which can have no more than one of each side. The sides that are missing are
    added from the smallest, so that the sequence grows as little as it can. HMAR's steps redraw tokens of the scales
    that are there.

    Args:
        sides: square scales to start from; the last is the largest.
    """
    missing = [side for side in range(1, sides[-1]) if side not in sides]
    hmar = Scales.of(list(sides)).total
    return [
        {
            "steps": len(sides) + extra,
            "extra": extra,
            "var": hmar + sum(side**2 for side in missing[:extra]),
            "hmar": hmar,
        }
        for extra in range(len(missing) + 1)
    ]
