"""Training MAR and Hi-MAR: masked autoregression with diffusion losses, in one or two phases.

Letters: B batch, S pivots, N dense tokens, M masked ones, R repeats, C latent channels, D width of
the transformer, G context tokens.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hmar_cli.models.diffusion import STEPS, Diffusion
from hmar_cli.models.heads import DiffusionHead
from hmar_cli.models.masked import MaskedTransformer, gather_tokens
from hmar_cli.settings import MaskedArObjective, Masking
from hmar_cli.tokenizers.kl import sample_posterior
from hmar_cli.training.objective import Objective


def mask_ratio(law: Masking, u: float, lowest: float = 0.7) -> float:
    """Share of tokens that are masked, by the quantile function of a law.

    Args:
        law: "truncated-normal", the left half of a normal around 1 of deviation 0.25, from `lowest` on (MAR);
            "cosine" (MaskGIT; Hi-MAR section 4.2); "beta", Beta(4, 1) (Hi-MAR section 4.2, text-to-image).
        u: in [0, 1).
        lowest: smallest share of the truncated normal.
    """
    if law == "cosine":
        return math.sin(math.pi / 2 * u)
    if law == "beta":
        return float(u**0.25)
    normal = NormalDist(1.0, 0.25)
    low = normal.cdf(lowest)
    return min(normal.inv_cdf(low + u * (0.5 - low)), 1.0) if u > 0 else lowest


def masked_count(total: int, law: Masking, u: float) -> int:
    """How many of `total` tokens are masked, at least one."""
    return max(1, math.ceil(total * mask_ratio(law, u)))


def pivot_drop(elapsed: float, keep: float, warmup: float) -> float:
    """Probability that an image's pivots are hidden from phase 2 in training: 1 at first, 1 - keep in the end.

    Args:
        elapsed: what has passed, in epochs or as a share of training.
        keep: share of images that see their pivots in the end.
        warmup: when that is reached, in the unit of `elapsed`.
    """
    return 1 - keep * (min(1.0, elapsed / warmup) if warmup else 1.0)


class Count(NamedTuple):
    """How many of a phase's n tokens are masked in a step.

    Where shapes have to be fixed before the count is known, tokens get room to spare, and which of them count is
    decided on the device.

    Attributes:
        masked: an int, or an int64 scalar on the device.
        hidden: room for masked tokens, M.
        seen: room for visible ones, V; M + V = n without room to spare.
    """

    masked: int | Tensor
    hidden: int
    seen: int

    @classmethod
    def exact(cls, masked: int, total: int) -> "Count":
        """Without room to spare."""
        return cls(masked, masked, total - masked)

    @classmethod
    def roomy(cls, masked: Tensor, seen: int, total: int) -> "Count":
        """For a count on the device with at most `seen` visible tokens (see `room_for`)."""
        return cls(masked, min(total, total - seen + room_step(total)), seen)


def room_step(total: int) -> int:
    """Steps in which the room for visible tokens grows: eighths, for few shapes and little waste."""
    return max(4, total // 8)


def room_for(seen: int, total: int) -> int:
    """Room for `seen` visible tokens of `total`, at least one step."""
    step = room_step(total)
    return min(total, max(1, math.ceil(seen / step)) * step)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one phase in one step.

    Attributes:
        order: [B, n] int64, permutations; the first `count.masked` places of each are masked.
        count: how many are masked.
        dropped: [B] bool, conditions that are left out.
        t: timesteps, [R B, M] of an MLP head or [R B, 1] of a Transformer head.
        noise: [R B, M, C] or [R B, n, C].
    """

    order: Tensor
    count: Count
    dropped: Tensor
    t: Tensor
    noise: Tensor

    @property
    def masked_places(self) -> Tensor:
        """Masked places [B, M], with those that fill the room behind them."""
        return self.order[:, : self.count.hidden]

    @property
    def visible_places(self) -> Tensor:
        """The other places [B, V], with those that fill the room in front of them."""
        return self.order[:, self.order.shape[1] - self.count.seen :]

    @property
    def visible(self) -> Tensor | None:
        """Which of `visible_places` are visible, [V] bool; None is all."""
        if isinstance(self.count.masked, int):
            return None
        total = self.order.shape[1]
        return torch.arange(total - self.count.seen, total, device=self.order.device) >= self.count.masked

    def is_masked(self) -> Tensor:
        """Whether a place is masked, [B, n] bool."""
        first = torch.arange(self.order.shape[1], device=self.order.device) < self.count.masked  # [n]
        return torch.zeros_like(self.order, dtype=torch.bool).scatter(
            1, self.order, first.expand_as(self.order)
        )


