"""Random numbers as a function of (seed, image index, step, position) alone.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) needs no state, so an image
comes out the same whatever the batch size, the number of processes or the order of work.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ORDERS = 1 << 31  # steps from there on are random orders


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a (32 bits in int64) times a 32-bit constant, without overflow."""
    low = (a & 0xFFFF) * constant  # < 2^48
    high = (a >> 16) * constant + (low >> 16)  # < 2^49
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of Philox 4x32-10.

    Args:
        counter: four int64 tensors of one shape (or broadcastable), values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    for r in range(10):
        k0, k1 = ((key[i] + r * _KEY_STEPS[i]) & _WORD for i in range(2))
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _open_unit(word: Tensor) -> Tensor:
    """Words below 2^32 as float32 in (0, 1)."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers of two uniform ones in (0, 1)."""
    radius = (-2 * u.log()).sqrt()
    return radius * (2 * math.pi * v).cos(), radius * (2 * math.pi * v).sin()


class PhiloxNoise:
    """Random numbers for a batch of images.

    Args:
        seed: in [0, 2^64).
        images: [B] int64, each image's index in the whole run.
        positions: of each step from the first on, where that is known: their numbers are computed at once.
    """

    def __init__(self, seed: int, images: Tensor, positions: Sequence[int] = ()) -> None:
        self.key = (seed & _WORD, seed >> 32 & _WORD)
        self.images = images
        self.known = self._uniform(range(len(positions)), positions)

    def uniform(self, step: int, positions: int) -> Tensor:
        """Numbers in (0, 1) for `positions` positions of every image at one step, [B, positions] float32."""
        return self.known[step] if step < len(self.known) else self._uniform([step], [positions])[0]

    def _uniform(self, steps: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, ...]:
        """`uniform` of several steps, each with its number of positions."""
        if not steps:
            return ()
        image = self.images[:, None]
        position = torch.cat([torch.arange(n, device=image.device) for n in positions])  # [sum of n]
        step = torch.cat([image.new_full((n,), step) for step, n in zip(steps, positions, strict=True)])
        word, *_ = philox((position, step, image & _WORD, image >> 32), self.key)  # [B, sum of n]
        return tuple(torch.split(_open_unit(word), list(positions), dim=1))

    def order(self, phase: int, n: int) -> Tensor:
        """Permutations [B, n] int64 of the n tokens of a phase."""
        return self.uniform(_ORDERS + phase, n).argsort(dim=1, stable=True)

    def normal(self, phase: int, step: int, draws: range, places: Tensor, channels: int) -> Tensor:
        """Standard normal numbers, a function of (seed, image, phase, step, draw, place, channel) alone.

        Args:
            phase: 0 or 1.
            step: of the phase, below 2^14.
            draws: numbers of draws within the step, below 2^14.
            places: [B, m] int64, places of the tokens.
            channels: C.

        Returns:
            [len(draws), B, m, C] float32.
        """
        quads = -(-channels // 4)  # a counter gives four numbers
        word = (((phase << 14) + step) << 14) + torch.arange(draws.start, draws.stop, device=places.device)
        quad = torch.arange(quads, device=places.device)
        position = places[..., None] * quads + quad  # [B, m, q]
        image = self.images[:, None, None]
        words = philox((position, word[:, None, None, None], image & _WORD, image >> 32), self.key)
        a, b, c, d = (_open_unit(each) for each in words)  # [draws, B, m, q] each
        numbers = torch.stack([*_box_muller(a, b), *_box_muller(c, d)], dim=-1)  # [draws, B, m, q, 4]
        return numbers.flatten(-2)[..., :channels]

    def draw(self, probabilities: Tensor, step: int) -> Tensor:
        """Draw one token a position by inverting the cumulative distribution.

        Args:
            probabilities: [B, n, V], non-negative; a token of probability 0 is never drawn.
            step: number of this draw within the image.

        Returns:
            [B, n] int64.
        """
        cumulative = probabilities.cumsum(dim=-1)
        target = self.uniform(step, probabilities.shape[1])[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp_(
            max=probabilities.shape[-1] - 1
        )
