"""Passes over tokens on a GPU: bounds in every dtype, and whole transformers with them and without."""

import pytest
import torch
from hmar_kernels import gated_sum, modulated_norm, unit_heads
from torch import Tensor

from hmar_cli.models import layers
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pytest.importorskip("triton")

from token_budget import gated_sum_bounds, modulated_norm_bounds, unit_heads_bounds  # noqa: E402 - need Triton

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1024, 1920, 2304])
def test_norms_and_sums(width: int, dtype: torch.dtype) -> None:
    x, y, vectors = draw(6, 170, width) + 3, draw(6, 170, width).to(dtype), draw(6, 6, 1, width).to(dtype)
    gate, scale, shift = vectors.unbind(1)[1:4]
    found = modulated_norm(x, scale, shift, 1e-6, dtype)
    modulated_norm_bounds(x, scale, shift, 1e-6, dtype).check(found, "modulated_norm")
    for each in (x, y):
        found = gated_sum(each, gate, y)
        assert found.dtype == each.dtype
        gated_sum_bounds(each, gate, y).check(found, "gated_sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_heads(size: int, dtype: torch.dtype) -> None:
    qkv = draw(3, 43, 3, 10, size).to(dtype)
    qkv[0, 7] = 0
    for part, scale in zip(qkv.unbind(2), (None, draw(10), draw(10).to(dtype)), strict=True):
        unit_heads_bounds(part, scale).check(unit_heads(part, scale), "unit_heads")


def test_more_than_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of memory")
    x = torch.ones(2, 700_000, 1600, device="cuda", dtype=torch.bfloat16)
    x[1, -1] = 3
    gate, y = torch.full((1600,), 2.0, device="cuda"), torch.ones(1600, device="cuda", dtype=torch.bfloat16)
    found = gated_sum(x, gate, y)
    assert found[1, -1].eq(5).all() and found[0].eq(3).all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_transformers(pattern: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels, logits are as near to those in float32 as without, within a factor."""
    torch.manual_seed(0)
    half = precision == "bf16"
    scales = Scales.of([1, 2, 3, 4])
    model = NextScaleTransformer(
        scales=scales,
        z_channels=8,
        vocab_size=64,
        num_classes=4,
        depth=4,
        width=128,
        heads=2,
        pattern=pattern,  # type: ignore[arg-type]
        gamma_init=1.0,
        attention="reference",
    )
    model = model.cuda().eval()
    labels, inputs = torch.arange(4, device="cuda"), draw(4, scales.total - 1, 8)

    def logits() -> Tensor:
        found, start = [], 0
        condition = model.condition(labels)
        cache = model.make_cache(4, torch.get_autocast_dtype("cuda") if half else torch.float32)
        for k, n in enumerate(scales.lengths):
            found.append(
                model.forward_scale(k, condition, inputs[:, start - 1 :][:, :n] if k else None, cache=cache)
            )
            start += n
        return torch.cat(found, dim=1)

    ran: list[int] = []
    monkeypatch.setattr(layers, "gated_sum", lambda *given: ran.append(1) or gated_sum(*given))
    with torch.no_grad():
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            kernels = logits()
            assert len(ran) == 2 * 4 * 4
            monkeypatch.setattr(layers, "fuses", lambda x: False)
            plain = logits()
        half = False
        exact = logits()
    if precision == "bf16":
        errors = [float((x - exact).square().mean().sqrt()) for x in (kernels, plain)]
        assert errors[0] < 1.5 * errors[1], errors
    else:
        torch.testing.assert_close(kernels, exact, rtol=1e-4, atol=1e-5)
