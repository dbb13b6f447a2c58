"""What wraps PyTorch's own kernels for GPUs, as far as a CPU can show it."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from hmar_kernels import flex, reference, unavailable, varlen
from torch import Tensor

CPU = torch.device("cpu")
LENGTHS = (1, 4, 150, 9)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, sum(LENGTHS), 2, 16, generator=generator) for _ in range(3))
    return q, k, v, torch.tensor([2.0, 5.0])


@pytest.fixture
def traced_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention compiled to PyTorch's own operations: on a CPU its kernel gives no log-sum-exp."""
    torch.compiler.reset()
    flex._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    flex._compiled.cache_clear()


@pytest.mark.usefixtures("traced_flex")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_flex_computes_what_the_reference_does(causal: bool, compiled: bool) -> None:
    q, k, v, scale = inputs()

    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = flex.attention(q, k, v, LENGTHS, causal, 0.5, scale)
        return flex.attention(out, k, v, LENGTHS, causal, 0.5, scale)

    run = torch.compile(twice, fullgraph=True) if compiled else twice
    first, _ = reference.attention(q, k, v, LENGTHS, causal, 0.5, scale)
    expected = reference.attention(first, k, v, LENGTHS, causal, 0.5, scale)
    found = run(q, k, v)
    assert found[0].is_contiguous()
    torch.testing.assert_close(found, expected)
    part = flex.attention(q[:, -159:], k, v, LENGTHS, causal, 0.5, scale)
    torch.testing.assert_close(part[0], first[:, -159:])


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_that_flex_skips_hold_nothing(causal: bool) -> None:
    """A block counts as part or whole exactly where it holds scores that are seen, or all."""
    mask = flex.block_mask(LENGTHS, causal, sum(LENGTHS), CPU)
    scale = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    sees = scale[:, None] >= scale if causal else scale[:, None] == scale
    padded = torch.nn.functional.pad(sees, (0, 256 - 164, 0, 256 - 164))
    blocks = padded.unflatten(0, (2, 128)).unflatten(2, (2, 128)).any(dim=3).any(dim=1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)


def test_flex_is_compiled_once_a_shape() -> None:
    """By functions of their own, so that no limit on recompilations is met."""
    flex._compiled.cache_clear()
    one, two = flex._compiled((1, 2)), flex._compiled((1, 3))
    assert flex._compiled((1, 2)) is one and two is not one
    codes = [f._torchdynamo_orig_callable.__code__ for f in (one, two)]
    assert codes[0] is not codes[1]
    flex._compiled.cache_clear()


def fake_library(calls: list, takes_scale: bool) -> SimpleNamespace:
    """Attention over sequences, one by one."""

    def varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, *, return_aux, scale=None):
        assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k) and return_aux.lse
        assert takes_scale == (scale is not None)
        calls.append((starts_q, longest_q, longest_k))
        outs, sums = [], []
        for start, stop in itertools.pairwise(starts_q.tolist()):
            part = slice(start, stop)
            scores = torch.einsum("nhd,lhd->hnl", q[part], k[part]) * (scale or q.shape[-1] ** -0.5)
            outs.append(torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v[part]))
            sums.append(scores.logsumexp(-1))
        return torch.cat(outs), torch.cat(sums, dim=1)

    return SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=lambda lse: SimpleNamespace(lse=lse))


@pytest.mark.parametrize("takes_scale", [True, False])
@pytest.mark.parametrize("queries", [164, 159])
def test_varlen_takes_every_scale_for_a_sequence(
    queries: int, takes_scale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list = []
    monkeypatch.setattr(varlen, "library", fake_library(calls, takes_scale))
    monkeypatch.setattr(varlen, "TAKES_SCALE", takes_scale)
    q, k, v, scale = inputs()
    q = q[:, -queries:]
    found = varlen.attention(q, k, v, LENGTHS, False, 0.5, scale)
    assert found[0].is_contiguous()
    torch.testing.assert_close(found, reference.attention(q, k, v, LENGTHS, False, 0.5, scale))
    again = varlen.attention(q, k, v, LENGTHS, False, 0.5, scale)
    assert torch.equal(again[0], found[0]) and calls[0][0] is calls[1][0]  # boundaries are made once
    assert calls[0][1:] == (150, 150)


def test_what_cannot_run_says_why() -> None:
    place = {"device": CPU, "dtype": torch.bfloat16, "head_size": 64, "pattern": "diagonal"}
    reason = unavailable("varlen", **place)
    assert reason is not None and ("needs a CUDA GPU" in reason or "PyTorch 2.10" in reason)
    assert "own scale alone" in str(unavailable("varlen", **place | {"pattern": "causal"}))
    assert "backward on CUDA GPUs alone" in str(unavailable("flex", **place))
    gpu = place | {"device": torch.device("cuda", 0)}
    assert "not float64" in str(unavailable("flex", **gpu | {"dtype": torch.float64}))
    assert "not 8" in str(unavailable("flex", **gpu | {"head_size": 8}))
