"""A compact residual network that names what an image shows; its features measure generated images.

Pre-activation residual blocks (He et al. 2016) with GroupNorm, which keeps no statistics of its own.

Letters: B batch, H W height and width of the image, C channels, h w those of a level, F channels of the last level.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 16
"""Channels that a GroupNorm takes together; with one alone, a mean over places would say nothing after it."""


def group_norm(channels: int) -> nn.GroupNorm:
    """A GroupNorm of groups of `GROUP` channels, or of more where these don't divide the channels."""
    return nn.GroupNorm(math.gcd(max(channels // GROUP, 1), channels), channels)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; `stride` 2 halves the resolution, rounding up."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1, self.norm2 = group_norm(c_in), group_norm(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)  # a new block is its shortcut
        changes = stride > 1 or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, h, w] to [B, C', h', w']."""
        y = F.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(y, self.stride, ceil_mode=True))  # [B, C', h', w']
        y = F.relu(self.norm2(self.conv1(y)))  # [B, C', h', w']
        return x + self.conv2(y)  # type: ignore[no-any-return]


class ImageClassifier(nn.Module):
    """Names what an image shows.

    Args:
        channels: C of the first level.
        multipliers: of C, one a level; each level after the first halves the resolution.
        res_blocks: blocks of a level.
        num_classes: how many names there are.

    Attributes:
        width: F.
        num_classes: as given.
    """

    def __init__(
        self, *, channels: int, multipliers: Sequence[int], res_blocks: int, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        blocks, c_in = [], channels
        for level, multiplier in enumerate(multipliers):
            for place in range(res_blocks):
                blocks.append(Block(c_in, channels * multiplier, 2 if level and not place else 1))
                c_in = channels * multiplier
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head, self.width = group_norm(c_in), nn.Linear(c_in, num_classes), c_in

    def features(self, images: Tensor) -> Tensor:
        """Describe images.

        Args:
            images: [B, 3, H, W] in [-1, 1], of any size.

        Returns:
            [B, F] float32, the mean over all places.
        """
        x = self.blocks(self.stem(images))  # B 3 H W -> B F h w
        return torch.relu(self.norm(x)).float().mean(dim=(2, 3))  # B F h w -> B F

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W] in [-1, 1]."""
        return self.head(self.features(images))  # type: ignore[no-any-return]
