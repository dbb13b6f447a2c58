"""The KL autoencoder: an image as a grid of continuous latent tokens (latent diffusion, Rombach et al. 2022).

Letters: B batch, Z latent channels, H W height and width of the image, h w those of its latents: H W over the
stride.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hmar_cli.tokenizers.blocks import Decoder, Encoder, hash_weights, initialize

LOG_VARIANCE = (-30.0, 20.0)
"""Range to which the encoder's log-variance is clamped, as published."""
INITIAL_LOG_VARIANCE = -4.0
"""Where the log-variance starts: noise that is small beside the unit variance of the initial means."""


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Split moments [B, 2Z, h, w] into mean and standard deviation, both [B, Z, h, w]."""
    mean, log_variance = moments.chunk(2, dim=1)  # 2 x [B, Z, h, w]
    return mean, (0.5 * log_variance.clamp(*LOG_VARIANCE)).exp()


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw latents, without any latent scale: mean + std * noise.

    Args:
        moments: [B, 2Z, h, w].
        noise: standard normal, [B, Z, h, w].
    """
    mean, std = posterior(moments)
    return mean + std * noise


def divergence(moments: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the posterior from a standard normal, a sum over the latents: [B]."""
    mean, log_variance = moments.chunk(2, dim=1)  # 2 x [B, Z, h, w]
    log_variance = log_variance.clamp(*LOG_VARIANCE)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))


class KlAutoencoder(nn.Module):
    """Encoder to a normal distribution, and decoder of a draw from it; MAR's KL-16 with the defaults of its recipe.

    Layout and names of the weights are those of the published autoencoder, so that its weights load, except
    that the blocks are named as in `blocks.py` and the three convolutions of an attention are one.

    Args:
        channels: width of the convolutions at full resolution.
        multipliers: width of each level over `channels`; each level after the first halves the resolution.
        res_blocks: residual blocks a level.
        z_channels: Z.
        attention: attention in the encoder's last level too, not only in the middle.
        latent_scale: what latents are multiplied by so that their standard deviation is 1; 0 is not measured yet.

    Attributes:
        stride: pixels per token side.
        z_channels: Z.
        latent_scale: as given; `decode_latents` reads it, nothing else does.
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        z_channels: int,
        attention: bool = True,
        latent_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.z_channels, self.latent_scale = z_channels, latent_scale
        self.stride = 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(
            channels=channels,
            multipliers=multipliers,
            res_blocks=res_blocks,
            out_channels=2 * z_channels,
            attention=attention,
        )
        self.decoder = Decoder(
            channels=channels,
            multipliers=multipliers,
            res_blocks=res_blocks,
            in_channels=z_channels,
            attention=False,
        )
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        initialize(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        with torch.no_grad():
            self.quant_conv.weight[z_channels:] = 0
            self.quant_conv.bias[z_channels:] = INITIAL_LOG_VARIANCE  # type: ignore[index]

    def moments(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to mean and log-variance [B, 2Z, h, w], float32 and not clamped.

        Raises:
            ValueError: images without three channels, or of sides that the stride does not divide.
        """
        sides = images.shape[2:]
        fits = images.ndim == 4 and images.shape[1] == 3
        if not fits or any(side < self.stride or side % self.stride for side in sides):
            raise ValueError(
                f"expected images [B, 3, H, W] with sides divisible by {self.stride}, got {list(images.shape)}"
            )
        return self.quant_conv(self.encoder(images)).float()  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        """Map latents [B, Z, h, w], without latent scale, to images [B, 3, H, W], float32 and not clamped."""
        return self.decoder(self.post_quant_conv(z)).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Map latents [B, Z, h, w] that are multiplied by the latent scale to images [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: the latent scale is not known.
        """
        if not self.latent_scale:
            raise ValueError("expected a tokenizer whose latent scale is known, got latent_scale 0")
        return self.decode(latents / self.latent_scale).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images [B, 3, H, W] in [-1, 1] through the posterior's mean: the same shape and range.

        Raises:
            ValueError: as `moments`.
        """
        return self.decode(posterior(self.moments(images))[0]).clamp(-1, 1)

    def fingerprint(self) -> str:
        """The `fingerprint` of these weights."""
        return fingerprint(self.state_dict())


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over every weight by name; latent caches are bound to it."""
    return hash_weights(weights, b"kl")
