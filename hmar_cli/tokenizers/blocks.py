"""Convolutional encoder and decoder that image tokenizers share (VQGAN, Esser et al. 2021, appendix C).

Without gradients, on a GPU, feature maps lie channels-last, and kernels of the project take the passes over memory
between convolutions together: GroupNorm, SiLU, sums and the convolutions' biases (`fuses`).

Letters: B batch, C channels, H W height and width in pixels, h w those of a feature map.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from hmar_kernels import add_biased, fuses
from hmar_kernels import group_norm as fused_group_norm
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups; of groups of four or more channels where 32 does not divide `channels`."""
    groups = 32 if channels % 32 == 0 else math.gcd(max(channels // 4, 1), channels, 32)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def channels_last(x: Tensor) -> Tensor:
    """The same feature map, channels-last where it goes through the kernels."""
    return x.contiguous(memory_format=torch.channels_last) if fuses(x) else x


def norm_act(norm: nn.GroupNorm, x: Tensor, bias: Tensor | None = None, *, silu: bool = True) -> Tensor:
    """Normalise x [B, C, h, w], to which a bias that `conv_and_bias` left is added first, and apply SiLU."""
    if fuses(x):
        return fused_group_norm(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, conv_bias=bias, silu=silu
        )
    assert bias is None
    return F.silu(norm(x)) if silu else norm(x)


def conv_and_bias(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve x [B, C, h, w]; the kernels leave the bias [C] to what comes next, and it is returned beside."""
    if fuses(x):
        return F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding), conv.bias
    return conv(x), None


def add_residual(x: Tensor, y: Tensor, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
    """Add feature maps [B, C, h, w] and the biases [C] that `conv_and_bias` left, y's and perhaps x's."""
    if bias is None:
        return y + x
    return add_biased(x, y, bias if other is None else bias + other)


def to_few_channels(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve x [B, C, h, w] to the channels of an image or of features; the result is contiguous.

    Channels-last in bfloat16, cuDNN makes 3 of 160 channels without tensor cores, in a fifth of a decoder's time (64
    images of 256 pixels, an H100); 32 are made with them, ten times as fast.
    """
    few = conv.out_channels
    if not fuses(x) or x.dtype == torch.float32 or few % 32 == 0:
        return conv(x).contiguous()  # type: ignore[no-any-return]
    assert conv.bias is not None
    weight, bias = (F.pad(p, (0, 0) * (p.ndim - 1) + (0, -few % 32)) for p in (conv.weight, conv.bias))
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)[:, :few].contiguous()


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each behind GroupNorm and SiLU, beside a shortcut.

    Args:
        c_in: channels that come.
        c_out: channels that leave; where they differ, a 1x1 convolution is the shortcut.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, c_in, h, w] to [B, c_out, h, w]."""
        y, bias = conv_and_bias(self.conv1, norm_act(self.norm1, x))  # [B, c_out, h, w]
        y, bias = conv_and_bias(self.conv2, norm_act(self.norm2, y, bias))
        x, other = (x, None) if self.nin_shortcut is None else conv_and_bias(self.nin_shortcut, x)
        return add_residual(x, y, bias, other)


class AttentionBlock(nn.Module):
    """Self-attention of one head over the positions of a feature map.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, h, w] to the same shape."""
        qkv = self.qkv(norm_act(self.norm, x, silu=False)).flatten(2).transpose(1, 2)  # [B, hw, 3C]
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)  # 3 x [B, 1, hw, C]: one head
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # [B, hw, C]
        y, bias = conv_and_bias(self.proj_out, y.transpose(1, 2).reshape(x.shape))  # [B, C, h, w]
        return add_residual(x, y, bias)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, 2h, 2w] to [B, C, h, w]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, h, w] to [B, C, 2h, 2w]."""
        with torch.autocast(x.device.type, enabled=False):  # which would copy in float32
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)  # type: ignore[no-any-return]


class Middle(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, h, w] to the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one resolution: `block`, `attn` (as many, or none), then `downsample` or `upsample`.

    Args:
        c_in: channels that come.
        c_out: channels of every block's output.
        blocks: number of residual blocks.
        attention: follow each with an attention block.
        resample: name and module of what changes the resolution afterwards.
    """

    def __init__(
        self, c_in: int, c_out: int, blocks: int, attention: bool, resample: tuple[str, nn.Module] | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(c_out) for _ in range(blocks if attention else 0))
        self.resample = "" if resample is None else resample[0]
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, c_in, h, w] to [B, c_out, h, w], [B, c_out, h/2, w/2] or [B, c_out, 2h, 2w]."""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    """Images to features, halving the resolution between levels.

    Args:
        channels: width of the first level.
        multipliers: width of each level over `channels`, from the highest resolution to the lowest.
        res_blocks: residual blocks a level.
        out_channels: channels of the features.
        attention: attention after the residual blocks of the lowest resolution too, not only in the middle.
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        out_channels: int,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                channels if i == 0 else widths[i - 1],
                width,
                res_blocks,
                attention and i == last,
                ("downsample", Downsample(width)) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to features [B, out_channels, h, w]."""
        x = self.conv_in(channels_last(images))  # [B, C, H, W]
        for level in self.down:
            x = level(x)  # halved by all levels but the last
        x = self.mid(x)
        return to_few_channels(self.conv_out, norm_act(self.norm_out, x))


class Decoder(nn.Module):
    """Features to images, doubling the resolution between levels; `up` is ordered as the encoder's `down`.

    Args:
        channels: width of the level of highest resolution.
        multipliers: as the encoder's.
        res_blocks: the encoder's number; a decoder level has one more.
        in_channels: channels of the features.
        attention: attention after the residual blocks of the lowest resolution too, not only in the middle.
    """

    def __init__(
        self,
        *,
        channels: int,
        multipliers: Sequence[int],
        res_blocks: int,
        in_channels: int,
        attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                width,
                res_blocks + 1,
                attention and i == last,
                ("upsample", Upsample(width)) if i > 0 else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, in_channels, h, w] to images [B, 3, H, W], not clamped."""
        x = self.mid(self.conv_in(channels_last(features)))  # [B, C, h, w]
        for level in reversed(self.up):
            x = level(x)  # doubled by all levels but up[0]
        return to_few_channels(self.conv_out, norm_act(self.norm_out, x))


def initialize(*modules: nn.Module) -> None:
    """Draw initial weights that keep the variance from layer to layer; residual branches start at zero.

    Convolutions are normal with variance 1 / fan-in. With PyTorch's own initialisation, a third of that, the
    layers between residual blocks shrink what passes, and training is several times slower.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        for part in module.modules():
            if isinstance(part, ResBlock):
                nn.init.zeros_(part.conv2.weight)
            elif isinstance(part, AttentionBlock):
                nn.init.zeros_(part.proj_out.weight)


def hash_weights(weights: Mapping[str, Tensor], what: bytes) -> str:
    """SHA-256, in hexadecimal, over `what` and every weight by name, with its type and shape."""
    digest = hashlib.sha256(what)
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
