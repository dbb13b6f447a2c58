"""Features on a GPU are those of a CPU, whatever precision surrounds them."""

import pytest
import torch
from torch import Tensor, nn

from hmar_cli.evaluation.extractors import Extractor, Features
from hmar_cli.evaluation.measures import METRICS, measure
from hmar_cli.evaluation.observing import observe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def extractor(device: str) -> Extractor:
    """A convolution and a matrix product, both of which TF32 would round to 11 bits."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64 * 14 * 14, 32), nn.Linear(32, 10))
    network.requires_grad_(False).to(device)

    def look(pixels: Tensor) -> Features:
        features = network[:3](pixels.float() / 255)
        return Features(features, pixels[:, :, 0].flatten(1).float(), network[3](features))

    return Extractor(name="toy", fingerprint="toy", look=look, device=torch.device(device))


def images(seed: int, count: int = 64) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_tf32_and_autocast_change_no_digit() -> None:
    judge, pixels = extractor("cuda"), images(0).cuda()
    expected = extractor("cpu")(images(0)).pooled
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = judge(pixels).pooled
        rounded = judge.look(pixels).pooled
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv
    scale = float(expected.abs().max())
    assert found.dtype == torch.float32
    assert float((found.cpu() - expected).abs().max()) < 1e-5 * scale  # sums of 12 544 numbers in float32
    assert float((rounded.cpu() - expected).abs().max()) > 1e-5 * scale  # what TF32 would have done


def test_numbers_are_those_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        judge = extractor(device)
        drawn, real = images(0), images(1) // 4 * 3
        sets = [
            observe([part.to(device) for part in each.split(20)], judge, metrics=METRICS)
            for each in (drawn, real)
        ]
        assert sets[0].statistics.mean.device.type == device
        assert sets[0].statistics.mean.dtype == torch.float64
        assert sets[0].features is not None and sets[0].features.device.type == "cpu"
        numbers = measure(sets[0], sets[1], METRICS)
        means = {
            metric: value if isinstance(value, float) else value["mean"] for metric, value in numbers.items()
        }
        found.append((means, sets[0].digest))
    (ours, digest), (theirs, same) = found
    assert digest == same
    for metric in METRICS:
        assert theirs[metric] == pytest.approx(ours[metric], rel=1e-4), metric
