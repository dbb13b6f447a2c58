"""Diffusion heads: networks that predict the noise in a token, given the transformer's output for it.

`MlpHead` sees each token alone (MAR section 3.3), `TransformerHead` all tokens of an image (Hi-MAR section 3.3).
Both map a noised token grid, timesteps and conditional tokens to the predicted noise.

Letters: B batch, n tokens, C latent channels, D width of the conditional tokens, W width of the head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.models.layers import FeedForward, SelfAttention, sinusoid


def sincos_table(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions [rows * columns, width], row-major; the first half of the channels encodes the column.

    Each half is sines then cosines of the index times 10000^(-k / (width / 4)).

    Raises:
        ValueError: a width that 4 does not divide.
    """
    if width % 4:
        raise ValueError(f"expected a width divisible by 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(places: Tensor) -> Tensor:
        angles = places.double().flatten()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([encode(column), encode(row)], dim=1).float()


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a timestep, then two linear layers (DiT, section 3.2)."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(self.FEATURES, width)
        self.fc2 = nn.Linear(width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Map timesteps [...] on the scale 0 to 999 to [..., W]."""
        return self.fc2(F.silu(self.fc1(sinusoid(t, self.FEATURES))))  # type: ignore[no-any-return]


def modulation(width: int, vectors: int) -> nn.Linear:
    """A linear layer to `vectors` modulation vectors, zero at first."""
    layer = nn.Linear(width, vectors * width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class MlpBlock(nn.Module):
    """Modulated LayerNorm and two linear layers beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.modulation = modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x [B, n, W] under a condition [B, n, W] that SiLU was applied to."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        y = self.norm(x) * (1 + scale) + shift
        return x + gate * self.fc2(F.silu(self.fc1(y)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Modulated self-attention and feed-forward, each token with its own six modulations (Hi-MAR eq. 3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.feed_forward = FeedForward(width, 4 * width)
        self.modulation = modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x [B, n, W] under a condition [B, n, W] that SiLU was applied to."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.feed_forward(self.norm(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class DiffusionHead(nn.Module):
    """What both heads share: embeddings in front of the blocks, a modulated projection behind them.

    Args:
        channels: C.
        cond_width: D.
        width: W.
        out_channels: numbers a token gets.
        blocks: what lies between.
    """

    learned_variance: bool  # whether the variance is predicted too
    global_context: bool  # whether a token sees the others
    fast: "tuple[DiffusionHead] | None" = None  # what samples instead: compiled, no submodule

    def __init__(
        self, channels: int, cond_width: int, width: int, out_channels: int, blocks: list[nn.Module]
    ) -> None:
        super().__init__()
        self.input = nn.Linear(channels, width)
        self.condition = nn.Linear(cond_width, width)
        self.time_embed = TimeEmbedding(width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = modulation(width, 2)
        self.output = nn.Linear(width, out_channels)
        for name, layer in self.named_modules():
            if (
                isinstance(layer, nn.Linear)
                and not name.startswith("time_embed")
                and "modulation" not in name
            ):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.output.weight)

    def _embed(self, x: Tensor) -> Tensor:
        return self.input(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predict the noise.

        Args:
            x: noised tokens [B, n, C].
            t: timesteps on the scale 0 to 999, one an image [B, 1] or a token [B, n] (or broadcast).
            z: conditional tokens [B, n, D].

        Returns:
            The noise [B, n, C] float32, and the raw variance value [B, n, C] where the variance is learned.
        """
        y = self._embed(x)  # [B, n, W]
        condition = F.silu(self.time_embed(t) + self.condition(z))  # [B, n, W]
        for block in self.blocks:
            y = block(y, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        y = self.output(self.norm(y) * (1 + scale) + shift).float()  # [B, n, C or 2C]
        if not self.learned_variance:
            return y, None
        noise, value = y.chunk(2, dim=-1)
        return noise, value


class MlpHead(DiffusionHead):
    """A small MLP for each token by itself, which also predicts the variance.

    Args:
        channels: C.
        cond_width: D.
        depth: blocks.
        width: W.
    """

    learned_variance, global_context = True, False

    def __init__(self, *, channels: int, cond_width: int, depth: int, width: int) -> None:
        super().__init__(channels, cond_width, width, 2 * channels, [MlpBlock(width) for _ in range(depth)])


class TransformerHead(DiffusionHead):
    """A diffusion transformer over all tokens of an image, known and unknown; its variance is fixed.

    Args:
        channels: C.
        cond_width: D.
        depth: blocks.
        width: W.
        heads: attention heads.
        grid: rows and columns of the tokens.
    """

    learned_variance, global_context = False, True
    pos_embed: Tensor

    def __init__(
        self, *, channels: int, cond_width: int, depth: int, width: int, heads: int, grid: tuple[int, int]
    ) -> None:
        blocks: list[nn.Module] = [TransformerBlock(width, heads) for _ in range(depth)]
        super().__init__(channels, cond_width, width, channels, blocks)
        self.register_buffer("pos_embed", sincos_table(*grid, width), persistent=False)  # [n, W]

    def _embed(self, x: Tensor) -> Tensor:
        return self.input(x) + self.pos_embed  # type: ignore[no-any-return]
