"""Transformer layers: modulation, attention over scales, feed-forward.

Letters: B batch, L tokens, C width, H heads, D = C / H.
"""

import math

import torch
from hmar_kernels import Pattern, fuses, gated_sum, modulated_norm, scale_attention, unit_heads
from torch import Tensor, nn
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(100)
"""Cap on the learned log of the attention temperature."""


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drop the residual branch x [B, ...] of whole samples with probability `rate`, scaling the rest."""
    if rate == 0.0 or not training:
        return x
    keep = torch.empty(x.shape[0], *[1] * (x.ndim - 1), device=x.device).bernoulli_(1 - rate)
    return x * (keep / (1 - rate)).to(x.dtype)


def modulated(norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise x [B, N, C] by a norm without weights of its own, scale and shift it, for a linear layer to take."""
    if not fuses(x):
        return norm(x) * (1 + scale) + shift  # type: ignore[no-any-return]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return modulated_norm(x, scale, shift, norm.eps, dtype)


class AdaLN(nn.Module):
    """SiLU and a linear layer that turn a condition [B, C] into n modulation vectors [B, n, 1, C]."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(width, vectors * width)

    def forward(self, condition: Tensor) -> Tensor:
        """Compute the modulation vectors."""
        vectors = self.linear(F.silu(condition))  # [B, n C]
        return torch.unflatten(vectors, -1, (self.vectors, 1, -1))


class AdaLNTable(nn.Module):
    """A block's own offsets [n, 1, C] to modulation vectors [B, n, 1, C] that all blocks share (VAR-d36)."""

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(vectors, 1, width))

    def forward(self, shared: Tensor) -> Tensor:
        """Add the offsets to the shared vectors."""
        return shared + self.offsets


class KeyValueCache:
    """Keys and values of all scales so far, for every block: VAR's cache, allocated once at full length.

    Args:
        blocks: number of blocks.
        batch: rows B.
        total: tokens L of the whole sequence.
        heads: H.
        head_size: D.
        device: where it lives.
        dtype: of keys and values.
    """

    def __init__(
        self,
        blocks: int,
        batch: int,
        total: int,
        heads: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (blocks, batch, total, heads, head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)

    def extend(self, block: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, n, H, D] of tokens start..start+n; return all up to there, [B, start + n, H, D]."""
        stop = start + k.shape[1]
        self.keys[block, :, start:stop] = k
        self.values[block, :, start:stop] = v
        return self.keys[block, :, :stop], self.values[block, :, :stop]


class ScaleAttention(nn.Module):
    """Self-attention with L2-normalised queries and keys and a learned temperature per head.

    Args:
        width: C.
        heads: H.
        pattern: which scales a token sees.
        implementation: of `hmar_kernels`.
    """

    def __init__(self, width: int, heads: int, pattern: Pattern, implementation: str) -> None:
        super().__init__()
        self.heads, self.pattern, self.implementation = heads, pattern, implementation
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))  # keys have no bias
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        sides: tuple[tuple[int, int], ...],
        cache: KeyValueCache | None = None,
        block: int = 0,
    ) -> Tensor:
        """Attend within x [B, L, C].

        Args:
            x: tokens, [B, N, C].
            sides: the scales that the keys span; x is the end of them when a cache holds the rest.
            cache: keys and values of earlier scales.
            block: this layer's place in the cache.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # [B, N, 3C]
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        temperature = self.log_scale.clamp(max=MAX_LOG_SCALE).exp()  # [H]
        if cache is None:
            out = scale_attention(
                qkv, sides, self.pattern, head_scale=temperature, implementation=self.implementation
            )
            return self.proj(out.flatten(2))  # type: ignore[no-any-return]
        q, k, v = qkv.unbind(dim=2)  # 3 x [B, N, H, D]
        if fuses(q):
            q, k = unit_heads(q, temperature), unit_heads(k)
        else:
            q = (F.normalize(q.float(), dim=-1) * temperature[:, None]).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        keys, values = cache.extend(block, sum(h * w for h, w in sides) - x.shape[1], k, v)
        out = scale_attention((q, keys, values), sides, self.pattern, implementation=self.implementation)
        return self.proj(out.flatten(2))  # type: ignore[no-any-return]


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Cosines and sines of numbers [...] at `width` / 2 frequencies from 1 down to 1/10000: [..., width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=values.device))
    angles = values[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    """Softmax self-attention of every token to every token.

    Args:
        width: C.
        heads: H.
        dropout: of the attention weights, and of what is projected.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend within x [B, L, C], to the tokens that are `visible`, [L] bool, or to all."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, H, L, D]
        mask = None if visible is None else visible[None, :].expand(x.shape[1], -1)  # [L, L], a view
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=rate)
        y = self.proj(y.transpose(1, 2).flatten(2))  # [B, L, C]
        return F.dropout(y, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between.

    Args:
        width: C.
        hidden: numbers between the layers.
        exact: the GELU itself, not its tanh approximation.
        dropout: behind both layers.
    """

    def __init__(self, width: int, hidden: int, *, exact: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.approximate, self.dropout = "none" if exact else "tanh", dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., C] to [..., C]."""
        y = F.dropout(F.gelu(self.fc1(x), approximate=self.approximate), self.dropout, self.training)
        return F.dropout(self.fc2(y), self.dropout, self.training)


class Block(nn.Module):
    """A modulated transformer block: attention, then feed-forward, each behind an adaptive LayerNorm.

    Args:
        width: C.
        heads: H.
        mlp_ratio: hidden width of the feed-forward over C.
        drop_path_rate: probability that a sample skips a residual branch in training.
        shared_adaln: take modulation vectors that all blocks share, plus a table of this block's own.
        pattern: which scales a token sees.
        implementation: of `hmar_kernels`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        drop_path_rate: float,
        shared_adaln: bool,
        pattern: Pattern,
        implementation: str,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.adaln = AdaLNTable(width, 6) if shared_adaln else AdaLN(width, 6)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = ScaleAttention(width, heads, pattern, implementation)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        sides: tuple[tuple[int, int], ...],
        cache: KeyValueCache | None = None,
        block: int = 0,
        vectors: Tensor | None = None,
    ) -> Tensor:
        """Transform x [B, N, C] under `condition`: [B, C], or shared vectors [B, 6, 1, C].

        `vectors` are what `adaln` makes of it, where the caller knows them.
        """
        vectors = self.adaln(condition) if vectors is None else vectors  # [B, 6, 1, C]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(dim=1)  # 6 x [B, 1, C]
        x = self._add(x, gamma1, self.attention(modulated(self.norm, x, scale1, shift1), sides, cache, block))
        return self._add(x, gamma2, self.feed_forward(modulated(self.norm, x, scale2, shift2)))

    def _add(self, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        """Add the residual branch y."""
        if fuses(x) and not self.training:
            return gated_sum(x, gate, y)
        return x + drop_path(gate * y, self.drop_path_rate, self.training)


class OutputHead(nn.Module):
    """Adaptive LayerNorm and a linear layer to V logits, in float32.

    Args:
        width: C.
        vocab_size: V.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.adaln = AdaLN(width, 2)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor, class_embedding: Tensor) -> Tensor:
        """Map x [B, N, C] and the class embedding [B, C] to logits [B, N, V]."""
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.adaln(class_embedding.float()).unbind(dim=1)  # 2 x [B, 1, C]
            return self.linear(modulated(self.norm, x.float(), scale, shift))  # type: ignore[no-any-return]
