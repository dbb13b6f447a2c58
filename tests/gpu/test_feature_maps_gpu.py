"""Norms and sums of feature maps on a GPU: bounds in every dtype, whole tokenizers, CUDA graphs, large tensors."""

import pytest
import torch
from hmar_kernels import add_biased, group_norm
from torch import Tensor

from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers import blocks
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton")

from map_budget import norm_bounds, sum_bounds  # noqa: E402 - it needs Triton

DEVICE = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (2, 160, 32, 64, 96),
    (1, 640, 32, 16, 16),
    (3, 128, 32, 101, 33),
    (2, 512, 32, 9, 7),
    (1, 256, 32, 250, 130),
    (2, 20, 1, 31, 5),
    (4, 48, 4, 1, 1),
    (2, 300, 4, 3, 3),
]
"""B, C, groups, H, W."""
CODECS = ["MSVQ, small", "MSVQ, 160 channels", "KL, small", "KL, 128 channels"]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A feature map [B, C, H, W], channels-last, and weight, bias and conv_bias [C] in float32."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    batch, channels, _, *sides = shape
    x = torch.randn(batch, *sides, channels, generator=generator, device=DEVICE) + mean
    weight, bias, conv_bias = torch.randn(3, channels, generator=generator, device=DEVICE)
    return x.to(dtype).permute(0, 3, 1, 2), weight, bias, conv_bias


