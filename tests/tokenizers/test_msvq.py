"""The multi-scale VQ tokenizer: shapes, residual quantization, straight-through gradients, fingerprint, manifest."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers import msvq
from hmar_cli.tokenizers.msvq import MultiScaleVQ, ScaleQuantizer, phi_of_scale

MANIFEST = Path(__file__).parents[1] / "fixtures" / "manifests" / "vqvae-ch160v4096z32.json"


def small(scales=(1, 2, 4), **changes):
    torch.manual_seed(0)
    settings = {"channels": 8, "multipliers": (1, 2), "res_blocks": 1, "z_channels": 4, "vocab_size": 16}
    return MultiScaleVQ(**{**settings, **changes}, scales=Scales.of(scales)).eval()


def test_full_size_has_the_published_keys_and_shapes():
    manifest = json.loads(MANIFEST.read_text())
    with torch.device("meta"):
        model = MultiScaleVQ(
            channels=manifest["config"]["ch"],
            multipliers=(1, 1, 2, 2, 4),
            res_blocks=2,
            z_channels=manifest["config"]["z_channels"],
            vocab_size=manifest["config"]["vocab_size"],
            scales=Scales.of(manifest["config"]["v_patch_nums"]),
        )
    published = {
        key.replace("quantize.embedding", "quantizer.codebook").replace(
            "quantize.quant_resi.qresi_ls", "quantizer.phis"
        ): shape
        for key, (shape, _) in manifest["keys"].items()
        if key not in manifest["buffers"]
    }
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]
    assert model.stride == 16 and model.image_size == (256, 256)


@pytest.mark.parametrize("channels", [4, 6, 8, 20, 32, 96])
def test_any_width_works(channels):
    model = small(channels=channels)
    assert model.features(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("scales", [(1, 2, 4), (4,), ([1, 2], [2, 3], [4, 6])])
def test_round_trip_shapes(scales):
    model = small(scales)
    height, width = model.image_size
    images = torch.rand(3, 3, height, width) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (3, model.scales.total) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < 16
    pictures = model.decode_tokens(tokens)
    assert pictures.shape == images.shape and pictures.abs().max() <= 1
    rest = model.scales.total - model.scales.lengths[0]
    assert model.quantizer.teacher_inputs(tokens).shape == (3, rest, 4)
    assert model.quantizer.own_inputs(tokens).shape == (3, rest, 4)


def test_wrong_sizes_are_refused():
    model = small()
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, 8, 8\)"):
        model.encode(torch.zeros(1, 3, 16, 8))
    with pytest.raises(ValueError, match="expected features"):
        model.quantizer.quantize(torch.zeros(1, 4, 2, 2))


def test_nearest_is_the_nearest_by_brute_force(monkeypatch):
    quantizer = small(vocab_size=37).quantizer
    vectors = torch.randn(50, 4)
    expected = torch.cdist(vectors.double(), quantizer.codebook.weight.double())
    monkeypatch.setattr("hmar_cli.tokenizers.msvq.CHUNK", 37 * 7)  # in parts of seven, the last one short
    codes, distances = quantizer.nearest(vectors)
    assert torch.equal(codes, expected.argmin(dim=1))
    torch.testing.assert_close(distances, expected.min(dim=1).values.square().float(), rtol=1e-4, atol=1e-5)


def test_last_scale_quantizes_what_the_others_left():
    quantizer = small().quantizer
    features = torch.randn(2, 4, 4, 4)
    tokens, f_hat = quantizer.quantize(features)
    left = features - quantizer.f_hat(tokens[:, : quantizer.scales.slice(1).stop])
    vectors = left.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.equal(quantizer.nearest(vectors)[0], tokens[:, quantizer.scales.slice(2)].flatten())
    torch.testing.assert_close(f_hat, quantizer.f_hat(tokens))


def test_teacher_inputs_ignore_the_scale_that_they_predict():
    quantizer = small().quantizer
    tokens = torch.randint(16, (1, quantizer.scales.total))
    changed = tokens.clone()
    changed[:, quantizer.scales.slice(1)] = (changed[:, quantizer.scales.slice(1)] + 1) % 16
    a, b = quantizer.teacher_inputs(tokens), quantizer.teacher_inputs(changed)
    assert torch.equal(a[:, :4], b[:, :4])  # scale 2 sees scale 1 alone
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_tokens_that_are_not_kept_leave_no_trace():
    quantizer = small().quantizer
    tokens = torch.randint(16, (2, quantizer.scales.total))
    keep = torch.rand(2, quantizer.scales.total) < 0.5
    hidden = torch.where(keep, tokens, (tokens + 5) % 16)
    assert torch.equal(quantizer.own_inputs(tokens, keep), quantizer.own_inputs(hidden, keep))
    assert not torch.equal(quantizer.own_inputs(tokens), quantizer.own_inputs(hidden))
    whole = torch.ones(quantizer.scales.total, dtype=torch.bool)
    assert torch.equal(quantizer.own_inputs(tokens, whole), quantizer.own_inputs(tokens))


def test_gradient_goes_straight_through():
    quantizer = small().quantizer
    features = torch.randn(2, 4, 4, 4, requires_grad=True)
    weight = torch.randn(2, 4, 4, 4)
    quantized = quantizer(features)
    (quantized.f_hat * weight).sum().backward()
    torch.testing.assert_close(features.grad, weight)
    assert quantizer.codebook.weight.grad is None
    torch.testing.assert_close(quantized.f_hat.detach(), quantizer.quantize(features)[1])


def test_quantization_loss_is_the_mean_over_scales_of_both_terms():
    quantizer = small().quantizer
    quantizer.commitment = 0.25
    features = torch.randn(2, 4, 4, 4, requires_grad=True)
    quantized = quantizer(features)
    quantized.loss.backward()
    errors, pulls = [], []
    for k in range(3):
        f_hat = quantizer.f_hat(quantized.tokens[:, : quantizer.scales.slice(k).stop]).detach()
        errors.append(F.mse_loss(f_hat, features.detach()))
        pulls.append(2 * (features.detach() - f_hat) / features.numel())
    torch.testing.assert_close(quantized.loss.detach(), 1.25 * torch.stack(errors).mean())
    torch.testing.assert_close(features.grad, 0.25 * torch.stack(pulls).mean(dim=0))
    assert quantizer.codebook.weight.grad.abs().sum() > 0
    used = {quantizer.phi_index[k] for k in range(3)}
    assert {i for i, phi in enumerate(quantizer.phis) if phi.weight.grad is not None} == used


def test_autocast_changes_nothing_in_the_quantizer():
    quantizer = small().quantizer
    features = torch.randn(2, 4, 4, 4)
    expected = quantizer(features)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(features)
        inputs = quantizer.teacher_inputs(quantized.tokens)
    assert torch.equal(quantized.tokens, expected.tokens)
    assert torch.equal(quantized.f_hat, expected.f_hat)
    assert torch.equal(inputs, quantizer.teacher_inputs(expected.tokens))


@pytest.mark.parametrize(("small", "grid"), [((1, 1), (16, 16)), ((13, 13), (16, 16)), ((3, 5), (12, 10))])
def test_enlarging_is_bicubic_interpolation(small, grid):
    x = torch.randn(2, 3, *small, generator=torch.Generator().manual_seed(0))
    exact = F.interpolate(x.double(), size=grid, mode="bicubic")
    torch.testing.assert_close(msvq._enlarge(x, grid).double(), exact, rtol=0, atol=4e-6)


def test_choice_of_phis():
    assert phi_of_scale(4, 4) == [0, 1, 2, 3]
    # 2/9 and 7/9 are each equidistant from two ticks, and so is the middle one of an odd number of scales
    assert phi_of_scale(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scale(5, 4) == [0, 1, 2, 2, 3]
    assert phi_of_scale(3, 1) == [0, 0, 0]
    assert phi_of_scale(1, 4) == [0]
    quantizer = ScaleQuantizer(
        scales=Scales.of([1, 2]), z_channels=2, vocab_size=3, phi_count=2, phi_ratio=0.25
    )
    x = torch.randn(1, 2, 2, 2)
    convolved = F.conv2d(x, quantizer.phis[1].weight, quantizer.phis[1].bias, padding=1)
    torch.testing.assert_close(quantizer.phis[1](x), 0.75 * x + 0.25 * convolved)


def test_fingerprint_follows_weights_and_scales():
    model, same = small(), small()
    assert model.fingerprint() == same.fingerprint() and len(model.fingerprint()) == 64
    same.quantizer.codebook.weight.data[0, 0] += 1e-6
    assert model.fingerprint() != same.fingerprint()
    assert model.fingerprint() != small((1, 3, 4)).fingerprint()


def test_another_size_has_the_same_weights_and_leaves_the_tokenizer_as_it_was():
    model = small()
    other = model.at_size((16, 24))
    assert other.scales.sides() == [[2, 3], [4, 6], [8, 12]] and other.image_size == (16, 24)
    assert model.scales.sides() == [1, 2, 4] and model.quantizer.scales == model.scales
    assert [id(each) for each in other.parameters()] == [id(each) for each in model.parameters()]
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert other.encode(images).shape == (2, 6 + 24 + 96)
    assert other.reconstruct(images).shape == images.shape
    before = model.encode(images[..., :8, :8])
    assert torch.equal(model.encode(images[..., :8, :8]), before)
    assert model.at_size((8, 8)) is model
    built = small(other.scales.grids)  # as if it had always had that size
    built.load_state_dict(model.state_dict())
    assert torch.equal(other.encode(images), built.encode(images))
    assert other.fingerprint() == built.fingerprint() != model.fingerprint()


@pytest.mark.parametrize("size", [(9, 8), (0, 8), (4, 4)])
def test_sizes_that_a_tokenizer_cannot_take(size):
    with pytest.raises(ValueError, match="expected"):
        small().at_size(size)
