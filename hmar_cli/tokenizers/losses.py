"""Losses that train tokenizers: perceptual distances, and a patch discriminator with the hinge loss.

Letters: B batch, C channels, H W height and width.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.errors import UserError
from hmar_cli.tokenizers.blocks import group_norm

VGG_SLICES = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
"""VGG16's convolutions (place in its list of layers, channels in and out), cut before each pooling."""


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, [B]; both [B, C, H, W] in [-1, 1]."""
    error = (images.float() - reconstructions.float().clamp(-1, 1)).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def feature_distance(a: Iterable[Tensor], b: Iterable[Tensor], weights: Iterable[Tensor | None]) -> Tensor:
    """Sum over layers of the mean squared distance between features of unit length (LPIPS, equation 1).

    Args:
        a: features [B, C, H, W] of each layer.
        b: features of the other images.
        weights: [1, C, 1, 1] for each layer, or None to weigh all channels by 1.

    Returns:
        [B].
    """
    total = []
    for x, y, weight in zip(a, b, weights, strict=True):
        unit_x = x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
        unit_y = y / (y.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
        squared = (unit_x - unit_y).square()
        squared = squared if weight is None else squared * weight
        total.append(squared.sum(dim=1).mean(dim=(1, 2)))  # [B]
    return torch.stack(total).sum(dim=0)


class RandomFeatureDistance(nn.Module):
    """Perceptual distance by features of a fixed random network, at three resolutions; needs no download.

    Random convolutions keep much of what trained ones see of texture and edges. The weights follow from the
    seed alone, on every machine, and are no part of any checkpoint.

    Args:
        channels: width of the first layer; the second and third have twice that.
        seed: of the weights.
    """

    weight_0: Tensor
    weight_1: Tensor
    weight_2: Tensor
    bias_0: Tensor
    bias_1: Tensor
    bias_2: Tensor

    def __init__(self, channels: int = 32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [3, channels, 2 * channels, 2 * channels]
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            weight = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
            self.register_buffer(f"weight_{i}", weight, persistent=False)
            bias = torch.randn(c_out, generator=generator) * 0.1
            self.register_buffer(f"bias_{i}", bias, persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of images [B, 3, H, W]: three layers at full, half and quarter resolution."""
        found = []
        for _ in range(3):
            x = images
            for i in range(3):
                weight, bias = self.get_buffer(f"weight_{i}"), self.get_buffer(f"bias_{i}")
                x = F.relu(F.conv2d(x, weight, bias, padding=1, stride=2 if i == 1 else 1))  # [B, C, h, w]
                found.append(x)
            if min(images.shape[-2:]) < 8:
                break
            images = F.avg_pool2d(images, 2)  # [B, 3, H / 2, W / 2]
        return found

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair, [B]; both [B, 3, H, W] in [-1, 1]."""
        with torch.no_grad():
            wanted = self.features(images)
        distance = feature_distance(self.features(reconstructions), wanted, [None] * len(wanted))
        return distance / len(wanted)


class Lpips(nn.Module):
    """LPIPS with VGG16 (Zhang et al. 2018), version 0.1, through the weights that torch-fidelity distributes.

    Args:
        weights: a file with the state dict of the `lpips` or `torch_fidelity` module for VGG (torch or
            safetensors format, VGG16 included); empty lets torch-fidelity download both parts.

    Raises:
        UserError: the file does not exist or holds other weights, or the download failed.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str = "") -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                f"slice{i}": nn.ModuleDict(
                    {str(place): nn.Conv2d(a, b, 3, padding=1) for place, a, b in layers}
                )
                for i, layers in enumerate(VGG_SLICES, start=1)
            }
        )
        self.lin = nn.ParameterList(nn.Parameter(torch.ones(1, s[-1][2], 1, 1)) for s in VGG_SLICES)
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self._load(_read_weights(weights) if weights else _download_weights(), weights or "the download")
        self.requires_grad_(False)

    def _load(self, state: dict[str, Tensor], origin: str) -> None:
        own = {f"lin.{i}": state.get(f"lin{i}.model.1.weight") for i in range(len(VGG_SLICES))}
        own |= {name: state.get(name) for name in self.state_dict() if name.startswith("net.")}
        if missing := [name for name, value in own.items() if value is None]:
            raise UserError(
                f"no LPIPS weights for VGG in {origin}: {missing[0]} is missing",
                "save `lpips.LPIPS(net='vgg').state_dict()` to a file, or leave lpips_weights empty",
            )
        self.load_state_dict({name: value for name, value in own.items() if value is not None})

    def features(self, images: Tensor) -> list[Tensor]:
        """Features of images [B, 3, H, W] in [-1, 1] at five depths."""
        x, found = (images - self.shift) / self.scale, []
        for i, layers in enumerate(VGG_SLICES, start=1):
            x = x if i == 1 else F.max_pool2d(x, 2)  # [B, C, H / 2, W / 2]
            for place, _, _ in layers:
                x = F.relu(self.get_submodule(f"net.slice{i}.{place}")(x))  # [B, C', H, W]
            found.append(x)
        return found

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair, [B]; both [B, 3, H, W] in [-1, 1], sides of 16 or more."""
        with torch.no_grad():
            wanted = self.features(images)
        return feature_distance(self.features(reconstructions), wanted, self.lin)


def _read_weights(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"no file of LPIPS weights at {path}", "correct lpips_weights, or leave it empty")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state if isinstance(state, dict) else {}


def _download_weights() -> dict[str, Tensor]:
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    try:
        state: dict[str, Tensor] = SampleSimilarityLPIPS("lpips-vgg16").state_dict()
    except OSError as error:
        raise UserError(
            f"could not download LPIPS weights: {error}",
            "set objective.lpips_weights to a local file, or objective.perceptual to 'random'",
        ) from error
    return state


class PatchDiscriminator(nn.Module):
    """Tells real from reconstructed patches (PatchGAN, Isola et al. 2017); GroupNorm leaves it without state.

    Args:
        channels: width of the first layer; it doubles at every halving, up to 8 times.
        halvings: layers of stride 2; 3 sees patches of 70x70 pixels, 2 of 34x34.
    """

    def __init__(self, channels: int = 64, halvings: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, halvings + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < halvings else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1),
                group_norm(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] in [-1, 1] to one float32 score a patch, [B, 1, h, w]; high is real."""
        return self.layers(images).float()  # type: ignore[no-any-return]


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on scores of any shape (Geometric GAN, Lim and Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator on the discriminator's scores of its output."""
    return -fake.mean()
