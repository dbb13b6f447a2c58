"""Sampling of MAR and Hi-MAR: tokens are drawn in a random order, some more in each step, by a diffusion head.

Letters: B images, G context tokens, S pivots, N dense tokens, n tokens of a phase, m those drawn in a step, C latent
channels, D width of the transformer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hmar_cli.models.diffusion import Diffusion, Method, Predict, ancestral, multistep, process_for
from hmar_cli.models.heads import MlpHead, TransformerHead
from hmar_cli.models.masked import MaskedTransformer

CfgSchedule = Literal["linear", "constant"]
CHUNK = 1 << 23
"""Normal numbers that are drawn at once, for as many diffusion steps as that covers."""


class Noise(Protocol):
    """What the sampler needs of a source of random numbers."""

    def order(self, phase: int, n: int) -> Tensor:
        """Permutations [B, n] int64, in which the tokens of a phase are drawn from the end."""

    def normal(self, phase: int, step: int, draws: range, places: Tensor, channels: int) -> Tensor:
        """Standard normal numbers [len(draws), B, m, C] of the tokens at `places` [B, m] in one step.

        Draw 0 is the initial noise of the diffusion, draw 1 + i that of its i-th step.
        """


Trace = Callable[[str, Tensor], None]
"""Receives intermediate tensors by name (`z.0.3`, `tokens.1.0`: phase, step), for tests and analyses."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tokens are drawn.

    Attributes:
        steps: of phase 2 (dense tokens), or of MAR; at most one a token.
        pivot_steps: of phase 1.
        cfg: guidance of phase 2, or of MAR; 1 is none.
        pivot_cfg: guidance of phase 1.
        cfg_schedule: "linear" grows with the share of known tokens.
        pivot_cfg_schedule: the same of phase 1.
        temperature: factor of the noise in "ddpm".
        head_sampler: "ddpm" (ancestral), or deterministic "ddim" or "dpm++" in far fewer steps.
        head_steps: diffusion steps of the dense head.
        pivot_head_steps: of phase 1's head.
    """

    steps: int = 4
    pivot_steps: int = 32
    cfg: float = 2.5
    pivot_cfg: float = 2.7
    cfg_schedule: CfgSchedule = "linear"
    pivot_cfg_schedule: CfgSchedule = "linear"
    temperature: float = 1.0
    head_sampler: Method = "ddpm"
    head_steps: int = 250
    pivot_head_steps: int = 100


def mask_lengths(total: int, steps: int) -> list[int]:
    """Tokens that are still masked after each step, by the cosine law of MaskGIT.

    The last one is 1 though the last step draws all: guidance is computed from it.
    """
    left, lengths = total, []
    for i in range(steps):
        left = max(1, min(left - 1, math.floor(total * math.cos(math.pi / 2 * (i + 1) / steps))))
        lengths.append(left)
    return lengths


def guidance(cfg: float, schedule: CfgSchedule, total: int, masked: int) -> float:
    """Guidance of a step that leaves `masked` of `total` tokens masked."""
    return cfg if schedule == "constant" else 1 + (cfg - 1) * (total - masked) / total


@dataclass(frozen=True)
class Sampled:
    """What the sampler drew, scaled latents.

    Attributes:
        latents: [B, C, h, w].
        pivots: [B, C, h', w'], None for MAR.
    """

    latents: Tensor
    pivots: Tensor | None


@torch.inference_mode()
def sample_masked(
    model: MaskedTransformer,
    condition: Tensor,
    settings: Settings,
    noise: Noise,
    *,
    trace: Trace | None = None,
    processes: tuple[Diffusion, Diffusion] | None = None,
) -> Sampled:
    """Draw the tokens of a batch of images (MAR section 3.3; Hi-MAR sections 3.2 and 3.3).

    Args:
        model: in evaluation mode.
        condition: as `MaskedTransformer.context` takes it, B rows.
        settings: steps, guidance and the heads' sampler.
        noise: source of the random numbers.
        trace: receives intermediate tensors.
        processes: diffusion processes of the pivots' and the dense head; by default what the settings say.

    Returns:
        Latents, still scaled: the tokenizer divides them by its scale.

    Raises:
        ValueError: more steps than tokens, or a temperature for a sampler without noise.
        FloatingPointError: latents that are not finite.
    """
    if settings.head_sampler != "ddpm" and settings.temperature != 1:
        raise ValueError(f'expected temperature 1 for "{settings.head_sampler}", which adds no noise')
    run = _Run(model, condition, settings, noise, trace or (lambda name, tensor: None))
    method = settings.head_sampler
    first, second = processes or (
        process_for(method, settings.pivot_head_steps),
        process_for(method, settings.head_steps),
    )
    pivots = guides = None
    if model.pivot_grid is not None:
        pivots, guides = run.pivot_phase(first)
    dense = run.dense_phase(guides, second)
    if not (dense.isfinite().all() and (pivots is None or pivots.isfinite().all())):
        raise FloatingPointError("the model's latents are not finite")
    return Sampled(
        _picture(dense, model.grid), None if pivots is None else _picture(pivots, model.pivot_grid)
    )


def _picture(tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Tokens [B, n, C] as a map [B, C, h, w]."""
    assert grid is not None
    return torch.unflatten(tokens.transpose(1, 2), 2, grid)


