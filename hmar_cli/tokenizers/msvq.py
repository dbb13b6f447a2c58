"""The multi-scale VQ tokenizer: an image as K token maps, coarse to fine, of one codebook (VAR, section 3.2).

Letters: B batch, K scales of n_k tokens on h_k x w_k grids, L = sum of n_k, Z codebook channels, V codes, h w
the last grid (on which features and f_hat live), H W the image.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers.blocks import Decoder, Encoder, hash_weights, initialize

CHUNK = 1 << 26
"""Distances between vectors and codes that are held at once (256 MiB)."""


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in true float32 inside the block: no autocast, no TF32."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = conv


def phi_of_scale(scales: int, phis: int) -> list[int]:
    """Choose the residual convolution of every scale: the one whose tick is nearest to (k-1)/(K-1).

    Four ticks lie evenly from 1/12 to 11/12; other counts share [0, 1] in equal parts and take their centres.
    Ties go as float64 rounds them, which published weights depend on: of four phis, the middle one of an odd
    number of scales takes phi 2.

    Args:
        scales: K.
        phis: number of convolutions.
    """
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(edge, 1 - edge, phis)
    return [int(np.argmin(np.abs(ticks - k / max(scales - 1, 1)))) for k in range(scales)]


class Phi(nn.Conv2d):
    """Residual convolution: (1 - ratio) x + ratio conv(x)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, Z, h, w] to the same shape."""
        return (1 - self.ratio) * x + self.ratio * super().forward(x)


class _Step(NamedTuple):
    """One scale of residual quantization."""

    tokens: Tensor  # [B, n_k]
    added: Tensor  # [B, Z, h, w]
    vectors: Tensor  # [B, n_k, Z]: what the tokens stand for
    distances: Tensor  # [B, n_k]: squared, from vectors to codes


class Quantized(NamedTuple):
    """What a training step gets from the quantizer.

    Attributes:
        f_hat: [B, Z, h, w] float32; its gradient goes straight to the features.
        loss: the quantization loss, a scalar.
        tokens: [B, L] int64.
        vectors: [B, L, Z] float32, the residuals that were looked up; no gradient.
        distances: [B, L] float32, their squared distances to the codes; no gradient.
    """

    f_hat: Tensor
    loss: Tensor
    tokens: Tensor
    vectors: Tensor
    distances: Tensor


class ScaleQuantizer(nn.Module):
    """Residual quantization over scales; what is computed forward is float32, under autocast too.

    Args:
        scales: the token grids.
        z_channels: Z.
        vocab_size: V.
        phi_count: residual convolutions that the scales share.
        phi_ratio: share of the convolution in their output.
        commitment: weight of the encoder's term in the quantization loss.
    """

    def __init__(
        self,
        *,
        scales: Scales,
        z_channels: int,
        vocab_size: int,
        phi_count: int = 4,
        phi_ratio: float = 0.5,
        commitment: float = 0.25,
    ) -> None:
        super().__init__()
        self.scales, self.z_channels, self.vocab_size = scales, z_channels, vocab_size
        self.commitment = commitment
        self.codebook = nn.Embedding(vocab_size, z_channels)
        nn.init.normal_(self.codebook.weight, std=z_channels**-0.5)
        self.phis = nn.ModuleList(Phi(z_channels, phi_ratio) for _ in range(phi_count))
        self.phi_index = phi_of_scale(len(scales), phi_count)

    def nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Find the code of least Euclidean distance.

        Args:
            vectors: [N, Z].

        Returns:
            codes [N] int64, and the squared distances to them [N] float32.
        """
        codes = self.codebook.weight.detach().float()
        norms = codes.square().sum(dim=1)  # [V]
        found, least = [], []
        size = max(CHUNK // self.vocab_size, 1)
        for start in range(0, len(vectors), size):
            part = vectors[start : start + size].detach().float()  # [n, Z]
            distances = part.square().sum(dim=1, keepdim=True) + norms  # [n, V]
            smallest = distances.addmm_(part, codes.T, alpha=-2.0).min(dim=1)
            found.append(smallest.indices)
            least.append(smallest.values.clamp(min=0))
        return torch.cat(found), torch.cat(least)

    def contribution(self, tokens: Tensor, k: int, keep: Tensor | None = None) -> Tensor:
        """What the tokens of scale k add to f_hat: embedded, upsampled to the last grid, through phi.

        Args:
            tokens: [B, n_k], int64 in [0, V).
            k: the scale, from 0.
            keep: [B, n_k] or [n_k], bool; the embeddings of other tokens are zeros.

        Returns:
            [B, Z, h, w], float32.
        """
        with full_float32(self.codebook.weight.device):
            x = F.embedding(tokens, self.codebook.weight.float())  # [B, n_k, Z]
            if keep is not None:
                x = x * keep.unsqueeze(-1)
            x = x.transpose(1, 2).reshape(len(x), -1, *self.scales.grids[k])  # [B, Z, h_k, w_k]
            if self.scales.grids[k] != self.scales.grid:
                x = _enlarge(x, self.scales.grid)  # [B, Z, h, w]
            return self.phis[self.phi_index[k]](x)  # type: ignore[no-any-return]

    def scale_input(self, f_hat: Tensor, k: int) -> Tensor:
        """Area-downsample f_hat [B, Z, h, w] to the grid of scale k: [B, n_k, Z] float32, row-major."""
        return _at_grid(f_hat.float(), self.scales.grids[k]).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Turn features into tokens, coarse to fine (VAR, algorithm 1).

        Args:
            features: [B, Z, h, w].

        Returns:
            tokens [B, L] int64 and f_hat [B, Z, h, w] float32, the sum of all contributions.

        Raises:
            ValueError: features of another shape.
        """
        with full_float32(features.device):
            f_hat, tokens = torch.zeros_like(features, dtype=torch.float32), []
            for step in self._walk(features.float()):
                f_hat = f_hat + step.added
                tokens.append(step.tokens)
            return torch.cat(tokens, dim=1), f_hat

    def f_hat(self, tokens: Tensor) -> Tensor:
        """Sum the contributions of tokens [B, L], or of the whole scales in a shorter list: [B, Z, h, w]."""
        total = tokens.new_zeros(tokens.shape[0], self.z_channels, *self.scales.grid, dtype=torch.float32)
        for k in range(len(self.scales)):
            if self.scales.slice(k).stop <= tokens.shape[1]:
                total = total + self.contribution(tokens[:, self.scales.slice(k)], k)
        return total

    @torch.no_grad()
    def teacher_inputs(self, tokens: Tensor) -> Tensor:
        """Transformer inputs of every scale but the first: f_hat of all earlier scales, area-downsampled.

        Args:
            tokens: [B, L], int64.

        Returns:
            [B, L - n_1, Z], float32.
        """
        f_hat = self.f_hat(tokens[:, :0])  # zeros
        inputs = [f_hat.new_zeros(tokens.shape[0], 0, self.z_channels)]
        for k in range(len(self.scales) - 1):
            f_hat = f_hat + self.contribution(tokens[:, self.scales.slice(k)], k)
            inputs.append(self.scale_input(f_hat, k + 1))  # [B, n_{k+1}, Z]
        return torch.cat(inputs, dim=1)

    @torch.no_grad()
    def own_inputs(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Each scale's own contribution alone, area-downsampled to its grid, for all scales but the first.

        Args:
            tokens: [B, L], int64.
            keep: [B, L] or [L], bool; the embeddings of other tokens are zeroed before they are upsampled, so
                that nothing of them reaches their neighbours.

        Returns:
            [B, L - n_1, Z], float32.
        """
        own = [tokens.new_zeros(tokens.shape[0], 0, self.z_channels, dtype=torch.float32)]
        for k in range(1, len(self.scales)):
            part = self.scales.slice(k)
            kept = None if keep is None else keep[..., part]
            own.append(self.scale_input(self.contribution(tokens[:, part], k, kept), k))  # [B, n_k, Z]
        return torch.cat(own, dim=1)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize with gradients, for training (VAR, section 3.2, with VQ-VAE's two terms at every scale).

        Tokens and residuals carry no graph. Each scale's f_hat is pulled to the features, so that codebook
        and phis learn, and the features to f_hat, times `commitment`, so that the encoder does; the loss is
        the mean over scales.

        Args:
            features: [B, Z, h, w].

        Raises:
            ValueError: features of another shape.
        """
        with full_float32(features.device):
            features = features.float()
            target, f_hat, losses, steps = features.detach(), torch.zeros_like(features), [], []
            for step in self._walk(target):
                f_hat = f_hat + step.added
                losses.append(
                    F.mse_loss(f_hat, target) + self.commitment * F.mse_loss(features, f_hat.detach())
                )
                steps.append(step)
            return Quantized(
                features + (f_hat - features).detach(),
                torch.stack(losses).mean(),
                torch.cat([step.tokens for step in steps], dim=1),
                torch.cat([step.vectors for step in steps], dim=1),
                torch.cat([step.distances for step in steps], dim=1),
            )

    def _walk(self, features: Tensor) -> Iterator[_Step]:
        expected = (self.z_channels, *self.scales.grid)
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"expected features [B, {', '.join(map(str, expected))}], got {list(features.shape)}"
            )
        residual = features
        for k in range(len(self.scales)):
            vectors = self.scale_input(residual, k)  # [B, n_k, Z]
            codes, distances = self.nearest(vectors.flatten(0, 1))  # [B n_k]
            tokens = codes.reshape(vectors.shape[:2])  # [B, n_k]
            added = self.contribution(tokens, k)  # [B, Z, h, w]
            yield _Step(tokens, added, vectors, distances.view_as(tokens))
            residual = residual - added.detach()


def _at_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == grid else F.interpolate(x, size=grid, mode="area")


def _enlarge(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of x [B, Z, h_k, w_k] to a larger grid.

    By two products, since PyTorch's kernel gives a place to each thread of a GPU, which takes all channels of the
    batch in turn, and adds up gradients in any order.
    """
    rows, columns = (_bicubic_weights(*sides, x.device) for sides in zip(x.shape[-2:], grid, strict=True))
    return rows @ (x @ columns.T)


@cache  # forever: recorded CUDA graphs read them
def _bicubic_weights(short: int, long: int, device: torch.device) -> Tensor:
    """What each of `long` places takes of `short` ones in bicubic interpolation: [long, short] float32."""
    with torch.inference_mode(False):  # training may need them, too
        places = torch.eye(short, dtype=torch.float32, device="cpu")[None, None]
        return F.interpolate(places, size=(long, short), mode="bicubic")[0, 0].to(device)


class MultiScaleVQ(nn.Module):
    """Encoder, multi-scale quantizer and decoder (VAR, section 3.2).

    Layout and names of the weights are those of the published tokenizer, so that its weights load, except
    that the quantizer's are called `codebook` and `phis`.

    Args:
        channels: width of the convolutions at full resolution.
        multipliers: width of each level over `channels`; each level after the first halves the resolution.
        res_blocks: residual blocks a level.
        z_channels: Z.
        vocab_size: V.
        scales: the token grids.
        phi_count: residual convolutions that the scales share.
        phi_ratio: share of the convolution in their output.
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        z_channels: int,
        vocab_size: int,
        scales: Scales,
        phi_count: int = 4,
        phi_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        self.scales, self.vocab_size, self.z_channels = scales, vocab_size, z_channels
        self.stride = 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(
            channels=channels, multipliers=multipliers, res_blocks=res_blocks, out_channels=z_channels
        )
        self.decoder = Decoder(
            channels=channels, multipliers=multipliers, res_blocks=res_blocks, in_channels=z_channels
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        initialize(self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        self.quantizer = ScaleQuantizer(
            scales=scales,
            z_channels=z_channels,
            vocab_size=vocab_size,
            phi_count=phi_count,
            phi_ratio=phi_ratio,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the scales belong to."""
        return self.scales.grid[0] * self.stride, self.scales.grid[1] * self.stride

    def at_size(self, size: tuple[int, int]) -> "MultiScaleVQ":
        """This tokenizer for images of another size: the same weights, shared, and its scales in proportion.

        Args:
            size: height and width of the images.

        Raises:
            ValueError: a size that the stride does not divide, or one too small for so many scales.
        """
        if any(side < 1 or side % self.stride for side in size):
            raise ValueError(f"expected a size divisible by {self.stride}, got {list(size)}")
        if size == self.image_size:
            return self
        scales = self.scales.for_grid((size[0] // self.stride, size[1] // self.stride))
        other, quantizer = copy.copy(self), copy.copy(self.quantizer)
        other._modules = {**self._modules, "quantizer": quantizer}  # `copy` shares the dictionary, too
        other.scales = quantizer.scales = scales
        return other

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to features [B, Z, h, w], float32.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            height, width = self.image_size
            raise ValueError(f"expected images of shape (B, 3, {height}, {width}), got {tuple(images.shape)}")
        return self.quant_conv(self.encoder(images)).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to tokens [B, L], int64 in [0, V), coarse to fine and row-major.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        return self.quantizer.quantize(self.features(images))[0]

    def decode(self, f_hat: Tensor) -> Tensor:
        """Map f_hat [B, Z, h, w] to images [B, 3, H, W] in [-1, 1]."""
        return self.picture(f_hat).clamp(-1, 1)

    def picture(self, f_hat: Tensor) -> Tensor:
        """Map f_hat [B, Z, h, w] to images [B, 3, H, W] that are not clamped, as training needs them."""
        return self.decoder(self.post_quant_conv(f_hat)).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Map tokens [B, L] int64 to images [B, 3, H, W] in [-1, 1]; the last scales may be missing."""
        return self.decode(self.quantizer.f_hat(tokens))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images [B, 3, H, W] in [-1, 1]: the same shape and range.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        return self.decode_tokens(self.encode(images))

    def fingerprint(self) -> str:
        """The `fingerprint` of these weights."""
        return fingerprint(self.scales, self.state_dict())


def fingerprint(scales: Scales, weights: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over the scales and every weight by name; token caches are bound to it."""
    return hash_weights(weights, repr(scales.grids).encode())
