"""Small networks that turn images into features, and pictures for them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hmar_cli.data.images import UNLABELLED, Example, ImageSource
from hmar_cli.data.transforms import Pixels
from hmar_cli.evaluation.extractors import Extractor, Features

FEATURES, CLASSES = 6, 4


class Toy(nn.Module):
    """Means of four quarters, mapped by random weights: the same numbers in every process."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.features = nn.Parameter(torch.randn(12, FEATURES, generator=draw), requires_grad=False)
        self.classes = nn.Parameter(torch.randn(FEATURES, CLASSES, generator=draw), requires_grad=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 6] and logits [B, 4] of uint8 [B, 3, H, W]."""
        quarters = nn.functional.adaptive_avg_pool2d(pixels.float() / 255, 2).flatten(1)
        features = quarters @ self.features
        return features, features @ self.classes


class Pooled(nn.Module):
    """Features alone, and something else unless it is told what to return."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()

    def forward(self, pixels: Tensor, return_features: bool = False) -> Tensor:
        """Features, or a constant."""
        features, logits = self.toy(pixels)
        return features if return_features else logits * 0


def network() -> nn.Module:
    """What `module:toy_extractors:network` makes."""
    return Toy()


def function() -> Callable[[Tensor], Tensor]:
    """A function that is no module."""
    return lambda pixels: pixels.float().mean(dim=(2, 3))


def broken() -> Callable[[Tensor], Tensor]:
    """Features that are not finite."""
    return lambda pixels: pixels.float().mean(dim=(2, 3)) / 0


def wrong_shape() -> Callable[[Tensor], Tensor]:
    """Features of places, not of images."""
    return lambda pixels: pixels.float()


def large() -> Callable[[Tensor], Tensor]:
    """A network for images of 16 pixels or more."""
    return lambda pixels: nn.functional.conv2d(pixels.float(), torch.ones(4, 3, 16, 16)).mean(dim=(2, 3))


def number() -> int:
    """No network at all."""
    return 3


def toy_extractor(name: str = "toy", class_names: tuple[str, ...] = (), **changes: object) -> Extractor:
    """The toy as an extractor; its spatial features are the image's own first row."""
    made = Toy()

    def look(pixels: Tensor) -> Features:
        features, logits = made(pixels)
        return Features(features, pixels[:, :, 0].flatten(1).float(), logits)

    given = {"fingerprint": name, "device": torch.device("cpu"), **changes}
    return Extractor(name=name, look=look, class_names=class_names, **given)  # type: ignore[arg-type]


def pictures(count: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> Pixels:
    """Noise around a colour of chance: [count, H, W, 3]."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (count, 1, 1, 3))
    noise = rng.normal(0, 40, (count, *size, 3))
    made: Pixels = (colours + noise).clip(0, 255).astype(np.uint8)
    return made


class Shown(ImageSource):
    """Pictures in memory; None cannot be read."""

    def __init__(
        self,
        images: Sequence[Pixels | None],
        labels: Sequence[int] = (0,),
        names: tuple[str, ...] = UNLABELLED,
    ) -> None:
        super().__init__("shown", names, len(images))
        self.images, self.labels = images, labels

    def example(self, index: int) -> Example:
        """One of them."""
        pixels = self.images[index]
        if pixels is None:
            return Example(index, None, error="broken")
        return Example(index, Image.fromarray(pixels), self.labels[index % len(self.labels)])


def save_pngs(folder: Path, images: Pixels) -> Path:
    """A folder of PNG files."""
    folder.mkdir(parents=True)
    for i, each in enumerate(images):
        Image.fromarray(each).save(folder / f"{i:06d}.png")
    return folder