@dataclass
class _Phase:
    """A phase's state."""

    number: int  # of the random numbers
    tokens: Tensor  # [B, n, C], zeros where nothing is drawn yet
    masked: Tensor  # [B, n] bool
    order: Tensor  # [B, n]
    head: MlpHead | TransformerHead
    process: Diffusion


class _Run:
    """One call of the sampler."""

    def __init__(
        self, model: MaskedTransformer, condition: Tensor, settings: Settings, noise: Noise, trace: Trace
    ) -> None:
        self.model, self.settings, self.noise, self.trace = model, settings, noise, trace
        self.conditional = model.context(condition)  # [B, G, D]

    def pivot_phase(self, process: Diffusion) -> tuple[Tensor, Tensor]:
        """Draw the pivots: latents [B, S, C], and what phase 2 sees of them, [B, S, D].

        A pivot's conditional token is the one of the step that drew it, of the conditional half.
        """
        model, settings = self.model, self.settings
        assert model.pivot_head is not None
        phase = self._start(0, model.pivot_count, model.pivot_head, process)
        context = self._context(settings.pivot_cfg)
        pivots = phase.tokens.new_zeros(*phase.tokens.shape[:2], self.conditional.shape[-1])  # [B, S, D]
        for step, (now, left) in enumerate(_steps(model.pivot_count, settings.pivot_steps)):
            known, visible = self._known(phase, now, context)
            z = model.pivot_phase(context, known, visible)  # [B or 2B, S, D]
            places = phase.order[:, _after(step, settings.pivot_steps, left) : now].sort(dim=1).values
            index = places[..., None].expand(-1, -1, z.shape[-1])
            pivots = pivots.scatter(1, index, z[: len(pivots)].gather(1, index).to(pivots.dtype))
            w = guidance(settings.pivot_cfg, settings.pivot_cfg_schedule, model.pivot_count, left)
            self._draw(phase, step, z, places, w)
        return phase.tokens, model.guides(pivots if model.pivots == "conditional" else phase.tokens)

    def dense_phase(self, guides: Tensor | None, process: Diffusion) -> Tensor:
        """Draw the dense tokens [B, N, C]; both halves of guidance see the same pivots."""
        model, settings = self.model, self.settings
        total = math.prod(model.grid)
        phase = self._start(1, total, model.dense_head, process)
        context = self._context(settings.cfg)
        if guides is not None and len(context) > len(guides):
            guides = torch.cat([guides, guides])
        for step, (now, left) in enumerate(_steps(total, settings.steps)):
            known, visible = self._known(phase, now, context)
            z = model.dense_phase(context, guides, known, visible)  # [B or 2B, N, D]
            places = phase.order[:, _after(step, settings.steps, left) : now].sort(dim=1).values
            self._draw(phase, step, z, places, guidance(settings.cfg, settings.cfg_schedule, total, left))
        return phase.tokens

    def _start(self, number: int, total: int, head: MlpHead | TransformerHead, process: Diffusion) -> _Phase:
        batch, device = len(self.conditional), self.conditional.device
        return _Phase(
            number=number,
            tokens=torch.zeros(batch, total, self.model.channels, device=device),
            masked=torch.ones(batch, total, dtype=torch.bool, device=device),
            order=self.noise.order(number, total),
            head=head,
            process=process,
        )

    def _context(self, cfg: float) -> Tensor:
        """Context of the conditional half and, with guidance, of the other one below it."""
        if cfg == 1:
            return self.conditional
        return torch.cat([self.conditional, self.model.drop(self.conditional)])  # [2B, G, D]

    def _known(self, phase: _Phase, now: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """The known tokens [B or 2B, V, C] and their places, while `now` tokens are masked."""
        places = phase.order[:, now:].sort(dim=1).values
        known = phase.tokens.gather(1, places[..., None].expand(-1, -1, self.model.channels))
        halves = len(context) // len(places)
        return known.repeat(halves, 1, 1), places.repeat(halves, 1)

    def _draw(self, phase: _Phase, step: int, z: Tensor, places: Tensor, w: float) -> None:
        """Draw the tokens of one step and mark them as known."""
        self.trace(f"z.{phase.number}.{step}", z)
        if phase.head.global_context:  # a whole image at a time: what is unknown is drawn anew in each step
            drawn = self._diffuse(phase, step, z, None, w)
            phase.tokens = torch.where(phase.masked[..., None], drawn, phase.tokens)
        else:
            index = places[..., None].expand(-1, -1, z.shape[-1])
            chosen = z.gather(1, index.repeat(len(z) // len(places), 1, 1))  # [B or 2B, m, D]
            drawn = self._diffuse(phase, step, chosen, places, w)
            phase.tokens = phase.tokens.scatter(1, index[..., : self.model.channels], drawn)
        phase.masked = phase.masked.scatter(1, places, False)
        self.trace(f"tokens.{phase.number}.{step}", phase.tokens)

    def _diffuse(self, phase: _Phase, step: int, z: Tensor, places: Tensor | None, w: float) -> Tensor:
        """Run the head's diffusion: of the tokens at `places`, or of all, known ones being imposed."""
        batch, total, channels = phase.tokens.shape
        if places is None:
            places = torch.arange(total, device=z.device).expand(batch, -1)
        draws = _Draws(self.noise, phase, step, places, channels)
        initial = draws(-1)
        impose = None
        if phase.head.global_context:
            known = ~phase.masked[..., None]

            def impose(x: Tensor, a: float) -> Tensor:
                noised = math.sqrt(a) * phase.tokens + math.sqrt(1 - a) * initial
                return torch.where(known, noised, x)

        predict = _guided(phase.head, z, batch, w)
        if self.settings.head_sampler == "ddpm":
            return ancestral(predict, initial, phase.process, draws, self.settings.temperature, impose)
        order: Literal[1, 2] = 1 if self.settings.head_sampler == "ddim" else 2
        return multistep(predict, initial, phase.process, order, impose)


def compile_heads(model: MaskedTransformer) -> None:
    """Compile the diffusion heads and let them replay CUDA graphs: they are called thousands of times an image."""
    for head in (model.pivot_head, model.dense_head):
        if head is not None:
            head.compile(mode="reduce-overhead", dynamic=False)
            head.graphed = True


def _guided(head: MlpHead | TransformerHead, z: Tensor, batch: int, w: float) -> Predict:
    """The head under guidance: it acts on the noise alone, the variance is that of the conditional half."""
    halves = len(z) // batch

    def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        times = torch.full((1, 1), t, device=x.device)
        if head.graphed:
            torch.compiler.cudagraph_mark_step_begin()  # the last call's outputs may be overwritten
        noise, value = head(x.repeat(halves, 1, 1), times, z)
        if halves == 1:
            return noise, value
        conditional, without = noise.chunk(2)
        guided = without + w * (conditional - without)
        return guided, None if value is None else value.chunk(2)[0]

    return predict


class _Draws:
    """Normal numbers of one step's diffusion, fetched for many diffusion steps at once."""

    def __init__(self, noise: Noise, phase: _Phase, step: int, places: Tensor, channels: int) -> None:
        self.noise, self.phase, self.step, self.places, self.channels = noise, phase, step, places, channels
        self.most = max(1, CHUNK // (places.numel() * channels))
        self.first, self.block = 0, torch.empty(0)

    def __call__(self, n: int) -> Tensor:
        """Numbers [B, m, C] of the n-th diffusion step; the initial noise for -1."""
        draw = n + 1
        if not self.first <= draw < self.first + len(self.block):
            stop = min(draw + self.most, len(self.phase.process.timesteps)) if draw else 1
            numbers = range(draw, max(stop, draw + 1))
            self.first = draw
            self.block = self.noise.normal(self.phase.number, self.step, numbers, self.places, self.channels)
        return self.block[draw - self.first]


def _steps(total: int, steps: int) -> list[tuple[int, int]]:
    """Tokens masked before and after each step.

    Raises:
        ValueError: more steps than tokens.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"expected 1 to {total} steps for {total} tokens, got {steps}")
    lengths = mask_lengths(total, steps)
    return list(zip([total, *lengths[:-1]], lengths, strict=True))


def _after(step: int, steps: int, left: int) -> int:
    """Tokens that stay masked: the last step draws all."""
    return 0 if step == steps - 1 else left
