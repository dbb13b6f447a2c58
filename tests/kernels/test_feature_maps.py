"""Norms and sums of feature maps in Triton's interpreter, against float64."""

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from hmar_kernels import add_biased, group_norm, unserved
from torch import Tensor

if reason := unserved(torch.zeros(1, 1, 1, 1)):
    pytest.skip(f"compiled here, tests/gpu has its tests: {reason}", allow_module_level=True)

from hmar_kernels import triton_feature_maps
from hmar_kernels.common import triton_unavailable
from hmar_kernels.triton_feature_maps import Cut
from map_budget import norm_bounds, steps_of, sum_bounds

SHAPES = {
    "160 channels": (2, 160, 32, 5, 7),
    "640 channels, 16 positions": (1, 640, 32, 4, 4),
    "one group, its channels no power of two": (2, 20, 1, 9, 4),
    "groups of 3": (1, 12, 4, 6, 6),
    "48 channels, one position": (2, 48, 4, 1, 1),
    "one channel": (1, 1, 1, 5, 8),
    "several blocks with idle places": (1, 300, 4, 3, 3),
    "no multiple of anything": (2, 8, 2, 101, 91),
}
NORMS = [(True, True), (False, False)]


def draw(
    shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A feature map [B, C, H, W], channels-last, and weight, bias and conv_bias [C]."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, _, *sides = shape
    x = torch.randn(batch, channels, *sides, generator=generator) * std + mean
    weight, bias, conv_bias = torch.randn(3, channels, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), weight, bias, conv_bias


def judge(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    conv_bias: Tensor | None,
    silu: bool,
    eps: float = 1e-6,
) -> Tensor:
    """Compare with the bounds, all memory filled with NaN at first."""
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        found = group_norm(x, groups, weight, bias, eps, conv_bias=conv_bias, silu=silu)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.dtype == x.dtype and found.is_contiguous(memory_format=torch.channels_last)
    norm_bounds(x, groups, weight, bias, eps, conv_bias, silu).check(found, "group_norm")
    return found


@pytest.mark.parametrize(("biased", "silu"), NORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, biased: bool, silu: bool) -> None:
    x, weight, bias, conv_bias = draw(SHAPES[name])
    judge(x, SHAPES[name][2], weight, bias, conv_bias if biased else None, silu)


@pytest.mark.parametrize(("mean", "std"), [(1000.0, 1.0), (-3.0, 1e-3), (5.0, 0.0), (0.0, 1e4)])
@pytest.mark.parametrize("tile", [2048, 64])
def test_means_far_from_zero(tile: int, mean: float, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of two rows a mean is updated often."""
    monkeypatch.setattr(triton_feature_maps, "STATISTICS", Cut(tile, 4))
    assert steps_of(90, 32, 8) == (1 if tile == 2048 else 16)
    x, weight, bias, conv_bias = draw((2, 32, 8, 9, 10), mean, std)
    judge(x, 8, weight, bias, conv_bias, False)


def test_the_bounds_are_those_of_the_exact_result_and_narrow() -> None:
    """Their middle is PyTorch's GroupNorm in float64; a variance from the mean of squares is far outside."""
    x, weight, bias, conv_bias = draw((2, 32, 8, 9, 10), 1000.0)
    bounds = norm_bounds(x, 8, weight, bias, 1e-6, conv_bias, True)
    wide = (x + conv_bias.double()[:, None, None]).double()
    norm = torch.nn.functional.group_norm(wide, 8, weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(bounds.exact, torch.nn.functional.silu(norm), rtol=1e-9, atol=1e-9)
    moved = (x + conv_bias[:, None, None]).unflatten(1, (8, 4))
    mean, square = (y.mean((2, 3, 4), keepdim=True) for y in (moved, moved.square()))
    careless = (moved - mean) * (square - mean.square() + 1e-6).rsqrt()
    careless = careless.flatten(1, 2) * weight[:, None, None] + bias[:, None, None]
    assert bounds.share(torch.nn.functional.silu(careless)) > 10


def test_an_image_is_the_same_alone() -> None:
    x, weight, bias, conv_bias = draw((3, 24, 2, 12, 31))
    together = judge(x, 2, weight, bias, conv_bias, True)
    assert torch.equal(together[1:2], judge(x[1:2].clone(), 2, weight, bias, conv_bias, True))


def test_other_layouts_and_dtypes() -> None:
    x, weight, bias, conv_bias = draw((2, 16, 4, 5, 6))
    expected = judge(x, 4, weight, bias, conv_bias, True)
    assert torch.equal(judge(x.contiguous(), 4, weight, bias, conv_bias, True), expected)
    judge(x[:, :, ::2].half(), 4, weight.bfloat16(), bias.half(), conv_bias.bfloat16(), True)


@pytest.mark.parametrize("name", SHAPES)
def test_sums(name: str) -> None:
    x, _, _, conv_bias = draw(SHAPES[name])
    y = torch.randn_like(x)
    for each in (y.contiguous(), y.half()):
        found = add_biased(x, each, conv_bias)
        assert found.is_contiguous(memory_format=torch.channels_last)
        sum_bounds(x, each, conv_bias).check(found, "add_biased")


def test_numbers_of_any_stride() -> None:
    x, *_ = draw((2, 16, 4, 5, 6))
    columns = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    weight, bias, conv_bias = columns[:, 0], torch.full((1,), 0.5).expand(16), columns[:, 2]
    judge(x, 4, weight, bias, conv_bias, True)
    sum_bounds(x, x, conv_bias).check(add_biased(x, x, conv_bias), "add_biased")


def test_what_is_not_served() -> None:
    x, weight, bias, conv_bias = draw((2, 16, 4, 5, 6))
    with pytest.raises(ValueError, match="groups that divide 16 channels, got 5"):
        group_norm(x, 5, weight, bias, 1e-6)
    with pytest.raises(ValueError, match=r"numbers \[C\], got \[2, 16, 5, 6\], \[16\], \[15\]"):
        group_norm(x, 4, weight, bias[1:], 1e-6)
    with pytest.raises(
        ValueError, match=r"one shape \[B, C, H, W\] and .*got \[2, 16, 5, 6\], \[1, 16, 5, 6\]"
    ):
        add_biased(x, x[:1], conv_bias)
    with pytest.raises(ValueError, match=r"not torch[.]int64"):
        add_biased(x, x, conv_bias.long())
    for given in ((x.to("meta"), conv_bias), (x, conv_bias.to("meta"))):
        with pytest.raises(ValueError, match=r"on one device, got cpu, .*meta"):
            add_biased(x, *given)
    with pytest.raises(ValueError, match="float64"):
        add_biased(x.double(), x, conv_bias)
    with pytest.raises(ValueError, match="no backward pass"):
        group_norm(x, 4, weight.requires_grad_(), bias, 1e-6)
    with torch.no_grad():
        assert unserved(x, weight) is None


def test_without_triton() -> None:
    """In a fresh process where Triton cannot be imported."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from hmar_kernels import unserved
import hmar_cli.models.layers
from hmar_cli.tokenizers.blocks import Decoder
x = torch.zeros(1, 4, 2, 3)
with torch.inference_mode():
    image = Decoder(channels=8, multipliers=(1, 2), res_blocks=1, in_channels=4)(x)
print(tuple(image.shape), unserved(x))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(1, 3, 4, 6) Triton cannot be imported: ")


def test_a_gpu_on_which_triton_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver is compiled when it is first touched."""

    class Driver:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    place = torch.device("cuda", 0), torch.float32
    monkeypatch.setattr("triton.runtime.driver", Mock())
    assert triton_unavailable.__wrapped__(*place) is None
    monkeypatch.setattr("triton.runtime.driver", Driver())
    expected = "Triton cannot start (it needs a C compiler and Python's headers): Failed to find C compiler."
    with pytest.warns(UserWarning, match="Failed to find C compiler.; plain PyTorch takes its place"):
        assert triton_unavailable.__wrapped__(*place) == expected
