"""Training tokenizers: the multi-scale VQ tokenizer and the KL autoencoder.

Letters: B batch, K scales, L tokens of all scales, V codes, Z channels of the codebook or of the latents, H W
height and width of the image, h w those of the latents.
"""

from abc import abstractmethod

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.nn import functional as F

from hmar_cli.models.scales import Scales
from hmar_cli.settings import KlObjective, MsvqObjective, Reconstruction
from hmar_cli.tokenizers.kl import KlAutoencoder, divergence, sample_posterior
from hmar_cli.tokenizers.losses import (
    Lpips,
    PatchDiscriminator,
    RandomFeatureDistance,
    hinge_discriminator_loss,
    hinge_generator_loss,
    psnr,
)
from hmar_cli.tokenizers.msvq import MultiScaleVQ, Quantized
from hmar_cli.training.objective import Objective

Terms = dict[str, Tensor]


class CodeUsage:
    """Counts, over all processes, which codes each scale uses, and replaces codes that none does.

    Args:
        scales: the token grids.
        vocab_size: V.
        window: steps over which usage is reported.
        revive_after: steps after which an unused code is replaced; 0 never.
    """

    def __init__(self, scales: Scales, vocab_size: int, window: int, revive_after: int) -> None:
        self.scales, self.window, self.revive_after = scales, window, revive_after
        self.hits = torch.zeros(len(scales), vocab_size, dtype=torch.int32)  # since the last step
        self.age = torch.full_like(self.hits, window)  # steps since the last hit
        self.idle = torch.zeros(vocab_size, dtype=torch.int32)  # the same over all scales, or since revival
        self.vectors, self.distances = torch.empty(0), torch.empty(0)

    def count(self, quantized: Quantized) -> None:
        """Take note of one micro-batch's tokens, and of the vectors that they stand for."""
        device = quantized.tokens.device
        self.hits, self.age, self.idle = (x.to(device) for x in (self.hits, self.age, self.idle))
        for k in range(len(self.scales)):
            self.hits[k, quantized.tokens[:, self.scales.slice(k)].flatten()] = 1
        self.vectors, self.distances = quantized.vectors.flatten(0, 1), quantized.distances.flatten()

    def shares(self) -> tuple[Tensor, Tensor]:
        """Share of the codes used in the last `window` steps, by any scale and by each one [K]."""
        used = self.age < self.window
        return used.any(dim=0).float().mean(), used.float().mean(dim=1)

    def step(self) -> None:
        """End an optimizer step."""
        if distributed.is_initialized():
            distributed.all_reduce(self.hits, distributed.ReduceOp.MAX)
        self.age = torch.where(self.hits > 0, 0, self.age + 1).to(torch.int32)
        self.idle = torch.where(self.hits.any(dim=0), 0, self.idle + 1).to(torch.int32)
        self.hits.zero_()

    @torch.no_grad()
    def revive(self, codebook: Tensor, step: int) -> None:
        """Replace idle codes, in place, by vectors of the last micro-batch that are badly represented.

        A vector is drawn in proportion to its squared distance to its code, as k-means++ seeds its centres.

        Args:
            codebook: [V, Z].
            step: seeds the draw.
        """
        generator = torch.Generator(codebook.device).manual_seed(step)
        luck = torch.empty_like(self.distances).exponential_(generator=generator)
        best = (self.distances / luck).topk(min(len(self.distances), len(codebook))).indices
        candidates = self.vectors[best].to(codebook.dtype)  # [min(BL, V), Z]
        if distributed.is_initialized():
            distributed.broadcast(candidates, 0)
        dead = self.idle >= self.revive_after  # [V]
        place = (dead.cumsum(0) - 1).clamp(min=0) % len(candidates)
        codebook.copy_(torch.where(dead[:, None], candidates[place], codebook))
        self.idle = torch.where(dead, 0, self.idle).to(torch.int32)


