"""MAR and Hi-MAR: masked autoregression over continuous tokens, in one or two phases (Hi-MAR, section 3).

An encoder sees the context (class or text) and the known tokens alone; a decoder sees mask tokens in the places
of the others, and its output, the conditional tokens z, tells a diffusion head what to draw there. MAR has one
phase over the dense tokens. Hi-MAR predicts a few low-resolution pivots in a first phase; what the second one
sees of them are their conditional tokens.

Letters: B batch, P phases, S pivots, N dense tokens, L = S + N places (pivots first), V visible tokens, G context
tokens, C latent channels, D width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.models.heads import DiffusionHead
from hmar_cli.models.layers import FeedForward, SelfAttention, sinusoid
from hmar_cli.models.text import JointTextEncoder

Pivots = Literal["none", "visual", "conditional"]
ScaleVectorKind = Literal["none", "table", "sinusoidal"]
Grid = tuple[int, int]


class ScaleVector(nn.Module):
    """The vector v that tells all blocks of a stack which phase it is (Hi-MAR, section 3.2, eq. 2).

    "table" is the released form: an embedding of the phase, SiLU and a linear layer to 4 D. "sinusoidal" is the
    paper's: a sinusoidal embedding of the phase and an MLP to 6 D.

    Args:
        width: D.
        phases: P.
        kind: which form.
    """

    waves: Tensor

    def __init__(self, width: int, phases: int, kind: Literal["table", "sinusoidal"]) -> None:
        super().__init__()
        self.kind = kind
        if kind == "table":
            self.embed = nn.Embedding(phases, width)
            self.linear = nn.Linear(width, 4 * width)
        else:
            self.register_buffer("waves", sinusoid(torch.arange(phases), width), persistent=False)
            self.fc1 = nn.Linear(width, width)
            self.fc2 = nn.Linear(width, 6 * width)

    def forward(self, phase: int) -> Tensor:
        """The vector of a phase, [4 D] or [6 D]."""
        if self.kind == "table":
            return self.linear(F.silu(self.embed.weight[phase]))  # type: ignore[no-any-return]
        return self.fc2(F.silu(self.fc1(self.waves[phase])))  # type: ignore[no-any-return]


class BlockModulation(nn.Module):
    """A block's own view of the scale vector: v * scale + shift (a and b of Hi-MAR's eq. 2).

    The released form has a pair for each phase and no additive shift among the modulations; its gates start at 1.
    The paper's has one pair; as in adaLN-Zero its gates start at 0.
    """

    def __init__(self, width: int, phases: int, kind: Literal["table", "sinusoidal"]) -> None:
        super().__init__()
        if kind == "table":
            start = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(width)  # scale, gate, scale, gate
            self.shift = nn.Parameter(start.repeat(phases, 1))  # [P, 4 D]
            self.scale = nn.Parameter(torch.zeros(phases, 4 * width))
        else:
            start = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]).repeat_interleave(width)
            self.shift = nn.Parameter(start)  # [6 D]: alpha, beta, gamma of attention and feed-forward
            self.scale = nn.Parameter(torch.zeros(6 * width))
        self.kind = kind

    def forward(self, v: Tensor, phase: int) -> tuple[Tensor, ...]:
        """Factors, offsets and gates [D] of attention, then of the feed-forward: six vectors."""
        if self.kind == "table":
            scale1, gate1, scale2, gate2 = (v * self.scale[phase] + self.shift[phase]).chunk(4)
            nothing = torch.zeros_like(scale1)
            return 1 + scale1, nothing, gate1, 1 + scale2, nothing, gate2
        return (v * self.scale + self.shift).chunk(6)


class Block(nn.Module):
    """A pre-norm transformer block, modulated by the scale vector where there is one."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, dropout: float, phases: int, kind: ScaleVectorKind
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width, round(width * mlp_ratio), exact=True, dropout=dropout)
        self.modulation = None if kind == "none" else BlockModulation(width, phases, kind)

    def forward(self, x: Tensor, v: Tensor | None, phase: int, visible: Tensor | None = None) -> Tensor:
        """Transform x [B, n, D] under the scale vector v; tokens see those that are `visible`, [n] bool."""
        if self.modulation is None or v is None:
            x = x + self.attention(self.norm1(x), visible)
            return x + self.feed_forward(self.norm2(x))  # type: ignore[no-any-return]
        alpha1, beta1, gamma1, alpha2, beta2, gamma2 = self.modulation(v, phase)
        x = x + gamma1 * self.attention(alpha1 * self.norm1(x) + beta1, visible)
        return x + gamma2 * self.feed_forward(alpha2 * self.norm2(x) + beta2)  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Encoder or decoder: learned positions of each phase, blocks, a norm.

    Args:
        places: G + L.
        depth: blocks.
        width: D.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward over D.
        dropout: of attention and feed-forward.
        phases: P.
        scale_vector: its form.
    """

    def __init__(
        self,
        *,
        places: int,
        depth: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        phases: int,
        scale_vector: ScaleVectorKind,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(0.02 * torch.randn(phases, places, width))
        self.scale_vector = None if scale_vector == "none" else ScaleVector(width, phases, scale_vector)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, dropout, phases, scale_vector) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, phase: int, visible: Tensor | None = None) -> Tensor:
        """Run the blocks on x [B, n, D], of whose tokens those are seen that are `visible`, [n] bool."""
        v = None if self.scale_vector is None else self.scale_vector(phase)
        for block in self.blocks:
            x = block(x, v, phase, visible)
        return self.norm(x)  # type: ignore[no-any-return]


def gather_tokens(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of x [B, n, C] at places [B, m]: [B, m, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """x [B, n, C] with `tokens` [B, m, C] at places [B, m]."""
    return x.scatter(1, places[..., None].expand(-1, -1, x.shape[-1]), tokens.to(x.dtype))


class MaskedTransformer(nn.Module):
    """MAR (pivots "none") or Hi-MAR with its diffusion heads.

    Args:
        grid: rows and columns of the dense tokens.
        pivot_grid: rows and columns of the pivots; not used without pivots.
        channels: C.
        pivots: what phase 2 is given of phase 1: its conditional tokens, its latents ("visual"), or no phase 1.
        num_classes: classes; with `text_width` there are none.
        text_width: width of text embeddings, 0 for a class-conditional model.
        text: a text encoder to be trained along; None where embeddings come from outside.
        context_length: G, tokens in front: copies of the class embedding, or the text's.
        encoder_depth: its blocks.
        decoder_depth: its blocks.
        width: D.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward over D.
        dropout: of attention and feed-forward.
        scale_vector: form of the scale vector, or "none".
        pivot_head: phase 1's diffusion head, None for MAR.
        dense_head: phase 2's, or MAR's.

    Raises:
        ValueError: pivots without a grid or without a head of their own.
    """

    def __init__(
        self,
        *,
        dense_head: DiffusionHead,
        pivot_head: DiffusionHead | None,
        grid: Grid,
        pivot_grid: Grid | None,
        channels: int,
        pivots: Pivots = "conditional",
        num_classes: int = 1000,
        text_width: int = 0,
        text: JointTextEncoder | None = None,
        context_length: int = 64,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        width: int = 768,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        scale_vector: ScaleVectorKind = "table",
    ) -> None:
        super().__init__()
        if pivots != "none" and (pivot_grid is None or pivot_head is None):
            raise ValueError("expected a pivot grid and a pivot head for a model with pivots, got none")
        self.grid, self.pivot_grid = grid, pivot_grid if pivots != "none" else None
        self.channels, self.pivots = channels, pivots
        self.num_classes, self.context_length = num_classes, context_length
        self.pivot_count = 0 if self.pivot_grid is None else math.prod(self.pivot_grid)  # S
        self.phases = 1 if pivots == "none" else 2
        places = self.pivot_count + math.prod(grid)  # L
        stack = {
            "places": context_length + places,
            "width": width,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "phases": self.phases,
            "scale_vector": scale_vector,
        }
        self.null_embed = nn.Parameter(torch.zeros(width))  # stands for "no class", "no text"
        self.class_embed = nn.Embedding(num_classes, width) if not text_width else None
        self.text = text
        self.text_proj = nn.Linear(text_width, width) if text_width else None
        self.token_proj = nn.Linear(channels, width)
        self.token_norm = nn.LayerNorm(width, eps=1e-6)
        self.encoder = Stack(depth=encoder_depth, **stack)  # type: ignore[arg-type]
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(self.phases, places if pivots != "none" else 1, width))
        self.decoder = Stack(depth=decoder_depth, **stack)  # type: ignore[arg-type]
        self.head_pos_embed = nn.Parameter(torch.zeros(places, width))
        if self.pivot_grid is not None:
            self.pivot_proj = nn.Linear(channels, width)
            self.empty_pivots = nn.Parameter(torch.zeros(self.pivot_count, channels))
        self.conditional_proj = nn.Linear(width, width) if pivots == "conditional" else None
        _initialize(self)
        self.pivot_head = pivot_head if self.pivot_grid is not None else None
        self.dense_head = dense_head

    def context(self, condition: Tensor | None) -> Tensor:
        """Context tokens [B, G, D] of conditions.

        Args:
            condition: classes [B] int64; or token ids [B, G] int64 for a text encoder of its own; or text
                embeddings [B, G, E]. None is "no condition", [1, G, D].
        """
        if condition is None:
            return self.null_embed.expand(1, self.context_length, -1)
        if self.class_embed is not None:
            return self.class_embed(condition)[:, None].expand(-1, self.context_length, -1)  # type: ignore[no-any-return]
        assert self.text_proj is not None
        return self.text_proj(condition if self.text is None else self.text(condition))  # type: ignore[no-any-return]

    def drop(self, context: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Replace context tokens [B, G, D] by "no condition": those of `dropped` images [B] bool, or all."""
        nothing = self.null_embed.to(context.dtype)
        if dropped is None:
            return nothing.expand_as(context)
        return torch.where(dropped[:, None, None], nothing, context)

    def pivot_phase(
        self, context: Tensor, known: Tensor, places: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """Phase 1: conditional tokens of the pivots.

        Args:
            context: [B, G, D].
            known: visible pivots [B, V, C].
            places: where they are, [B, V] int64 below S.
            visible: which of them are visible after all, [V] bool; the others only fill the room.

        Returns:
            [B, S, D].
        """
        encoded = self.encode(context, self.pivot_proj(known), places, phase=0, visible=visible)
        return self.decode(encoded, places, phase=0, visible=visible)[:, : self.pivot_count]

    def dense_phase(
        self,
        context: Tensor,
        guides: Tensor | None,
        known: Tensor,
        places: Tensor,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Phase 2, or MAR's only one: conditional tokens of the dense tokens.

        Args:
            context: [B, G, D].
            guides: what is known of the pivots, [B, S, D] (see `guides`); None for MAR.
            known: visible dense tokens [B, V, C].
            places: where they are, [B, V] int64 below N.
            visible: as in `pivot_phase`.

        Returns:
            [B, N, D].
        """
        x, places = self.token_proj(known), places + self.pivot_count
        if guides is not None:
            x = torch.cat([guides.to(x.dtype), x], dim=1)  # [B, S + V, D]
            every = torch.arange(self.pivot_count, device=x.device).expand(len(x), -1)
            places = torch.cat([every, places], dim=1)
            if visible is not None:
                visible = F.pad(visible, (self.pivot_count, 0), value=True)  # [S + V]
        encoded = self.encode(context, x, places, phase=self.phases - 1, visible=visible)
        return self.decode(encoded, places, phase=self.phases - 1, visible=visible)[:, self.pivot_count :]

    def guides(self, pivots: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Embed phase 1's result for phase 2, [B, S, D].

        Args:
            pivots: conditional tokens [B, S, D], or latents [B, S, C] for a model with visual pivots.
            hidden: [B, S] bool, pivots that are replaced by the learned empty ones.
        """
        shown = self.pivot_proj(pivots) if self.conditional_proj is None else self.conditional_proj(pivots)
        if hidden is None:
            return shown  # type: ignore[no-any-return]
        return torch.where(hidden[..., None], self.pivot_proj(self.empty_pivots), shown)

    def encode(
        self, context: Tensor, x: Tensor, places: Tensor, phase: int, visible: Tensor | None = None
    ) -> Tensor:
        """Encode context and visible tokens x [B, V, D]: [B, G + V, D]."""
        position = self.encoder.pos_embed[phase]  # [G + L, D]
        x = torch.cat(
            [context + position[: self.context_length], x + position[self.context_length :][places]], dim=1
        )
        if visible is not None:
            visible = F.pad(visible, (self.context_length, 0), value=True)  # [G + V]
        return self.encoder(self.token_norm(x), phase, visible)  # type: ignore[no-any-return]

    def decode(self, encoded: Tensor, places: Tensor, phase: int, visible: Tensor | None = None) -> Tensor:
        """Conditional tokens of all places, [B, L, D]; mask tokens stand where nothing is visible."""
        y = self.decoder_embed(encoded)  # [B, G + V, D]
        total = len(self.head_pos_embed)
        masks = self.mask_token[phase].to(y.dtype).expand(len(y), total, -1)  # [B, L, D]
        seen = y[:, self.context_length :]  # [B, V, D]
        if visible is not None:
            seen = torch.where(visible[:, None], seen, gather_tokens(masks, places))
        tokens = scatter_tokens(masks, places, seen)
        x = torch.cat([y[:, : self.context_length], tokens], dim=1) + self.decoder.pos_embed[phase]
        x = self.decoder(x, phase)[:, self.context_length :]  # [B, L, D]
        return x + self.head_pos_embed  # type: ignore[no-any-return]


def _initialize(model: MaskedTransformer) -> None:
    """Draw initial weights: Xavier for linear layers, 0.02 for embeddings; heads and text encoder have their own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("text."):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    tables: list[Tensor] = [model.null_embed, model.mask_token, model.head_pos_embed]
    if model.class_embed is not None:
        tables.append(model.class_embed.weight)
    if model.pivot_grid is not None:
        tables.append(model.empty_pivots)
    for table in tables:
        nn.init.normal_(table, std=0.02)