def filled(make: object, *args: object, **settings: object) -> Tensor:
    """What a function makes where all new memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return make(*args, **settings)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, conv_bias = draw(shape, dtype)
    for added, silu in ((conv_bias, True), (None, False)):
        found = filled(group_norm, x, shape[2], weight, bias, 1e-6, conv_bias=added, silu=silu)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        norm_bounds(x, shape[2], weight, bias, 1e-6, added, silu).check(found, "group_norm")
    y = torch.randn_like(x)
    sum_bounds(x, y, conv_bias).check(filled(add_biased, x, y, conv_bias), "add_biased")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mean", "std"), [(1000.0, 1.0), (3e4, 10.0), (-3.0, 1e-2), (5.0, 0.0)])
def test_means_far_from_zero(mean: float, std: float, dtype: torch.dtype) -> None:
    x, weight, bias, conv_bias = draw((2, 160, 32, 150, 130), torch.float32, 0.0)
    x = (x * std + mean).to(dtype)
    found = group_norm(x, 32, weight, bias, 1e-6, conv_bias=conv_bias)
    norm_bounds(x, 32, weight, bias, 1e-6, conv_bias, True).check(found, "group_norm")


def test_an_image_is_the_same_alone_and_again() -> None:
    x, weight, bias, conv_bias = draw((32, 160, 32, 128, 128), torch.bfloat16)
    found = group_norm(x, 32, weight, bias, 1e-6, conv_bias=conv_bias)
    assert torch.equal(found, group_norm(x, 32, weight, bias, 1e-6, conv_bias=conv_bias))
    for image in (0, 17, 31):
        at = slice(image, image + 1)
        assert torch.equal(found[at], group_norm(x[at].clone(), 32, weight, bias, 1e-6, conv_bias=conv_bias))


def make(codec: str) -> tuple[MultiScaleVQ | KlAutoencoder, Tensor]:
    """A tokenizer with random weights, and latents of pictures that are not square."""
    torch.manual_seed(0)
    wide = "small" not in codec
    tokenizer: MultiScaleVQ | KlAutoencoder
    if codec.startswith("MSVQ"):
        shape = {"channels": 160, "multipliers": (1, 1, 2, 2, 4), "res_blocks": 2} if wide else SMALL
        tokenizer = MultiScaleVQ(**shape, z_channels=8, vocab_size=64, scales=Scales([(1, 1), (4, 6)]))
    else:
        shape = {"channels": 128, "multipliers": (1, 1, 2, 2, 4), "res_blocks": 2} if wide else SMALL
        tokenizer = KlAutoencoder(**shape, z_channels=8)
    for name, parameter in tokenizer.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 4:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tokenizer.to(DEVICE), torch.randn(3, 8, 4, 6, device=DEVICE)


SMALL = {"channels": 24, "multipliers": (1, 2), "res_blocks": 1}


def through(codec: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Features and pictures from a tokenizer: exact ones, those by the kernels, and PyTorch's."""
    tokenizer, latents = make(codec)
    pictures = torch.randn(3, 3, 4 * tokenizer.stride, 6 * tokenizer.stride, device=DEVICE)

    def both(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        pair = tokenizer.decoder(latents.to(dtype)), tokenizer.encoder(pictures.to(dtype))
        assert all(x.is_contiguous() for x in pair)
        return [x.double() for x in pair]

    norms: list[int] = []
    found: dict[str, list[Tensor]] = {}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for part in tokenizer.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.register_forward_hook(lambda *_: norms.append(1))
    with torch.no_grad():
        with torch.autocast("cuda", half or torch.bfloat16, enabled=half is not None):
            found["kernels"] = both()
            assert not norms, "PyTorch's GroupNorm ran"
            monkeypatch.setattr(blocks, "fuses", lambda x: False)
            found["plain"] = both()
            assert norms
        tokenizer.double()
        found["exact"] = both(torch.float64)
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("codec", CODECS)
def test_tokenizers(codec: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are as near to float64 as PyTorch is: one rounding less a layer, other sums in convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = through(codec, precision, monkeypatch)
    for kernels, plain, exact in zip(found["kernels"], found["plain"], found["exact"], strict=True):
        errors = [float((x - exact).square().mean().sqrt()) for x in (kernels, plain)]
        assert errors[0] < 2 * errors[1], errors
        assert errors[1] < {"bf16": 0.1, "fp16": 0.02, "fp32": 1e-4}[precision] * float(exact.std())


def test_gradients_take_the_plain_path() -> None:
    tokenizer, latents = make("KL, small")
    tokenizer.decoder(latents).square().mean().backward()
    assert all(p.grad is not None for p in tokenizer.decoder.parameters())


def test_a_compiled_decoder_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for kernel in ("fused_group_norm", "add_biased"):
        monkeypatch.setattr(blocks, kernel, lambda *_, **__: pytest.fail("a kernel ran"))
    tokenizer, latents = make("KL, small")
    with torch.no_grad():
        compiled = torch.compile(tokenizer.decoder)(latents).double()
        monkeypatch.setattr(blocks, "fuses", lambda x: False)
        plain = tokenizer.decoder(latents).double()
        exact = tokenizer.double().decoder(latents.double())
    errors = [float((x - exact).square().mean().sqrt()) for x in (compiled, plain)]
    assert errors[0] < 2 * errors[1], errors


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight, bias, conv_bias = (t.to("cuda:1") for t in draw(SHAPES[0], torch.bfloat16))
    assert torch.cuda.current_device() == 0
    found = group_norm(x, 32, weight, bias, 1e-6, conv_bias=conv_bias)
    norm_bounds(x, 32, weight, bias, 1e-6, conv_bias, True).check(found, "group_norm")
    sum_bounds(x, found, conv_bias).check(add_biased(x, found, conv_bias), "add_biased")


def test_a_recorded_decoder() -> None:
    """Nothing waits for the host; replays read what the input holds then."""
    tokenizer, latents = make("MSVQ, small")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        expected = [tokenizer.decode(x).clone() for x in (latents, latents.flip(0))]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = tokenizer.decode(latents)
        for x, image in zip((latents.clone(), latents.flip(0)), expected, strict=True):
            latents.copy_(x)
            graph.replay()
            assert torch.equal(recorded, image)


def test_more_than_two_billion_numbers() -> None:
    """The last images are as right as the first."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of memory")
    batch, channels, side = 210, 160, 256
    assert batch * channels * side**2 > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (batch, side, side, channels)
    x = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight, bias, conv_bias = torch.randn(3, channels, generator=generator, device=DEVICE)
    y = group_norm(x, 32, weight, bias, 1e-6, conv_bias=conv_bias)
    total = add_biased(x, y, conv_bias)
    for image in (0, batch - 1):
        at = slice(image, image + 1)
        norm_bounds(x[at], 32, weight, bias, 1e-6, conv_bias, True).check(
            y[at], f"group_norm of image {image}"
        )
        sum_bounds(x[at], y[at], conv_bias).check(total[at], f"add_biased of image {image}")
