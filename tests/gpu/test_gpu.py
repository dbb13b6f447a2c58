"""What only a GPU can show; without one these tests are skipped."""

import pytest
import torch

from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.sampling.images import autocast
from hmar_cli.sampling.next_scale import sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import NextScaleSample
from hmar_cli.tokenizers.msvq import ScaleQuantizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_noise_is_that_of_the_cpu() -> None:
    images = torch.arange(50) * 2**31
    for step in (0, 7):
        on_cpu = PhiloxNoise(2**40 + 3, images).uniform(step, 64)
        assert torch.equal(PhiloxNoise(2**40 + 3, images.cuda()).uniform(step, 64).cpu(), on_cpu)


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_sampling_never_waits_for_the_device(pattern: str) -> None:
    """One look at the device a call, at the end: whether all numbers were finite."""
    scales = Scales.of([1, 2, 3, 4])
    quantizer = ScaleQuantizer(scales=scales, z_channels=8, vocab_size=64).cuda()
    model = NextScaleTransformer(
        scales=scales,
        z_channels=8,
        vocab_size=64,
        num_classes=4,
        depth=2,
        width=64,
        heads=2,
        pattern=pattern,  # type: ignore[arg-type]
        masked_layers=1,
    )
    model.cuda().eval()
    schedule = ((1,), (2, 2), (3, 6), (4, 4, 8)) if pattern == "diagonal" else ()
    settings = NextScaleSample(cfg=2.0, top_k=40, top_p=0.95, schedule=schedule)
    labels, images = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.arange(3, device="cuda")
    waits = []
    with autocast(labels.device, "bf16"):
        sample_next_scale(model, quantizer, labels, settings, PhiloxNoise(0, images))
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample_next_scale(model, quantizer, labels, settings, PhiloxNoise(0, images))
        except RuntimeError as error:
            import traceback

            waits.append(traceback.extract_tb(error.__traceback__))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
    assert any(frame.line is not None and "run.finite" in frame.line for frame in waits[0])
