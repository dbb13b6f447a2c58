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
from hmar_cli.models.heads import MlpHead, TransformerHead
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.settings import Masking
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


def pivot_drop(elapsed: float, rate: float, warmup: float) -> float:
    """Probability that an image's pivots are hidden from phase 2 in training: 1 at first, 1 - rate in the end.

    Args:
        elapsed: what has passed, in epochs or as a share of training.
        rate: share of images that see their pivots in the end.
        warmup: when that is reached, in the unit of `elapsed`.
    """
    return 1 - rate * (min(1.0, elapsed / warmup) if warmup else 1.0)


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
    def hidden(self) -> Tensor:
        """Masked places [B, M]."""
        return self.order[:, : self.masked]

    @property
    def visible(self) -> Tensor:
        """The other places [B, n - M]."""
        return self.order[:, self.masked :]


class MaskedArTraining(Objective):
    """The diffusion losses of both phases (Hi-MAR sections 3.1 to 3.3; MAR, eq. 1).

    Phase 1's conditional tokens reach phase 2 without gradient, and only those of masked pivots: where a pivot
    was visible, and for some images everywhere, phase 2 gets learned empty pivots instead.

    Args:
        model: the transformer to train.
        latent_scale: factor of the tokenizer's latents.
        pivot_masking: law of the masked share in phase 1.
        dense_masking: in phase 2, or MAR's.
        repeats: R, noise levels of each token in one step.
        variational: train the variance of MLP heads.
        pivot_weight: of phase 1's loss.
        dense_weight: of phase 2's loss; MAR's has no factor.
        pivot_keep: share of images that see their pivots, in the end.
        pivot_keep_warmup: share of training over which that share grows.
        label_drop: probability that a condition is left out, in each phase anew.
    """

    def __init__(
        self,
        model: MaskedTransformer,
        *,
        latent_scale: float = 1.0,
        pivot_masking: Masking = "truncated-normal",
        dense_masking: Masking = "cosine",
        repeats: int = 4,
        variational: bool = True,
        pivot_weight: float = 0.4,
        dense_weight: float = 0.6,
        pivot_keep: float = 0.25,
        pivot_keep_warmup: float = 0.125,
        label_drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.networks = {"model": model}
        self.model, self.latent_scale, self.repeats = model, latent_scale, repeats
        self.pivot_masking, self.dense_masking, self.variational = pivot_masking, dense_masking, variational
        self.pivot_weight = pivot_weight
        self.dense_weight = 1.0 if model.pivots == "none" else dense_weight
        self.pivot_keep, self.pivot_keep_warmup = pivot_keep, pivot_keep_warmup
        self.label_drop = label_drop
        self.diffusion = Diffusion()

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """No decay for biases, norms and the diffusion heads; embeddings, positions and tables are decayed."""
        if name.startswith(("pivot_head.", "dense_head.")):
            return True
        decayed = name == "null_embed" or name.endswith(("modulation.scale", "modulation.shift"))
        return not decayed and super().undecayed(name, parameter)

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
        draws = self.draw(dense, self.model.dense_head, self.dense_masking)
        if self.model.pivots == "none":
            loss = self.dense_loss(dense, context, None, draws)
            return loss, {"loss": loss.detach()}
        pivots = self.latents(batch["pivot_moments"])  # [B, S, C]
        assert self.model.pivot_head is not None
        first = self.draw(pivots, self.model.pivot_head, self.pivot_masking)
        chance = pivot_drop(progress, self.pivot_keep, self.pivot_keep_warmup)
        hidden = torch.rand(len(dense), device=dense.device) <= chance  # [B]
        return self.two_phases(pivots, dense, context, first, draws, hidden)

    def two_phases(
        self,
        pivots: Tensor,
        dense: Tensor,
        context: Tensor,
        first: Draws,
        second: Draws,
        hidden: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of Hi-MAR.

        Args:
            pivots: latents [B, S, C].
            dense: latents [B, N, C].
            context: [B, G, D].
            first: draws of phase 1.
            second: draws of phase 2.
            hidden: [B] bool, images whose pivots phase 2 does not see.
        """
        model = self.model
        assert model.pivot_head is not None
        known = _take(pivots, first.visible)  # [B, S - M, C]
        z = model.pivot_phase(model.drop(context, first.dropped), known, first.visible)  # [B, S, D]
        pivot_loss = self.diffusion_loss(model.pivot_head, pivots, z, first)
        if model.pivots == "conditional":
            visible = torch.ones(pivots.shape[:2], dtype=torch.bool, device=pivots.device)
            empty = visible.scatter(1, first.hidden, False) | hidden[:, None]  # [B, S]
            guides = model.guides(z.detach(), empty)
        else:
            guides = model.guides(pivots, hidden[:, None].expand(pivots.shape[:2]))
        dense_loss = self.dense_loss(dense, context, guides, second)
        loss = self.pivot_weight * pivot_loss + self.dense_weight * dense_loss
        metrics = {"loss": loss, "pivot_loss": pivot_loss, "dense_loss": dense_loss}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def dense_loss(self, dense: Tensor, context: Tensor, guides: Tensor | None, draws: Draws) -> Tensor:
        """Loss of phase 2, or of MAR."""
        context = self.model.drop(context, draws.dropped)
        known = _take(dense, draws.visible)  # [B, N - M, C]
        z = self.model.dense_phase(context, guides, known, draws.visible)  # [B, N, D]
        return self.diffusion_loss(self.model.dense_head, dense, z, draws)

    def diffusion_loss(
        self, head: MlpHead | TransformerHead, tokens: Tensor, z: Tensor, draws: Draws
    ) -> Tensor:
        """Noise-prediction error of masked tokens.

        An MLP head is given the masked tokens alone, each with its own timestep; a Transformer head all tokens of
        an image at one timestep, of which the known ones count as zeros in the mean.

        Args:
            head: the phase's head.
            tokens: latents [B, n, C].
            z: conditional tokens [B, n, D].
            draws: of the phase.
        """
        if not head.global_context:
            tokens, z = _take(tokens, draws.hidden), _take(z, draws.hidden)  # [B, M, C], [B, M, D]
        tokens, z = tokens.repeat(self.repeats, 1, 1), z.repeat(self.repeats, 1, 1)  # [R B, ...]
        state = self.diffusion.noised(tokens, draws.t, draws.noise)
        predicted, value = head(state, draws.t, z)
        error = (draws.noise - predicted).square().mean(dim=-1)  # [R B, n or M]
        if value is not None and self.variational:
            error = error + self.diffusion.variational(
                predicted, value, tokens, state, draws.t.expand(error.shape)
            )
        if head.global_context:
            counted = torch.zeros_like(draws.order, dtype=error.dtype).scatter(1, draws.hidden, 1.0)  # [B, n]
            error = error * counted.repeat(self.repeats, 1)
        return error.mean()  # type: ignore[no-any-return]

    def latents(self, moments: Tensor) -> Tensor:
        """Draw from the posterior [B, 2Z, h, w], scale, and put in a row: [B, h w, C]."""
        mean = moments[:, : moments.shape[1] // 2]
        latents: Tensor = sample_posterior(moments, torch.randn_like(mean)) * self.latent_scale
        return latents.flatten(2).transpose(1, 2).contiguous()

    def draw(self, tokens: Tensor, head: MlpHead | TransformerHead, law: Masking) -> Draws:
        """Draw a phase's random numbers; the count of masked tokens on the host, so that nothing waits for it."""
        batch, total, channels = tokens.shape
        device, rows = tokens.device, self.repeats * batch
        masked = masked_count(total, law, torch.rand(()).item())
        n = total if head.global_context else masked
        return Draws(
            order=torch.rand(batch, total, device=device).argsort(dim=1),
            masked=masked,
            dropped=torch.rand(batch, device=device) < self.label_drop,
            t=torch.randint(STEPS, (rows, 1 if head.global_context else n), device=device),
            noise=torch.randn(rows, n, channels, device=device),
        )


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x [B, n, C] at places [B, m]: [B, m, C]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
