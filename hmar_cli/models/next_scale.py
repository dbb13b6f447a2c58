"""The VAR and HMAR transformer: one module that differs in its attention pattern, and HMAR's masked branch.

Letters: B batch, K scales, n_k tokens of scale k, L = sum of n_k, C width, Z codebook channels, V codebook size.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hmar_kernels import Choice, Pattern, choose, measure
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.models.layers import AdaLN, AdaLNTable, Block, KeyValueCache, OutputHead, ScaleAttention
from hmar_cli.models.scales import Scales


class Condition(NamedTuple):
    """What the transformer takes of classes.

    Attributes:
        embedding: [B, C].
        shared: what the blocks modulate by, the embedding or vectors [B, 6, 1, C] that they share.
        vectors: each block's own vectors [B, 6, 1, C] where they are known.
    """

    embedding: Tensor
    shared: Tensor
    vectors: list[Tensor] | None = None


class MaskedBranch(nn.Module):
    """HMAR's second set of late blocks and its head, which redraw masked tokens of a scale (section D.3).

    Args:
        blocks: the branch's own copy of the last blocks.
        head: its own norm and output layer.
        leak_free: masked tokens are left out before own-scale maps are upsampled, not after.
    """

    def __init__(self, blocks: nn.ModuleList, head: OutputHead, leak_free: bool) -> None:
        super().__init__()
        self.blocks, self.head, self.leak_free = blocks, head, leak_free
        self.mask_embed = nn.Parameter(torch.zeros(head.linear.in_features))


class NextScaleTransformer(nn.Module):
    """Predicts the tokens of every scale from the image so far.

    With the causal pattern it is VAR: a token sees its own and all earlier scales. With the diagonal pattern it is
    HMAR: a token sees its own scale alone, whose input already holds everything generated before it.

    Args:
        scales: the token grids, coarse to fine.
        z_channels: codebook channels Z.
        vocab_size: codebook size V.
        num_classes: classes, not counting the extra "no class" row.
        depth: blocks.
        width: C.
        heads: H.
        pattern: "causal" or "diagonal".
        mlp_ratio: hidden width of the feed-forward over C.
        drop_path_rate: at the last block, rising linearly from 0; None is 0.1 depth / 24.
        shared_adaln: one modulation layer for all blocks plus a table a block.
        gamma_init: factor on the initial weights of the modulation gates.
        attention: implementation of `hmar_kernels`, "auto" or "measure"; see `select_attention`.
        masked_layers: blocks of the masked branch; 0 builds none.
        leak_free: see `MaskedBranch`.
    """

    def __init__(
        self,
        *,
        scales: Scales,
        z_channels: int,
        vocab_size: int,
        num_classes: int,
        depth: int,
        width: int,
        heads: int,
        pattern: Pattern,
        mlp_ratio: float = 4.0,
        drop_path_rate: float | None = None,
        shared_adaln: bool = False,
        gamma_init: float = 1e-5,
        attention: str = "auto",
        masked_layers: int = 0,
        leak_free: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that {heads} heads divide, got {width}")
        self.scales, self.num_classes, self.heads, self.pattern = scales, num_classes, heads, pattern
        self.attention = attention
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.start_embed = nn.Parameter(torch.empty(1, scales.lengths[0], width))
        self.word_embed = nn.Linear(z_channels, width)
        self.level_embed = nn.Embedding(len(scales), width)
        self.pos_embed = nn.Parameter(torch.empty(1, scales.total, width))
        self.shared_adaln = AdaLN(width, 6) if shared_adaln else None
        last = 0.1 * depth / 24 if drop_path_rate is None else drop_path_rate
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio,
                last * i / max(1, depth - 1),
                shared_adaln,
                pattern,
                attention,
            )
            for i in range(depth)
        )
        self.head = OutputHead(width, vocab_size)
        self.masked: MaskedBranch | None = None
        level = torch.cat([torch.full((n,), k) for k, n in enumerate(scales.lengths)])
        self.register_buffer("level", level, persistent=False)  # [L], the scale of each position
        self.initialize(gamma_init)
        if masked_layers:
            self.attach_masked_branch(masked_layers, leak_free)

    def initialize(self, gamma_init: float) -> None:
        """Draw the initial weights (VAR, section 4 and its published initialisation)."""
        width, depth = self.class_embed.embedding_dim, len(self.blocks)
        std = math.sqrt(1 / (3 * width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_embed, std=std)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        with torch.no_grad():
            self.head.linear.weight.mul_(0.02)
            self.head.adaln.linear.weight.mul_(0.5)
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attention.proj.weight.div_(math.sqrt(2 * depth))
                block.feed_forward.fc2.weight.div_(math.sqrt(2 * depth))
                if isinstance(block.adaln, AdaLNTable):
                    vectors = block.adaln.offsets.normal_(std=width**-0.5)  # [6, 1, C]
                else:
                    vectors = block.adaln.linear.weight.unflatten(0, (6, width))  # [6, C, C]
                vectors[:2].mul_(gamma_init)  # the gates
                vectors[2:].mul_(0.5)  # scales and shifts

    def attach_masked_branch(self, layers: int, leak_free: bool = False) -> MaskedBranch:
        """Start the masked branch as a copy of the last `layers` blocks and the head (section D.3).

        Raises:
            ValueError: more layers than blocks.
        """
        if not 1 <= layers <= len(self.blocks):
            raise ValueError(f"expected 1 to {len(self.blocks)} masked layers, got {layers}")
        late = self.blocks[len(self.blocks) - layers :]
        self.masked = MaskedBranch(copy.deepcopy(late), copy.deepcopy(self.head), leak_free)
        self.masked.requires_grad_(True)
        width = self.class_embed.embedding_dim
        nn.init.trunc_normal_(self.masked.mask_embed, std=math.sqrt(1 / (3 * width)))
        return self.masked

    def forward(
        self,
        labels: Tensor,
        inputs: Tensor,
        own: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of all scales at once, each from its true input (teacher forcing).

        Args:
            labels: [B] int64; `num_classes` is "no class".
            inputs: [B, L - n_1, Z], next-scale inputs of scales 2..K.
            own: [B, L - n_1, Z], own-scale maps; given, the masked branch answers.
            mask: [L - n_1] or [B, L - n_1] bool, the masked positions.

        Returns:
            [B, L, V] float32.
        """
        condition = self._condition(labels)
        x = torch.cat([self._start(condition), self._embed(inputs, own, mask)], dim=1)  # [B, L, C]
        x = x + self.level_embed(self.level) + self.pos_embed
        return self._transform(x, condition, self.scales.grids, own is not None)

    def forward_scale(
        self,
        k: int,
        condition: Condition,
        inputs: Tensor | None,
        own: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits of one scale, for sampling.

        Args:
            k: the scale, from 0.
            condition: of B classes, for the branch that answers.
            inputs: [B, n_k, Z], its next-scale input; None for scale 0.
            own: [B, n_k, Z], its own-scale map; given, the masked branch answers.
            mask: [B, n_k] bool, the masked positions.
            cache: of earlier scales, for the causal pattern.

        Returns:
            [B, n_k, V] float32.
        """
        x = self._start(condition) if inputs is None else self._embed(inputs, own, mask)
        x = x + self.level_embed.weight[k] + self.pos_embed[:, self.scales.slice(k)]
        sides = self.scales.grids[: k + 1] if cache is not None else self.scales.grids[k : k + 1]
        return self._transform(x, condition, sides, own is not None, cache)

    def condition(self, labels: Tensor, *, masked: bool = False) -> Condition:
        """What a branch takes of classes [B], computed once for all scales of an image."""
        condition = self._condition(labels)
        blocks, _ = self._branch(masked)
        return condition._replace(vectors=[block.adaln(condition.shared) for block in blocks])

    def select_attention(self, batch: int, dtype: torch.dtype, *, sampling: bool = False) -> Choice:
        """Settle, where the model lies now, which implementation of attention its blocks run; before compilation.

        Args:
            batch: rows of a call.
            dtype: in which queries, keys and values are multiplied.
            sampling: calls compute a scale each, without gradients. An implementation that cannot run is replaced,
                since a checkpoint may come from another machine; the reason says so.

        Raises:
            ValueError: not for sampling, an implementation that cannot run.
        """
        width, device = self.class_embed.embedding_dim, self.pos_embed.device
        size, grids = width // self.heads, self.scales.grids
        replaced = ""
        if self.attention == "measure":
            cached = sampling and self.pattern == "causal"
            choice = measure(
                grids if cached or not sampling else grids[-1:],
                self.pattern,
                batch=batch,
                heads=self.heads,
                head_size=size,
                dtype=dtype,
                device=device,
                queries=self.scales.lengths[-1] if cached else 0,
                normalized=not cached,
                backward=not sampling,
            )
        else:
            place = {"device": device, "dtype": dtype, "head_size": size, "pattern": self.pattern}
            try:
                choice = choose(self.attention, **place)
            except ValueError as error:
                if not sampling:
                    raise
                choice, replaced = choose("auto", **place), f"; {error}"
        for module in self.modules():
            if isinstance(module, ScaleAttention):
                module.implementation = choice.name if self.attention != "auto" and not replaced else "auto"
        return choice._replace(reason=choice.reason + replaced)

    def make_cache(self, batch: int, dtype: torch.dtype) -> KeyValueCache | None:
        """Allocate the key-value cache for `batch` rows; None for the diagonal pattern, which needs none."""
        if self.pattern == "diagonal":
            return None
        width = self.class_embed.embedding_dim
        device = self.pos_embed.device
        return KeyValueCache(
            len(self.blocks), batch, self.scales.total, self.heads, width // self.heads, device, dtype
        )

    def _condition(self, labels: Tensor) -> Condition:
        embedding = self.class_embed(labels)
        return Condition(embedding, embedding if self.shared_adaln is None else self.shared_adaln(embedding))

    def _branch(self, masked: bool) -> tuple[list[Any], OutputHead]:
        """Blocks and head: the shared lower blocks, then one of the two late branches."""
        if not masked:
            return list(self.blocks), self.head
        assert self.masked is not None
        return [
            *self.blocks[: len(self.blocks) - len(self.masked.blocks)],
            *self.masked.blocks,
        ], self.masked.head

    def _start(self, condition: Condition) -> Tensor:
        """Tokens of the first scale, [B, n_1, C]: the class, at the start position."""
        return condition.embedding[:, None] + self.start_embed

    def _embed(self, inputs: Tensor, own: Tensor | None, mask: Tensor | None) -> Tensor:
        """Embed scale inputs [B, n, Z] as tokens [B, n, C], without level and position."""
        if own is None:
            return self.word_embed(inputs)  # type: ignore[no-any-return]
        assert self.masked is not None and mask is not None
        shown = F.linear(own, self.word_embed.weight)
        shown = torch.where(mask[..., None], self.masked.mask_embed.to(shown.dtype), shown)
        return self.word_embed(inputs) + shown  # type: ignore[no-any-return]

    def _transform(
        self,
        x: Tensor,
        condition: Condition,
        sides: tuple[tuple[int, int], ...],
        masked: bool,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Run a branch's blocks and head on x [B, n, C]."""
        blocks, head = self._branch(masked)
        vectors: Sequence[Tensor | None] = condition.vectors or [None] * len(blocks)
        for i, (block, known) in enumerate(zip(blocks, vectors, strict=True)):
            x = block(x, condition.shared, sides, cache, i, known)
        return head(x, condition.embedding)  # type: ignore[no-any-return]
