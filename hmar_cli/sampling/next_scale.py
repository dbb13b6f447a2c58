"""Sampling of VAR and HMAR: a draft of each scale, then refinement by multi-step masked prediction.

Letters: B images, K scales, n_k tokens of scale k, V codebook size, Z codebook channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hmar_cli.models.layers import KeyValueCache
from hmar_cli.models.next_scale import Condition, NextScaleTransformer
from hmar_cli.models.scales import Scales, check_schedule
from hmar_cli.settings import NextScaleSample
from hmar_cli.tokenizers.msvq import ScaleQuantizer


class Noise(Protocol):
    """What a sampler needs of a source of random numbers."""

    def draw(self, probabilities: Tensor, step: int) -> Tensor:
        """Draw one token a position, [B, n, V] -> [B, n]; `step` numbers the draws of an image."""


Trace = Callable[[str, Tensor], None]
"""Receives intermediate tensors by name (`logits.k`, `draft.k`, `masked.k.j`, ...), for tests and analyses."""


@dataclass(frozen=True)
class KeptTokens:
    """A picture of which some tokens are drawn anew, the same ones in every image (see `editing.py`).

    Attributes:
        tokens: [B, L] int64, the picture's.
        drawn: for each scale [n_k] bool, the tokens that are drawn; the others are kept.
        counts: how many that are.
        weight: [h, w] float32 in [0, 1], share of the new feature map at each place of the last grid.
    """

    tokens: Tensor
    drawn: tuple[Tensor, ...]
    counts: tuple[int, ...]
    weight: Tensor

    def merge(self, tokens: Tensor, k: int, quantizer: ScaleQuantizer) -> Tensor:
        """The tokens of scale k [B, n_k]: where they are drawn those given, else the picture's."""
        return torch.where(self.drawn[k], tokens, self.tokens[:, quantizer.scales.slice(k)])

    def contribution(self, tokens: Tensor, k: int, quantizer: ScaleQuantizer) -> Tensor:
        """What scale k adds to f_hat, [B, Z, h, w]: the new map within the region, the picture's outside."""
        kept = quantizer.contribution(self.tokens[:, quantizer.scales.slice(k)], k)
        if not self.counts[k]:
            return kept
        return torch.lerp(kept, quantizer.contribution(tokens, k), self.weight)  # exact for weights 0 and 1

    def f_hat(self, tokens: Tensor, quantizer: ScaleQuantizer) -> Tensor:
        """Sum of the contributions of tokens [B, L]: [B, Z, h, w]."""
        scales = quantizer.scales
        total = quantizer.f_hat(tokens[:, :0])  # zeros
        for k in range(len(scales)):
            total = total + self.contribution(tokens[:, scales.slice(k)], k, quantizer)
        return total


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Write -inf into all but the best entries.

    Top-p acts on the distribution of the top k, of exactly k entries: it removes entries, smallest first, while their
    summed probability stays within 1 - p, and never the largest.

    Ties are never split: all entries that equal the smallest one that stays are kept. So more than k can stay, since
    ties with the k-th are kept with it, though the distribution that top-p acts on has no part of them; and of equal
    logits all stay at any p. The published sampler counts such ties in that distribution, and splits ties by the
    order in which a sort leaves them.

    Args:
        logits: [..., V] float32.
        top_k: 0 keeps all; more than V keeps all.
        top_p: 0 keeps all.
    """
    vocabulary = logits.shape[-1]
    count = min(top_k or vocabulary, vocabulary)
    if count == vocabulary and not top_p:
        return logits
    ascending = logits.topk(count, dim=-1).values.flip(-1)
    least = ascending[..., :1]
    if top_p:
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        least = ascending.gather(-1, removed[..., :-1].sum(dim=-1, keepdim=True))
    return logits.masked_fill(logits < least, float("-inf"))


def draw_counts(settings: NextScaleSample, scales: Scales) -> list[int]:
    """Positions of each draw of an image."""
    schedule = check_schedule(settings.schedule or [[n] for n in scales.lengths], scales)
    return [n for n, passes in zip(scales.lengths, schedule, strict=True) for _ in passes]


@torch.inference_mode()
def sample_next_scale(
    model: NextScaleTransformer,
    quantizer: ScaleQuantizer,
    labels: Tensor,
    settings: NextScaleSample,
    noise: Noise,
    *,
    trace: Trace | None = None,
    kept: KeptTokens | None = None,
    finite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the token pyramids of a batch of images (VAR, section 3.1; HMAR, multi-step masked prediction).

    Args:
        model: in evaluation mode; with a masked branch if the schedule refines.
        quantizer: of the tokenizer that the model was trained on.
        labels: [B] int64, classes; `num_classes` is "no class".
        settings: guidance, filters and schedule.
        noise: source of the draws.
        trace: receives intermediate tensors.
        kept: what is known of the images; by default nothing.
        finite: [] bool on the labels' device, set to False where logits are not finite, in place of an error: with
            it, the call never waits for the device.

    Returns:
        tokens [B, L] int64 and the feature map [B, Z, H, W] that the tokenizer decodes.

    Raises:
        ValueError: a schedule that doesn't fit the scales, or that refines without a masked branch.
        FloatingPointError: logits that are not finite.
    """
    scales = model.scales
    schedule = check_schedule(settings.schedule or [[n] for n in scales.lengths], scales)
    if model.masked is None and any(len(passes) > 1 for passes in schedule):
        raise ValueError("expected a model with a masked branch for a schedule that refines")
    judged = torch.ones((), dtype=torch.bool, device=labels.device) if finite is None else finite
    run = _Run(model, quantizer, labels, settings, noise, trace or (lambda name, tensor: None), kept, judged)
    tokens: list[Tensor] = []
    f_hat = inputs = None
    for k, passes in enumerate(schedule):
        drawn = run.scale(k, inputs, passes)
        run.trace(f"tokens.{k}", drawn)
        tokens.append(drawn)
        added = quantizer.contribution(drawn, k) if kept is None else kept.contribution(drawn, k, quantizer)
        f_hat = added if f_hat is None else f_hat + added
        if k + 1 < len(scales):
            inputs = quantizer.scale_input(f_hat, k + 1)  # [B, n_{k+1}, Z]
    assert f_hat is not None
    if finite is None and not judged:
        raise FloatingPointError("the model's logits are not finite")
    return torch.cat(tokens, dim=1), f_hat


