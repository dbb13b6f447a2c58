"""What only a GPU can show; without one these tests are skipped."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.sampling.images import Job, Labels, Sampler, autocast, select_attention
from hmar_cli.sampling.next_scale import draw_counts, sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import NextScaleSample
from hmar_cli.tokenizers import msvq
from hmar_cli.tokenizers.msvq import MultiScaleVQ, ScaleQuantizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_noise_is_that_of_the_cpu() -> None:
    images = torch.arange(50) * 2**31
    for step in (0, 7):
        on_cpu = PhiloxNoise(2**40 + 3, images).uniform(step, 64)
        assert torch.equal(PhiloxNoise(2**40 + 3, images.cuda()).uniform(step, 64).cpu(), on_cpu)


def make(pattern: str, attention: str = "auto") -> tuple[NextScaleTransformer, MultiScaleVQ, NextScaleSample]:
    scales = Scales.of([1, 2, 3, 4])
    tokenizer = MultiScaleVQ(
        channels=32, multipliers=(1, 2), res_blocks=1, z_channels=8, vocab_size=64, scales=scales
    )
    model = NextScaleTransformer(
        scales=scales,
        z_channels=8,
        vocab_size=64,
        num_classes=4,
        depth=2,
        width=64,
        heads=2,
        pattern=pattern,  # type: ignore[arg-type]
        attention=attention,
        masked_layers=1,
    )
    schedule = ((1,), (2, 2), (3, 6), (4, 4, 8)) if pattern == "diagonal" else ()
    settings = NextScaleSample(cfg=2.0, top_k=40, top_p=0.95, schedule=schedule)
    return model.cuda().eval(), tokenizer.cuda().eval(), settings


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_sampling_never_waits_for_the_device(pattern: str) -> None:
    model, tokenizer, settings = make(pattern)
    labels, images = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.arange(3, device="cuda")

    def draw() -> None:
        noise = PhiloxNoise(0, images, draw_counts(settings, model.scales))
        finite = torch.ones((), dtype=torch.bool, device="cuda")
        sample_next_scale(model, tokenizer.quantizer, labels, settings, noise, finite=finite)

    with autocast(labels.device, "bf16"):
        draw()
        torch.cuda.set_sync_debug_mode("error")
        try:
            draw()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["triton", "sdpa", "masked"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_recorded_batches_are_plain_ones(pattern: str, precision: str, attention: str) -> None:
    """The first is drawn, the second recorded, the third replayed, the last one filled up."""
    model, tokenizer, settings = make(pattern, attention)
    job = Job(
        settings=settings, conditions=Labels((0, 1, 2)), count=18, seed=3, batch_size=5, precision=precision
    )
    select_attention(model, job, precision)
    plain = Sampler(model, tokenizer, replace(job, compile=False), torch.device("cuda"))
    recorded = Sampler(model, tokenizer, job, torch.device("cuda"))
    for batch in (range(5), range(5, 10), range(10, 15), range(15, 18)):
        expected = plain(batch)[0]
        found = recorded(batch)[0]
        assert len(found) == len(batch)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("sides", [[1, 2, 3, 4], [(1, 2), (3, 4), (4, 6)]])
def test_contributions_are_those_of_the_cpu(sides: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # backward, too
    msvq._bicubic_weights.cache_clear()
    quantizer = ScaleQuantizer(scales=Scales.of(sides), z_channels=8, vocab_size=64)
    with torch.inference_mode():  # what is kept of it must serve training as well
        deepcopy(quantizer).cuda().f_hat(
            torch.zeros(1, quantizer.scales.total, dtype=torch.int64, device="cuda")
        )
    tokens = torch.arange(2 * quantizer.scales.total).reshape(2, -1) % 64
    found = []
    for device in ("cpu", "cuda"):
        moved = deepcopy(quantizer).to(device)
        f_hat = moved.f_hat(tokens.to(device))
        f_hat.square().sum().backward()
        found.append((f_hat.detach().cpu(), moved.codebook.weight.grad.cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
