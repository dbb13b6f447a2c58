"""The KL autoencoder: shapes at any size, the posterior, latent scale, initial weights, fingerprint."""

import math

import pytest
import torch

from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers.kl import KlAutoencoder, divergence, posterior, sample_posterior
from hmar_cli.tokenizers.msvq import MultiScaleVQ


def small(**changes):
    torch.manual_seed(0)
    settings = {"channels": 8, "multipliers": (1, 2, 2), "res_blocks": 1, "z_channels": 3}
    return KlAutoencoder(**{**settings, **changes}).eval()


def images(height=16, width=16, count=2):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (4, 4), (12, 20)])
def test_any_size_that_the_stride_divides(size):
    model = small()
    assert model.stride == 4 and model.z_channels == 3
    moments = model.moments(images(*size))
    assert moments.shape == (2, 6, size[0] // 4, size[1] // 4) and moments.dtype == torch.float32
    mean, _ = posterior(moments)
    assert model.decode(mean).shape == (2, 3, *size)
    pictures = model.reconstruct(images(*size))
    assert pictures.shape == (2, 3, *size) and pictures.abs().max() <= 1


@pytest.mark.parametrize(
    "shape", [(2, 3, 18, 16), (2, 3, 16, 18), (2, 1, 16, 16), (3, 16, 16), (2, 3, 0, 16)]
)
def test_images_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="divisible by 4, got"):
        small().moments(torch.zeros(shape))


def test_bfloat16_gives_float32():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        moments = model.moments(images())
        pictures = model.decode(posterior(moments)[0])
    assert moments.dtype == pictures.dtype == torch.float32


def test_the_posterior_is_clamped():
    moments = torch.tensor([0.5, 7.0, -1000.0, 1000.0]).reshape(1, 4, 1, 1)
    mean, std = posterior(moments)
    assert mean.flatten().tolist() == [0.5, 7.0]
    assert std.flatten().tolist() == pytest.approx([math.exp(-15), math.exp(10)])


def test_a_draw_has_the_posterior_s_mean_and_deviation():
    moments = torch.cat(
        [torch.full((1, 1, 100, 100), 3.0), torch.full((1, 1, 100, 100), 2 * math.log(0.5))], 1
    )
    noise = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    draw = sample_posterior(moments, noise)
    assert draw.mean() == pytest.approx(3.0, abs=0.02) and draw.std() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(sample_posterior(moments, torch.zeros_like(noise)), posterior(moments)[0])


def test_divergence_is_that_of_torch():
    moments = torch.randn(3, 8, 2, 5, generator=torch.Generator().manual_seed(0))
    mean, std = posterior(moments)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(divergence(moments), expected)
    assert divergence(torch.zeros(1, 8, 2, 2)).item() == 0


def test_latents_are_divided_by_their_scale():
    model, scaled = small(), small(latent_scale=0.25)
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scaled.decode_latents(z * 0.25), model.decode(z).detach().clamp(-1, 1))
    with pytest.raises(ValueError, match="latent_scale 0"):
        model.decode_latents(z)


def test_reconstruction_is_through_the_mean_and_clamped():
    model = small()
    expected = model.decode(model.moments(images())[:, :3]).detach()
    assert expected.abs().max() > 1
    assert torch.equal(model.reconstruct(images()), expected.clamp(-1, 1))


def test_the_initial_posterior_is_narrow_beside_its_means():
    mean, std = posterior(small(channels=24).moments(images(count=8)).detach())
    assert 0.3 < mean.std() < 2
    torch.testing.assert_close(std, torch.full_like(std, math.exp(-2)))


def test_attention_of_the_last_level_is_an_option():
    with_it, without = set(small().state_dict()), set(small(attention=False).state_dict())
    extra = with_it - without
    assert without < with_it and all(name.startswith("encoder.down.2.attn.0.") for name in extra)
    assert not any(name.startswith("decoder.up") and ".attn." in name for name in with_it)


def test_fingerprint_follows_the_weights_and_not_the_scale():
    model = small()
    assert len(model.fingerprint()) == 64
    assert model.fingerprint() == small().fingerprint() == small(latent_scale=0.5).fingerprint()
    model.quant_conv.bias.data[0] += 1e-6
    assert model.fingerprint() != small().fingerprint()


def test_both_tokenizers_reconstruct():
    torch.manual_seed(0)
    model = MultiScaleVQ(
        channels=8, multipliers=(1, 2), res_blocks=1, z_channels=4, vocab_size=8, scales=Scales.of([1, 4])
    ).eval()
    expected = model.decode_tokens(model.encode(images(8, 8)))
    assert torch.equal(model.reconstruct(images(8, 8)), expected)