class _Run:
    """One call of the sampler: guidance, the count of draws, and VAR's cache."""

    def __init__(
        self,
        model: NextScaleTransformer,
        quantizer: ScaleQuantizer,
        labels: Tensor,
        settings: NextScaleSample,
        noise: Noise,
        trace: Trace,
        kept: KeptTokens | None,
        finite: Tensor,
    ) -> None:
        self.model, self.settings, self.noise, self.trace = model, settings, noise, trace
        self.quantizer, self.kept = quantizer, kept
        self.labels, self.finite, self.step = labels, finite, 0
        self.conditions: dict[tuple[bool, bool], Condition] = {}  # by guidance and branch
        device = labels.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.pos_embed.dtype
        )
        self.cache = model.make_cache(len(labels) * (2 if settings.cfg else 1), dtype)

    def scale(self, k: int, inputs: Tensor | None, passes: tuple[int, ...]) -> Tensor:
        """The tokens [B, n_k] of scale k: a draft, its refinement, and what is known."""
        kept, after = self.kept, self.step + len(passes)  # also where a picture spares some of them
        if kept is not None and not kept.counts[k]:
            if self.cache is not None:  # later scales look at this one
                self._logits(k, inputs)
            tokens = kept.tokens[:, self.quantizer.scales.slice(k)]
        else:
            tokens, confidence = self.draft(k, inputs)
            if kept is not None:
                tokens = kept.merge(tokens, k, self.quantizer)
            if len(passes) > 1:
                assert inputs is not None  # the first scale is never refined
                tokens = self.refine(k, inputs, tokens, confidence, passes)
        self.step = after
        return tokens

    def draft(self, k: int, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Next-scale prediction of all of scale k: tokens [B, n_k] and their confidence [B, n_k]."""
        logits = self._logits(k, inputs)
        self.trace(f"logits.{k}", logits)
        tokens, confidence = self._draw(logits)
        self.trace(f"draft.{k}", tokens)
        return tokens, confidence

    def refine(
        self,
        k: int,
        inputs: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        passes: tuple[int, ...],
    ) -> Tensor:
        """Redraw the least confident tokens [B, n_k] of scale k, fewer in every pass (HMAR, section D.4).

        Of a picture, the tokens that are drawn anew are shared out over the passes in proportion, rounded towards
        more to redraw: even a single one is, once, with its kept neighbours in view.
        """
        assert self.model.masked is not None
        quantizer, strength = self.quantizer, self.settings.refine_cfg
        candidates, drawn, redraws = torch.ones_like(tokens, dtype=torch.bool), tokens.shape[1], 0
        if self.kept is not None:
            candidates, drawn = self.kept.drawn[k].expand_as(tokens), self.kept.counts[k]
        for j in range(1, len(passes)):
            before, redraws = redraws, -(-drawn * sum(passes[j:]) // sum(passes))
            if redraws == before:  # nothing was decided since the last pass
                continue
            self.trace(f"conf.{k}.{j}", confidence)
            ranked = confidence.masked_fill(~candidates, float("inf")).argsort(dim=1, stable=True)
            positions = ranked[:, :redraws]  # least confident first
            self.trace(f"masked.{k}.{j}", positions)
            mask = torch.zeros_like(candidates).scatter(1, positions, True)
            keep = ~mask if self.model.masked.leak_free else None
            own = quantizer.scale_input(quantizer.contribution(tokens, k, keep), k)
            logits = self._guided(strength != 0, strength, k, inputs, own, mask, None)
            self.trace(f"logits.{k}.{j}", logits)
            redrawn, confidence = self._draw(logits)
            tokens = torch.where(mask, redrawn, tokens)
            candidates = mask
            self.trace(f"tokens.{k}.{j}", tokens)
        return tokens

    def _logits(self, k: int, inputs: Tensor | None) -> Tensor:
        """Logits [B, n_k, V] of next-scale prediction; of VAR, the cache is one scale longer then."""
        strength = self.settings.cfg * k / max(1, len(self.model.scales) - 1)
        guide = self.settings.cfg != 0  # at every scale, the first too: the cache holds both halves
        return self._guided(guide, strength, k, inputs, None, None, self.cache)

    def _guided(
        self,
        guide: bool,
        strength: float,
        k: int,
        inputs: Tensor | None,
        own: Tensor | None,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Logits [B, n_k, V] of scale k: (1 + s) conditional - s unconditional, both halves in one batch."""
        condition = self._condition(guide, masked=own is not None)
        if not guide:
            return self.model.forward_scale(k, condition, inputs, own, mask, cache)
        inputs, own, mask = (None if x is None else torch.cat([x, x]) for x in (inputs, own, mask))
        logits = self.model.forward_scale(k, condition, inputs, own, mask, cache)
        conditional, unconditional = logits.chunk(2)
        return (1 + strength) * conditional - strength * unconditional

    def _condition(self, guide: bool, masked: bool) -> Condition:
        """What a branch takes of the classes, those of both halves under guidance; computed once."""
        if (guide, masked) not in self.conditions:
            labels = self.labels
            if guide:
                labels = torch.cat([labels, torch.full_like(labels, self.model.num_classes)])  # [2B]
            self.conditions[guide, masked] = self.model.condition(labels, masked=masked)
        return self.conditions[guide, masked]

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Filter and draw: tokens [B, n_k] and their probabilities after the filter [B, n_k]."""
        self.finite &= logits.isfinite().all()
        probabilities = filter_logits(logits, self.settings.top_k, self.settings.top_p).softmax(dim=-1)
        tokens = self.noise.draw(probabilities, self.step)
        self.step += 1
        return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]
