"""Sampling of MAR and Hi-MAR: tokens are drawn in a random order, some more in each step, by a diffusion head.

Letters: B images, G context tokens, S pivots, N dense tokens, n tokens of a phase, m those drawn in a step, C latent
channels, D width of the transformer.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hmar_cli.models.diffusion import Diffusion, Predict, ancestral, multistep, process_for
from hmar_cli.models.heads import DiffusionHead
from hmar_cli.models.masked import MaskedTransformer, gather_tokens, scatter_tokens
from hmar_cli.settings import CfgSchedule, MaskedArSample

CHUNK = 1 << 23
"""Normal numbers that are drawn at once, for as many diffusion steps as that covers."""


class Noise(Protocol):
    """What the sampler needs of a source of random numbers."""

    def order(self, phase: int, n: int) -> Tensor:
        """Permutations [B, n] int64, in which the tokens of a phase are drawn from the end."""

    def normal(self, phase: int, step: int, draws: range, places: Tensor, channels: int) -> Tensor:
        """Standard normal numbers [len(draws), B, m, C] of the tokens at `places` [B, m] in one step.

        Draw 0 is the initial noise of the diffusion, draw n that of its n-th step.
        """


Trace = Callable[[str, Tensor], None]
"""Receives intermediate tensors by name (`z.0.3`, `tokens.1.0`: phase, step), for tests and analyses."""


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


@dataclass(frozen=True)
class KnownTokens:
    """Tokens of a phase that are known from the start, of a picture (see `editing.py`).

    Attributes:
        tokens: [B, n, C] float32, the picture's scaled latents.
        region: [n] bool, the tokens that may be drawn anew, the same ones in every image.
        count: how many of them are: those that come last in an image's order.
    """

    tokens: Tensor
    region: Tensor
    count: int


@torch.inference_mode()
def sample_masked(
    model: MaskedTransformer,
    condition: Tensor | None,
    settings: MaskedArSample,
    noise: Noise,
    *,
    trace: Trace | None = None,
    processes: tuple[Diffusion, Diffusion] | None = None,
    known: tuple[KnownTokens | None, KnownTokens | None] = (None, None),
) -> Sampled:
    """Draw the tokens of a batch of images (MAR section 3.3; Hi-MAR sections 3.2 and 3.3).

    Args:
        model: in evaluation mode.
        condition: as `MaskedTransformer.context` takes it, B rows; None draws images of no condition.
        settings: steps, guidance and the heads' sampler. Without a condition guidance other than 1 is wasted time.
        noise: source of the random numbers.
        trace: receives intermediate tensors.
        processes: diffusion processes of the pivots' and the dense head; by default what the settings say.
        known: what is known of the pivots and of the dense tokens; by default nothing. A phase then takes at most as
            many steps as it has tokens to draw.

    Returns:
        Latents, still scaled: the tokenizer divides them by its scale.

    Raises:
        ValueError: more steps than tokens, or a temperature for a sampler without noise.
        FloatingPointError: latents that are not finite.
    """
    if settings.head_sampler != "ddpm" and settings.temperature != 1:
        raise ValueError(f'expected temperature 1 for "{settings.head_sampler}", which adds no noise')
    run = _Run(model, condition, settings, noise, trace or (lambda name, tensor: None), known)
    method = settings.head_sampler
    first, second = processes or (
        process_for(method, settings.pivot_head_steps),
        process_for(method, settings.head_steps),
    )
    pivots = guides = None
    if model.pivot_grid is not None:
        pivots, guides = run.pivot_phase(first)
    dense = run.dense_phase(guides, second)
    finite = dense.isfinite().all() if pivots is None else dense.isfinite().all() & pivots.isfinite().all()
    if not finite:
        raise FloatingPointError("the model's latents are not finite")
    pivot_map = None
    if pivots is not None and model.pivot_grid is not None:
        pivot_map = torch.unflatten(pivots.transpose(1, 2), 2, model.pivot_grid)
    return Sampled(torch.unflatten(dense.transpose(1, 2), 2, model.grid), pivot_map)


class _Run:
    """One call of the sampler."""

    def __init__(
        self,
        model: MaskedTransformer,
        condition: Tensor | None,
        settings: MaskedArSample,
        noise: Noise,
        trace: Trace,
        known: tuple[KnownTokens | None, KnownTokens | None],
    ) -> None:
        self.model, self.settings, self.noise, self.trace = model, settings, noise, trace
        self.known = known  # by phase
        self.conditional = model.context(condition)  # [B or 1, G, D]

    def pivot_phase(self, process: Diffusion) -> tuple[Tensor, Tensor]:
        """Draw the pivots: latents [B, S, C], and what phase 2 sees of them, [B, S, D].

        A pivot's conditional token is the one of the step that drew it, of the conditional half. Pivots that were
        known have none: as in training, the learned empty ones stand for them.
        """
        model, settings = self.model, self.settings
        assert model.pivot_head is not None
        phase = _Phase(self, 0, model.pivot_count, model.pivot_head, process)
        batch, total = phase.order.shape
        context = self._context(settings.pivot_cfg, batch)
        conditional = context.new_zeros(batch, total, context.shape[-1])  # [B, S, D]
        hidden = None if self.known[0] is None else ~phase.masked  # [B, S]
        for step, w in phase.steps(settings.pivot_steps, settings.pivot_cfg, settings.pivot_cfg_schedule):
            z = model.pivot_phase(context, *phase.known(context))  # [B or 2B, S, D]
            conditional = scatter_tokens(conditional, phase.places, gather_tokens(z[:batch], phase.places))
            phase.draw(step, z, w)
        if model.pivots == "visual":
            return phase.tokens, model.guides(phase.tokens)
        return phase.tokens, model.guides(conditional, hidden)

    def dense_phase(self, guides: Tensor | None, process: Diffusion) -> Tensor:
        """Draw the dense tokens [B, N, C]; both halves of guidance see the same pivots."""
        model, settings = self.model, self.settings
        phase = _Phase(self, 1, math.prod(model.grid), model.dense_head, process)
        context = self._context(settings.cfg, len(phase.order))
        if guides is not None:
            guides = guides.repeat(len(context) // len(guides), 1, 1)
        for step, w in phase.steps(settings.steps, settings.cfg, settings.cfg_schedule):
            phase.draw(step, model.dense_phase(context, guides, *phase.known(context)), w)
        return phase.tokens

    def _context(self, cfg: float, batch: int) -> Tensor:
        """Context [B or 2B, G, D] of the conditional half and, with guidance, of the other one below it."""
        conditional = self.conditional.expand(batch, -1, -1)
        if cfg == 1:
            return conditional
        return torch.cat([conditional, self.model.drop(conditional)])


class _Phase:
    """The tokens of a phase while they are drawn.

    Attributes:
        order: [B, n], in which tokens are drawn from place `unknown` - 1 down to 0; those behind are known.
        tokens: [B, n, C], zeros where nothing is drawn yet.
        masked: [B, n] bool, what is not known yet.
        visible: [B, V] places of the known tokens.
        places: [B, m] places of those that the current step draws.
    """

    def __init__(self, run: _Run, number: int, total: int, head: DiffusionHead, process: Diffusion) -> None:
        self.run, self.number, self.head, self.process = run, number, head, process
        self.order, self.unknown = run.noise.order(number, total), total  # [B, n]: drawn from the end
        self.tokens = torch.zeros(*self.order.shape, run.model.channels, device=self.order.device)
        self.masked = torch.ones_like(self.order, dtype=torch.bool)
        if (known := run.known[number]) is not None:
            known_last = (~known.region)[self.order].int().argsort(dim=1, stable=True)
            self.order, self.unknown = self.order.gather(1, known_last), known.count
            self.masked = torch.zeros_like(self.masked).scatter(1, self.order[:, : known.count], True)
            self.tokens = torch.where(self.masked[..., None], self.tokens, known.tokens)
        self.visible = self.places = self.order[:, :0]

    def steps(self, steps: int, cfg: float, schedule: CfgSchedule) -> Iterator[tuple[int, float]]:
        """Go through the steps, with the guidance of each.

        Raises:
            ValueError: more steps than tokens.
        """
        total = self.order.shape[1]
        if not 1 <= steps <= total:
            raise ValueError(f"expected 1 to {total} steps for {total} tokens, got {steps}")
        now = self.unknown
        steps = min(steps, now)
        for step, left in enumerate(mask_lengths(now, steps)):
            then = 0 if step == steps - 1 else left  # the last step draws all
            self.visible = self.order[:, now:].sort(dim=1).values
            self.places = self.order[:, then:now].sort(dim=1).values
            yield step, guidance(cfg, schedule, total, left)
            self.masked = self.masked.scatter(1, self.places, False)
            now = then

    def known(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The known tokens [B or 2B, V, C] and their places, for each half of `context`."""
        halves = len(context) // len(self.tokens)
        known = gather_tokens(self.tokens, self.visible)
        return known.repeat(halves, 1, 1), self.visible.repeat(halves, 1)

    def draw(self, step: int, z: Tensor, w: float) -> None:
        """Draw a step's tokens from conditional tokens z [B or 2B, n, D] under guidance w."""
        self.run.trace(f"z.{self.number}.{step}", z)
        if self.head.global_context:  # a whole image at a time: what is unknown is drawn anew in each step
            every = torch.arange(z.shape[1], device=z.device).expand(len(self.tokens), -1)
            drawn = self._diffuse(step, z, every, w)
            self.tokens = torch.where(self.masked[..., None], drawn, self.tokens)
        else:
            chosen = gather_tokens(z, self.places.repeat(len(z) // len(self.places), 1))
            self.tokens = scatter_tokens(
                self.tokens, self.places, self._diffuse(step, chosen, self.places, w)
            )
        self.run.trace(f"tokens.{self.number}.{step}", self.tokens)

    def _diffuse(self, step: int, z: Tensor, places: Tensor, w: float) -> Tensor:
        """Run the head's diffusion of the tokens at `places`; known tokens among them are imposed."""
        settings, draws = self.run.settings, _Draws(self, step, places)
        initial = draws(0)
        impose = None
        if self.head.global_context and settings.impose_known:
            known, tokens = ~self.masked[..., None], self.tokens

            def impose(x: Tensor, a: float) -> Tensor:
                return torch.where(known, math.sqrt(a) * tokens + math.sqrt(1 - a) * initial, x)

        exact = self.process.timesteps[-1] if settings.head_sampler == "ddpm" else None
        predict = _guided(self.head, z, len(places), w, exact)
        if settings.head_sampler == "ddpm":
            return ancestral(predict, initial, self.process, draws, settings.temperature, impose)
        return multistep(predict, initial, self.process, 1 if settings.head_sampler == "ddim" else 2, impose)


def compile_heads(model: MaskedTransformer, half: bool) -> None:
    """Let compiled copies of the diffusion heads draw, which replay CUDA graphs: they are called thousands of times.

    Each number of tokens that a step draws is compiled for itself.

    Args:
        model: on its device.
        half: keep the copies' weights in bfloat16, under autocast: it would convert them anew in every call.
    """
    torch._dynamo.config.recompile_limit = 64
    for head in (model.pivot_head, model.dense_head):
        if head is not None and head.fast is None:
            fast = copy.deepcopy(head).requires_grad_(False)
            for layer in fast.modules():
                if half and isinstance(layer, nn.Linear):
                    layer.to(torch.bfloat16)
            fast.compile(mode="reduce-overhead", dynamic=False)
            head.fast = (fast,)


def _guided(head: DiffusionHead, z: Tensor, batch: int, w: float, exact: int | None) -> Predict:
    """The head under guidance: it acts on the noise alone, the variance is that of the conditional half.

    At the timestep `exact` the head runs in float32: ancestral sampling begins where next to nothing of the token is
    left, and multiplies what the head is off by with some hundreds.
    """
    halves = len(z) // batch

    def predict(x: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
        times = torch.full((1, 1), t, device=x.device)
        if t == exact:
            with torch.autocast(x.device.type, enabled=False):
                noise, value = head(x.repeat(halves, 1, 1), times, z.float())
        elif head.fast is not None:
            torch.compiler.cudagraph_mark_step_begin()  # the last call's outputs may be overwritten
            noise, value = head.fast[0](x.repeat(halves, 1, 1), times, z)
        else:
            noise, value = head(x.repeat(halves, 1, 1), times, z)
        if halves == 1:
            return noise, value
        conditional, without = noise.chunk(2)
        guided = without + w * (conditional - without)
        return guided, None if value is None else value.chunk(2)[0]

    return predict


class _Draws:
    """Normal numbers of one step's diffusion, fetched for many diffusion steps at once."""

    def __init__(self, phase: _Phase, step: int, places: Tensor) -> None:
        self.phase, self.step, self.places = phase, step, places
        self.most = max(1, CHUNK // (places.numel() * phase.run.model.channels))
        self.first, self.block = 0, torch.empty(0)

    def __call__(self, n: int) -> Tensor:
        """Numbers [B, m, C] of the n-th diffusion step, from 1; the initial noise for 0."""
        if not self.first <= n < self.first + len(self.block):
            run, steps = self.phase.run, len(self.phase.process.timesteps)
            numbers = range(n, min(n + self.most, steps) if n else 1)
            self.first = n
            self.block = run.noise.normal(
                self.phase.number, self.step, numbers, self.places, run.model.channels
            )
        return self.block[n - self.first]
