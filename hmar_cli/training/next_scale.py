"""Training the next-scale transformer: next-scale prediction, then masked finetuning.

Letters: B batch, K scales, n_k tokens of scale k, L = sum of n_k, V codebook size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.errors import UserError
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.settings import Weighting
from hmar_cli.tokenizers.msvq import ScaleQuantizer
from hmar_cli.training.objective import Objective
from hmar_cli.training.weighting import scale_weights


class _TransformerTraining(Objective):
    """What both objectives share: label dropping, parameter groups, metrics per scale.

    Args:
        model: the transformer to train.
        quantizer: of the tokenizer that made the tokens; frozen.
        label_drop: probability that a label is replaced by "no class".
    """

    def __init__(self, model: NextScaleTransformer, quantizer: ScaleQuantizer, label_drop: float) -> None:
        super().__init__()
        self.networks = {"model": model}
        self.model, self.quantizer, self.label_drop = model, quantizer.requires_grad_(False), label_drop

    def prepare(self, batch: int, dtype: torch.dtype) -> list[str]:
        """Settle which implementation of attention runs."""
        try:
            name, reason = self.model.select_attention(batch, dtype)
        except ValueError as error:
            raise UserError(
                f"model.attention: {error}", "use auto, or measure to time what can run here"
            ) from error
        return [f"attention: {name} ({reason})"]

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """No decay for biases, positions, levels, modulation tables and head scales; embeddings are decayed."""
        *_, owner, leaf = ["", *name.split(".")]
        exempt = {"start_embed", "pos_embed", "log_scale", "offsets", "q_bias", "v_bias", "bias"}
        return leaf in exempt or owner == "level_embed"

    def drop_labels(self, labels: Tensor) -> Tensor:
        """Replace labels [B] by "no class" at random, for guidance."""
        dropped = torch.rand(labels.shape, device=labels.device) < self.label_drop
        return torch.where(dropped, self.model.num_classes, labels)

    def judge(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compare logits [B, L, V] with tokens [B, L]: cross-entropy, and 1 where the best is right, [B, L] each."""
        # one long batch: over a transposed dimension PyTorch first copies the logits, the largest tensor there is
        entropy = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")  # [B L]
        return entropy.view_as(tokens), (logits.detach().argmax(dim=-1) == tokens).float()

    def per_scale(self, values: Tensor, counts: Tensor) -> Tensor:
        """Average values [B, L] over the counted tokens (0 or 1, [L]) of each scale: [K], NaN where it has none."""
        scales = self.model.scales
        weighted = (values.mean(dim=0) * counts).split(scales.lengths)
        parts = zip(weighted, counts.split(scales.lengths), strict=True)
        return torch.stack([v.sum() / c.sum() for v, c in parts])


class NextScaleTraining(_TransformerTraining):
    """Next-scale prediction: cross-entropy of every token given the true coarser scales (supplement C).

    The loss of an image is the sum over tokens of weight times cross-entropy, without dividing by the weights;
    the batch is averaged.

    Args:
        model: the transformer to train.
        quantizer: of the tokenizer that made the tokens.
        weighting: how scales are weighted, see `scale_weights`.
        label_drop: probability that a label is replaced by "no class".
    """

    graphable = True

    weights: Tensor

    def __init__(
        self,
        model: NextScaleTransformer,
        quantizer: ScaleQuantizer,
        *,
        weighting: Weighting = "lognormal",
        label_drop: float = 0.1,
    ) -> None:
        super().__init__(model, quantizer, label_drop)
        totals = scale_weights(model.scales, weighting)
        shares = [
            torch.full((n,), w / n, dtype=torch.float64)
            for n, w in zip(model.scales.lengths, totals, strict=True)
        ]
        self.register_buffer("weights", torch.cat(shares).float(), persistent=False)  # [L]

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of {"tokens": [B, L] int64, "label": [B] int64}."""
        tokens = batch["tokens"]
        inputs = self.quantizer.teacher_inputs(tokens)  # [B, L - n_1, Z]
        logits = self.model(self.drop_labels(batch["label"]), inputs)  # [B, L, V]
        entropy, hits = self.judge(logits, tokens)  # [B, L]
        loss = (entropy * self.weights).sum(dim=1).mean()
        with torch.no_grad():
            every = torch.ones_like(self.weights)
            metrics = {
                "loss": loss.detach(),
                "cross_entropy": entropy.mean(),
                "accuracy": hits.mean(),
                "cross_entropy_per_scale": self.per_scale(entropy, every),
                "accuracy_per_scale": self.per_scale(hits, every),
            }
        return loss, metrics


class MaskedTraining(_TransformerTraining):
    """Masked finetuning of HMAR's second branch on a frozen next-scale model (supplement D.3).

    One ratio p ~ U(0, 1) a batch; ceil(p n_k) tokens of every scale but the first are masked, at the same places in
    all images; the loss is the plain mean of the cross-entropy over masked tokens.

    Args:
        model: a transformer with a masked branch; all but the branch is frozen.
        quantizer: of the tokenizer that made the tokens.
        label_drop: probability that a label is replaced by "no class".

    Raises:
        ValueError: no masked branch, or a model whose tokens see other scales.
    """

    graphable = True

    def __init__(
        self, model: NextScaleTransformer, quantizer: ScaleQuantizer, *, label_drop: float = 0.1
    ) -> None:
        super().__init__(model, quantizer, label_drop)
        if model.masked is None or model.pattern != "diagonal":
            raise ValueError("expected a diagonal model with a masked branch")
        self.branch = model.masked
        model.requires_grad_(False)
        self.branch.requires_grad_(True)

    def train(self, mode: bool = True) -> "MaskedTraining":
        """Set training mode of the branch; what is frozen drops no paths."""
        super().train(mode)
        self.model.eval()
        self.branch.train(mode)
        return self

    def draw_mask(self, device: torch.device) -> Tensor:
        """Draw the masked positions of one batch, [L - n_1] bool, without asking the device for a number."""
        ratio = torch.rand((), device=device)
        masks = []
        for n in self.model.scales.lengths[1:]:
            rank = torch.rand(n, device=device).argsort().argsort()
            masks.append(rank < torch.ceil(ratio * n).clamp(min=1))
        return torch.cat(masks)

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of {"tokens": [B, L] int64, "label": [B] int64}; the first scale, never masked, is NaN."""
        tokens = batch["tokens"]
        first = self.model.scales.lengths[0]
        mask = self.draw_mask(tokens.device)  # [L - n_1]
        masked = torch.cat([mask.new_zeros(first), mask])  # [L]
        inputs = self.quantizer.teacher_inputs(tokens)  # [B, L - n_1, Z]
        own = self.quantizer.own_inputs(tokens, ~masked if self.branch.leak_free else None)
        logits = self.model(self.drop_labels(batch["label"]), inputs, own, mask)  # [B, L, V]
        entropy, hits = self.judge(logits, tokens)  # [B, L]
        share = masked.float() / masked.sum()
        loss = (entropy * share).sum(dim=1).mean()
        with torch.no_grad():
            counted = masked.float()
            metrics = {
                "loss": loss.detach(),
                "accuracy": (hits * share).sum(dim=1).mean(),
                "cross_entropy_per_scale": self.per_scale(entropy, counted),
                "accuracy_per_scale": self.per_scale(hits, counted),
            }
        return loss, metrics
