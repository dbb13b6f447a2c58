"""Training MAR and Hi-MAR: masked autoregression with diffusion losses, in one or two phases.

Letters: B batch, S pivots, N dense tokens, M masked ones, R repeats, C latent channels, D width of
the transformer, G context tokens.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

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


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one phase in one step.

    Attributes:
        order: [B, n] int64, permutations; the first `masked` places of each are masked.
        masked: how many.
        dropped: [B] bool, conditions that are left out.
        t: timesteps, [R B, M] of an MLP head or [R B, 1] of a Transformer head.
        noise: [R B, M, C] or [R B, n, C].
    """

    order: Tensor
    masked: int
    dropped: Tensor
    t: Tensor
    noise: Tensor

    @property
    def masked_places(self) -> Tensor:
        """Masked places [B, M]."""
        return self.order[:, : self.masked]

    @property
    def visible_places(self) -> Tensor:
        """The other places [B, n - M]."""
        return self.order[:, self.masked :]


class MaskedArTraining(Objective):
    """The diffusion losses of both phases (Hi-MAR sections 3.1 to 3.3; MAR, eq. 1).

    Phase 1's conditional tokens reach phase 2 without gradient, and only those of masked pivots: where a pivot
    was visible, and for some images everywhere, phase 2 gets learned empty pivots instead.

    Args:
        model: the transformer to train.
        settings: masking laws, repeats and weights; MAR's loss has no weight.
        latent_scale: factor of the tokenizer's latents.
    """

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
        """Compile the blocks, which all share one compiled form; how many tokens they see changes all the time."""
        model = self.model
        blocks = [*model.encoder.blocks, *model.decoder.blocks]
        for head in (model.pivot_head, model.dense_head):
            blocks += [] if head is None else list(head.blocks)
        for block in blocks:
            block.compile(dynamic=True)

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a batch.

        Args:
            batch: "moments" [B, 2Z, h, w], for pivots "pivot_moments" [B, 2Z, h', w'], and as the condition
                "label" [B] or "text" (ids or embeddings).
            progress: share of training that lies behind.
        """
        dense = self.latents(batch["moments"])  # [B, N, C]
        context = self.model.context(batch["text" if self.model.class_embed is None else "label"])
        dense_draws = self.draw(dense, self.model.dense_head, self.settings.dense_masking)
        if self.model.pivots == "none":
            loss = self.dense_loss(dense, context, None, dense_draws)
            return loss, {"loss": loss.detach()}
        pivots = self.latents(batch["pivot_moments"])  # [B, S, C]
        assert self.model.pivot_head is not None
        pivot_draws = self.draw(pivots, self.model.pivot_head, self.settings.pivot_masking)
        chance = pivot_drop(progress, self.settings.pivot_keep, self.settings.pivot_keep_warmup)
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
        model, visible = self.model, pivot_draws.visible_places
        assert model.pivot_head is not None
        known = gather_tokens(pivots, visible)  # [B, S - M, C]
        z = model.pivot_phase(model.drop(context, pivot_draws.dropped), known, visible)  # [B, S, D]
        pivot_loss = self.diffusion_loss(model.pivot_head, pivots, z, pivot_draws)
        empty = without_pivots[:, None].expand(pivots.shape[:2])  # [B, S]
        if model.pivots == "conditional":
            guides = model.guides(z.detach(), empty.scatter(1, visible, True))
        else:
            guides = model.guides(pivots, empty)
        dense_loss = self.dense_loss(dense, context, guides, dense_draws)
        loss = self.settings.pivot_weight * pivot_loss + self.settings.dense_weight * dense_loss
        metrics = {"loss": loss, "pivot_loss": pivot_loss, "dense_loss": dense_loss}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def dense_loss(self, dense: Tensor, context: Tensor, guides: Tensor | None, draws: Draws) -> Tensor:
        """Loss of phase 2, or of MAR."""
        context = self.model.drop(context, draws.dropped)
        known = gather_tokens(dense, draws.visible_places)  # [B, N - M, C]
        z = self.model.dense_phase(context, guides, known, draws.visible_places)  # [B, N, D]
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
            counted = torch.zeros_like(draws.order, dtype=error.dtype).scatter(1, draws.masked_places, 1.0)
            error = error * counted.repeat(repeats, 1)
        return error.mean()  # type: ignore[no-any-return]

    def latents(self, moments: Tensor) -> Tensor:
        """Draw from the posterior [B, 2Z, h, w], scale, and put in a row: [B, h w, C]."""
        mean = moments[:, : moments.shape[1] // 2]
        latents: Tensor = sample_posterior(moments, torch.randn_like(mean)) * self.latent_scale
        return latents.flatten(2).transpose(1, 2).contiguous()

    def draw(self, tokens: Tensor, head: DiffusionHead, law: Masking) -> Draws:
        """Draw a phase's random numbers; the count of masked tokens on the host, so that nothing waits for it."""
        batch, total, channels = tokens.shape
        device, rows = tokens.device, self.settings.repeats * batch
        masked = masked_count(total, law, torch.rand(()).item())
        n = total if head.global_context else masked
        return Draws(
            order=torch.rand(batch, total, device=device).argsort(dim=1),
            masked=masked,
            dropped=torch.rand(batch, device=device) < self.settings.label_drop,
            t=torch.randint(STEPS, (rows, 1 if head.global_context else n), device=device),
            noise=torch.randn(rows, n, channels, device=device),
        )
