"""Measures of reconstructions, against computations that share nothing with them."""

import hashlib
import math

import numpy as np
import pytest
import torch
from toy_extractors import toy_extractor

from hmar_cli.evaluation.frechet import frechet_distance
from hmar_cli.evaluation.reconstruction import evaluate_tokenizer, ssim
from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers.kl import KlAutoencoder, posterior
from hmar_cli.tokenizers.msvq import MultiScaleVQ


def noise(count: int = 2, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def autoencoder() -> KlAutoencoder:
    torch.manual_seed(0)
    return KlAutoencoder(channels=8, multipliers=(1, 2), res_blocks=1, z_channels=4).eval()


def quantizer() -> MultiScaleVQ:
    torch.manual_seed(0)
    scales = Scales.of([1, 2, 4, 8])
    return MultiScaleVQ(
        channels=8, multipliers=(1, 2), res_blocks=1, z_channels=4, vocab_size=16, scales=scales
    ).eval()


def ssim_by_loops(x: np.ndarray, y: np.ndarray) -> float:  # type: ignore[type-arg]
    """The paper's formula, a window at a time: weighted moments of 11 x 11 pixels, of each colour."""
    place = np.arange(11) - 5
    weights = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for colour in range(3):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (z[colour, top : top + 11, left : left + 11].astype(float) for z in (x, y))
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
                shared = (weights * (a - ma) * (b - mb)).sum()
                c1, c2 = 6.5025, 58.5225
                found.append((2 * ma * mb + c1) * (2 * shared + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def test_ssim_is_the_formula_of_the_paper() -> None:
    x = noise(2, 13, 15)
    y = (x.float() * 0.7 + noise(2, 13, 15, seed=1).float() * 0.3).round().to(torch.uint8)
    found = ssim(x, y)
    assert found.dtype == torch.float64 and found.shape == (2,)
    for i in range(2):
        assert found[i].item() == pytest.approx(ssim_by_loops(x[i].numpy(), y[i].numpy()), rel=1e-9)
    assert torch.equal(ssim(y, x), found)


def test_ssim_is_what_scikit_image_gives() -> None:
    """`structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255,
    channel_axis=0)` of scikit-image 0.26."""
    place = torch.arange(3 * 24 * 20).view(1, 3, 24, 20)
    x, y = place * 7919 % 256, (place * 7919 % 256 * 3 + place * 104729 % 256) // 4
    assert ssim(x, y).item() == pytest.approx(0.928271312172026, abs=1e-12)


def test_ssim_of_plain_and_of_equal_images() -> None:
    x = noise()
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.double))
    a, b = torch.full((1, 3, 12, 12), 50), torch.full((1, 3, 12, 12), 200)
    expected = (2 * 50 * 200 + 6.5025) / (50**2 + 200**2 + 6.5025)  # nothing varies: only the means count
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shapes", [((1, 3, 10, 12), (1, 3, 10, 12)), ((1, 3, 12, 12), (2, 3, 12, 12))])
def test_ssim_of_images_that_do_not_compare(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="sides of at least 11"):
        ssim(*(torch.zeros(shape) for shape in shapes))


def test_numbers_are_those_of_the_pictures_as_they_would_be_saved() -> None:
    model, images = autoencoder(), noise(5)
    found = evaluate_tokenizer(model, images.split(2), shown=3)
    signed = images.float() / 127.5 - 1
    saved = ((model.reconstruct(signed).clamp(-1, 1) + 1) * 127.5).round()
    summary = found.summary()
    error = (saved - images.float()).double()
    decibels = [20 * math.log10(255) - 10 * math.log10(each) for each in error.square().mean(dim=(1, 2, 3))]
    assert summary["count"] == 5
    assert found.psnr == pytest.approx(decibels, rel=1e-5)
    assert summary["psnr"] == pytest.approx(np.mean(decibels), rel=1e-5)
    assert summary["l1"] == pytest.approx(error.abs().mean().item() / 127.5, rel=1e-5)
    assert summary["ssim"] == pytest.approx(ssim(images, saved.to(torch.uint8)).mean().item(), rel=1e-6)
    assert len(found.pairs) == 3
    for i, (image, picture) in enumerate(found.pairs):
        assert np.array_equal(image, images[i].permute(1, 2, 0))
        assert np.array_equal(picture, saved[i].permute(1, 2, 0).byte())
    pixels = images[0].permute(1, 2, 0).numpy().tobytes()
    assert found.digests[0] == hashlib.sha256(b"16 16 " + pixels).digest()


def test_latents_are_measured_as_drawn_ones_would_be() -> None:
    model, images = autoencoder(), noise(6)
    found = evaluate_tokenizer(model, images.split(4)).summary()
    mean, std = posterior(model.moments(images.float() / 127.5 - 1).detach())
    draws = mean + std * torch.randn(2000, *mean.shape, generator=torch.Generator().manual_seed(0))
    assert found["latent_std"] == pytest.approx(draws.std().item(), rel=1e-3)
    assert found["posterior_std"] == pytest.approx(math.exp(-2))  # where the log-variance starts
    assert "usage" not in found and "rfid" not in found


def test_codes_are_counted_by_scale_over_images_of_all_sizes() -> None:
    model = quantizer()
    batches = [noise(3), noise(2, 32, 16, seed=1)]
    found = evaluate_tokenizer(model, batches).summary()
    counts = np.zeros((4, 16))
    for batch in batches:
        resized = model.at_size((batch.shape[2], batch.shape[3]))
        for image in batch:
            tokens = resized.encode(image[None].float() / 127.5 - 1)[0]
            for k in range(4):
                for token in tokens[resized.scales.slice(k)].tolist():
                    counts[k, token] += 1
    assert found["tokens_per_scale"] == [3 + 4, 12 + 16, 48 + 64, 192 + 256] == counts.sum(axis=1).tolist()
    assert found["usage_per_scale"] == pytest.approx((counts > 0).mean(axis=1).tolist())
    assert found["usage"] == pytest.approx((counts.sum(axis=0) > 0).mean())
    for k in range(4):
        shares = counts[k][counts[k] > 0] / counts[k].sum()
        assert found["perplexity_per_scale"][k] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_rfid_compares_the_pictures_with_the_images() -> None:
    model, images, extractor = autoencoder(), noise(12), toy_extractor()
    found = evaluate_tokenizer(model, images.split(5), extractor)
    signed = model.reconstruct(images.float() / 127.5 - 1)
    pictures = ((signed + 1) * 127.5).round().to(torch.uint8)
    moments = []
    for pixels in (images, pictures):
        features = extractor(pixels).pooled.double()
        moments += [features.mean(dim=0), torch.cov(features.T)]
    assert found.summary()["rfid"] == pytest.approx(frechet_distance(*moments), rel=1e-6)
    assert found.features == 6 and found.summary()["rfid"] > 0


def test_lpips_is_a_mean_over_images_large_enough() -> None:
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
            return (images - pictures).abs().amax(dim=(1, 2, 3))

    batches = [noise(3), noise(1, 8, 16)]
    found = evaluate_tokenizer(autoencoder(), batches, perceptual=Mean(), shown=4)  # type: ignore[arg-type]
    pairs = [np.abs(image.astype(float) - picture).max() / 127.5 for image, picture in found.pairs[:3]]
    assert found.lpips == pytest.approx(pairs, rel=1e-5)
    assert found.summary()["lpips"] == pytest.approx(np.mean(pairs), rel=1e-5)
    assert evaluate_tokenizer(autoencoder(), batches).summary()["lpips"] is None


def test_images_too_small_for_ssim_have_none() -> None:
    found = evaluate_tokenizer(autoencoder(), [noise(2, 8, 8)])
    assert found.ssim == [] and found.summary()["ssim"] is None
    mixed = evaluate_tokenizer(autoencoder(), [noise(2, 8, 8), noise(1)])
    assert len(mixed.ssim) == 1 and mixed.summary()["ssim"] == mixed.ssim[0]


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_tokenizer(autoencoder(), []).summary()
    with pytest.raises(ValueError, match="expected uint8"):
        evaluate_tokenizer(autoencoder(), [noise().float()])
    with pytest.raises(ValueError, match="scales that grow"):
        evaluate_tokenizer(quantizer(), [noise(1, 8, 8)])
    broken = autoencoder()
    torch.nn.init.constant_(broken.post_quant_conv.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate_tokenizer(broken, [noise()])