class TokenizerTraining(Objective):
    """What training any tokenizer shares: reconstruction, perceptual and adversarial terms (VQGAN, section 3.1).

    Reported: `loss`, `reconstruction` (l1 and l2 terms), `perceptual`, `psnr`, with a discriminator `adversarial`
    and `discriminator`, and what the subclass adds.

    Args:
        model: the tokenizer, with `encoder` and `decoder`.
        halvings: of the discriminator.
        settings: weights of the terms.
    """

    model: MultiScaleVQ | KlAutoencoder

    def __init__(self, model: MultiScaleVQ | KlAutoencoder, halvings: int, settings: Reconstruction) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.perceptual: nn.Module | None = None
        if settings.perceptual != "none" and settings.perceptual_weight:
            random = settings.perceptual == "random"
            self.perceptual = RandomFeatureDistance() if random else Lpips(settings.lpips_weights)
        self.networks = {"model": model}
        self.discriminator: nn.Module | None = None
        if settings.adversarial_weight:
            self.discriminator = PatchDiscriminator(settings.discriminator_channels, halvings)
            self.networks["discriminator"] = self.discriminator
        self.unused_parameters = self.discriminator is not None

    @abstractmethod
    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Terms, Terms]:
        """Encode and decode with gradients.

        Args:
            images: [B, 3, H, W] in [-1, 1].

        Returns:
            Pictures [B, 3, H, W], not clamped; what the bottleneck adds to the loss, a scalar; its terms; and
            its metrics, detached.
        """

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch with "image" [B, 3, H, W], uint8 or in [-1, 1]."""
        images = to_signed(batch["image"])
        pictures, bottleneck, own, extra = self.reconstruct(images)  # [B, 3, H, W]
        terms = {
            "reconstruction": self.settings.l1 * F.l1_loss(pictures, images)
            + self.settings.l2 * F.mse_loss(pictures, images),
            **own,
        }
        loss = terms["reconstruction"] + bottleneck
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, pictures).mean()
            loss = loss + self.settings.perceptual_weight * terms["perceptual"]
        if self.discriminator is not None:
            generator, terms["discriminator"] = self._adversarial(images, pictures, progress)
            terms["adversarial"] = generator
            loss = loss + self.settings.adversarial_weight * generator + terms["discriminator"]
        metrics = {name: term.detach().float() for name, term in {"loss": loss, **terms}.items()}
        metrics["psnr"] = psnr(images, pictures.detach()).mean()
        return loss, metrics | extra

    def _adversarial(self, images: Tensor, pictures: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        assert self.discriminator is not None
        if progress < self.settings.adversarial_start:
            rest = images.new_zeros(())
            return rest, rest
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        generator = hinge_generator_loss(functional_call(self.discriminator, frozen, (pictures,)))
        scores = self.discriminator(torch.cat([images, pictures.detach()]))  # [2B, 1, h, w]
        return generator, hinge_discriminator_loss(*scores.chunk(2))

    def compile_networks(self) -> None:
        """Compile the encoder and the decoder; the tokenizer is never called as a whole."""
        self.model.encoder.compile()
        self.model.decoder.compile()


class MsvqTraining(TokenizerTraining):
    """Training the multi-scale VQ tokenizer: the terms of any tokenizer, and quantization (VAR, section 3.2).

    Reported beside what `TokenizerTraining` reports: `quantization`, `usage` (the share of codes used lately)
    and `usage_per_scale` (K numbers).

    Args:
        model: the tokenizer.
        settings: weights of the terms, and when an unused code is replaced.
    """

    model: MultiScaleVQ

    def __init__(self, model: MultiScaleVQ, settings: MsvqObjective) -> None:
        side = min(model.image_size)
        super().__init__(model, 3 if side >= 128 else 2 if side >= 16 else 1, settings)
        self.model.quantizer.commitment = settings.commitment
        idle_phis = len(set(model.quantizer.phi_index)) < len(model.quantizer.phis)
        self.unused_parameters = idle_phis or self.discriminator is not None
        self.usage = CodeUsage(
            model.scales, model.vocab_size, settings.revive_after or 200, settings.revive_after
        )

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Terms, Terms]:
        """Quantize images [B, 3, H, W] in [-1, 1] and decode them; counts the codes in training."""
        quantized: Quantized = self.model.quantizer(self.model.features(images))
        pictures = self.model.picture(quantized.f_hat)  # [B, 3, H, W]
        if self.training:
            self.usage.count(quantized)
        metrics = dict(zip(("usage", "usage_per_scale"), self.usage.shares(), strict=True))
        return pictures, quantized.loss, {"quantization": quantized.loss}, metrics

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """The codebook is not decayed, nor are biases and norms."""
        return "codebook" in name or super().undecayed(name, parameter)

    def on_step(self, step: int) -> None:
        """Count usage; ten times in `revive_after` steps, replace codes that were idle that long."""
        self.usage.step()
        every = max(self.usage.revive_after // 10, 1)
        if self.usage.revive_after and step % every == 0:
            self.usage.revive(self.model.quantizer.codebook.weight, step)

    def resume_state(self) -> dict[str, Tensor]:
        """The usage counters."""
        return {"usage.age": self.usage.age, "usage.idle": self.usage.idle}

    def load_resume_state(self, state: dict[str, Tensor]) -> None:
        """Take the usage counters back."""
        device = self.usage.age.device
        self.usage.age = state["usage.age"].to(device)
        self.usage.idle = state["usage.idle"].to(device)


class KlTraining(TokenizerTraining):
    """Training the KL autoencoder: the terms of any tokenizer, and the divergence from a standard normal.

    The loss is that of latent diffusion (Rombach et al. 2022, appendix G), per number of the image: there the
    reconstruction is summed over an image's 3 H W numbers and the divergence over its Z h w latents; here both
    sums are divided by 3 H W. So a weight of 1e-6 means the same, and the other terms are those of `MsvqTraining`.
    The decoder gets a fresh draw from the posterior in every step.

    Reported beside what `TokenizerTraining` reports: `kl`, the divergence in nats a latent number (so that a
    weight and an image size don't change its meaning), and `latent_std` of the drawn latents, before any scale.

    Args:
        model: the autoencoder.
        settings: weights of the terms.
    """

    model: KlAutoencoder

    def __init__(self, model: KlAutoencoder, settings: KlObjective) -> None:
        super().__init__(model, 3 if model.stride >= 16 else 2 if model.stride >= 4 else 1, settings)
        self.kl_weight = settings.kl_weight

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor, Terms, Terms]:
        """Draw latents of images [B, 3, H, W] in [-1, 1] and decode them."""
        moments = self.model.moments(images)  # [B, 2Z, h, w]
        z = sample_posterior(moments, torch.randn_like(moments.chunk(2, dim=1)[0]))  # [B, Z, h, w]
        total = divergence(moments).sum()
        bottleneck = self.kl_weight * total / images.numel()
        return self.model.decode(z), bottleneck, {"kl": total / z.numel()}, {"latent_std": z.detach().std()}


def to_signed(images: Tensor) -> Tensor:
    """Turn uint8 images into float32 in [-1, 1]; leave float ones, but for their dtype."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