class MaskedArTraining(Objective):
    """The diffusion losses of both phases (Hi-MAR sections 3.1 to 3.3; MAR, eq. 1).

    Phase 1's conditional tokens reach phase 2 without gradient, and only those of masked pivots: where a pivot
    was visible, and for some images everywhere, phase 2 gets learned empty pivots instead.

    Args:
        model: the transformer to train.
        settings: masking laws, repeats and weights; MAR's loss has no weight.
        latent_scale: factor of the tokenizer's latents.
    """

    graphable = True

    def __init__(self, model: MaskedTransformer, settings: MaskedArObjective, latent_scale: float) -> None:
        super().__init__()
        self.networks = {"model": model}
        self.model, self.settings, self.latent_scale = model, settings, latent_scale
        self.diffusion = Diffusion()

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """No decay for the diffusion heads and for what has one dimension, but for the null embedding."""
        if name.startswith(("pivot_head.", "dense_head.")):
            return True
        return name != "null_embed" and super().undecayed(name, parameter)

    def compile_networks(self) -> None:
        """Compile the blocks of the transformer, which share one compiled form, and the heads.

        How many tokens they see changes all the time.
        """
        model = self.model
        for block in (*model.encoder.blocks, *model.decoder.blocks):
            block.compile(dynamic=True)
        for head in (model.pivot_head, model.dense_head):
            if head is not None:
                head.compile(dynamic=True)

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch.

        Args:
            batch: "moments" [B, 2Z, h, w], for pivots "pivot_moments" [B, 2Z, h', w'], and as the condition
                "label" [B] or "text" (ids or embeddings).
            progress: share of training that lies behind.
        """
        counts = [Count.exact(masked, total) for masked, total in self.draw_counts()]
        return self.losses(batch, counts, self.pivot_drop(progress))

    def draw_shapes(self, progress: float) -> tuple[Hashable, dict[str, float]]:
        """Draw the counts of masked tokens; the shapes are the rooms for visible ones."""
        drawn = self.draw_counts()
        numbers: dict[str, float] = {f"masked_{i}": masked for i, (masked, _) in enumerate(drawn)}
        rooms = tuple(room_for(total - masked, total) for masked, total in drawn)
        return rooms, {**numbers, "pivot_drop": self.pivot_drop(progress)}

    def forward_shapes(self, batch: dict[str, Tensor], shapes: Hashable) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward` under what `draw_shapes` drew."""
        assert isinstance(shapes, tuple)
        counts = [
            Count.roomy(batch[f"masked_{i}"].long(), room, total)
            for i, (room, total) in enumerate(zip(shapes, self.totals(), strict=True))
        ]
        return self.losses(batch, counts, batch["pivot_drop"])

    def totals(self) -> list[int]:
        """Tokens of each phase, the dense ones last."""
        grids = [*([self.model.pivot_grid] if self.model.pivot_grid else []), self.model.grid]
        return [rows * columns for rows, columns in grids]

    def draw_counts(self) -> list[tuple[int, int]]:
        """Masked tokens and all tokens of each phase.

        They are drawn on the host, so that nothing waits for the device, and are the same on all processes, so that
        none waits for the one with the most visible tokens; each step's law is that of the released code, where
        every process draws its own.
        """
        laws = [self.settings.pivot_masking, self.settings.dense_masking][-len(self.totals()) :]
        return [
            (masked_count(total, law, torch.rand((), generator=self.shared).item()), total)
            for total, law in zip(self.totals(), laws, strict=True)
        ]

    def pivot_drop(self, progress: float) -> float:
        """See the function of this name."""
        return pivot_drop(progress, self.settings.pivot_keep, self.settings.pivot_keep_warmup)

    def losses(
        self, batch: dict[str, Tensor], counts: list[Count], chance: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch.

        Args:
            batch: see `forward`.
            counts: masked tokens of each phase.
            chance: probability that an image's pivots are hidden from phase 2.
        """
        dense = self.latents(batch["moments"])  # [B, N, C]
        context = self.model.context(batch["text" if self.model.class_embed is None else "label"])
        dense_draws = self.draw(dense, self.model.dense_head, counts[-1])
        if self.model.pivot_head is None:
            loss = self.dense_loss(dense, context, None, dense_draws)
            return loss, {"loss": loss.detach()}
        pivots = self.latents(batch["pivot_moments"])  # [B, S, C]
        pivot_draws = self.draw(pivots, self.model.pivot_head, counts[0])
        without_pivots = torch.rand(len(dense), device=dense.device) < chance  # [B]
        return self.two_phases(pivots, dense, context, pivot_draws, dense_draws, without_pivots)

    def two_phases(
        self,
        pivots: Tensor,
        dense: Tensor,
        context: Tensor,
        pivot_draws: Draws,
        dense_draws: Draws,
        without_pivots: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of Hi-MAR.

        Args:
            pivots: latents [B, S, C].
            dense: latents [B, N, C].
            context: [B, G, D].
            pivot_draws: random numbers of phase 1.
            dense_draws: of phase 2.
            without_pivots: [B] bool, images whose pivots phase 2 does not see.
        """
        model, places = self.model, pivot_draws.visible_places
        assert model.pivot_head is not None
        known = gather_tokens(pivots, places)  # [B, V, C]
        shown = model.drop(context, pivot_draws.dropped)
        z = model.pivot_phase(shown, known, places, pivot_draws.visible)  # [B, S, D]
        pivot_loss = self.diffusion_loss(model.pivot_head, pivots, z, pivot_draws)
        empty = without_pivots[:, None].expand(pivots.shape[:2])  # [B, S]
        if model.pivots == "conditional":
            guides = model.guides(z.detach(), empty | ~pivot_draws.is_masked())
        else:
            guides = model.guides(pivots, empty)
        dense_loss = self.dense_loss(dense, context, guides, dense_draws)
        loss = self.settings.pivot_weight * pivot_loss + self.settings.dense_weight * dense_loss
        metrics = {"loss": loss, "pivot_loss": pivot_loss, "dense_loss": dense_loss}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def dense_loss(self, dense: Tensor, context: Tensor, guides: Tensor | None, draws: Draws) -> Tensor:
        """Loss of phase 2, or of MAR."""
        context, places = self.model.drop(context, draws.dropped), draws.visible_places
        known = gather_tokens(dense, places)  # [B, V, C]
        z = self.model.dense_phase(context, guides, known, places, draws.visible)  # [B, N, D]
        return self.diffusion_loss(self.model.dense_head, dense, z, draws)

    def diffusion_loss(self, head: DiffusionHead, tokens: Tensor, z: Tensor, draws: Draws) -> Tensor:
        """Noise-prediction error of masked tokens.

        An MLP head is given the masked tokens alone, each with its own timestep; a Transformer head all tokens of
        an image at one timestep, of which the known ones count as zeros in the mean.

        Args:
            head: the phase's head.
            tokens: latents [B, n, C].
            z: conditional tokens [B, n, D].
            draws: of the phase.
        """
        repeats = self.settings.repeats
        if not head.global_context:
            places = draws.masked_places
            tokens, z = gather_tokens(tokens, places), gather_tokens(z, places)  # [B, M, C], [B, M, D]
        tokens, z = tokens.repeat(repeats, 1, 1), z.repeat(repeats, 1, 1)  # [R B, ...]
        state = self.diffusion.q_sample(tokens, draws.t, draws.noise)
        predicted, value = head(state, draws.t, z)
        error = (draws.noise - predicted).square().mean(dim=-1)  # [R B, n or M]
        if value is not None and self.settings.variational:
            error = error + self.diffusion.vlb_terms(
                predicted, value, tokens, state, draws.t.expand(error.shape)
            )
        if head.global_context:
            error = error * draws.is_masked().repeat(repeats, 1)
        elif not isinstance(draws.count.masked, int):  # only the masked ones of those in the room count
            first = torch.arange(error.shape[1], device=error.device) < draws.count.masked  # [M]
            error = error * first * (error.shape[1] / draws.count.masked)
        return error.mean()  # type: ignore[no-any-return]

    def latents(self, moments: Tensor) -> Tensor:
        """Draw from the posterior [B, 2Z, h, w], scale, and put in a row: [B, h w, C]."""
        mean = moments[:, : moments.shape[1] // 2]
        latents: Tensor = sample_posterior(moments, torch.randn_like(mean)) * self.latent_scale
        return latents.flatten(2).transpose(1, 2).contiguous()

    def draw(self, tokens: Tensor, head: DiffusionHead, count: Count) -> Draws:
        """Draw a phase's random numbers."""
        batch, total, channels = tokens.shape
        device, rows = tokens.device, self.settings.repeats * batch
        n = total if head.global_context else count.hidden
        return Draws(
            order=torch.rand(batch, total, device=device).argsort(dim=1),
            count=count,
            dropped=torch.rand(batch, device=device) < self.settings.label_drop,
            t=torch.randint(STEPS, (rows, 1 if head.global_context else n), device=device),
            noise=torch.randn(rows, n, channels, device=device),
        )
