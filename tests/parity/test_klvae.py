"""The KL autoencoder against recorded outputs of the published code, on its own random weights."""

import golden
import pytest
import torch
from torch import nn

from hmar_cli.checkpoints.published_masked import KL16_SCALE, kl_settings, read_kl
from hmar_cli.tokenizers import blocks
from hmar_cli.tokenizers.kl import KlAutoencoder, posterior, sample_posterior


def build(config: dict, state: dict[str, torch.Tensor]) -> KlAutoencoder:
    """Build an autoencoder from a fixture's config and load its published state."""
    expected = {"double_z": True, "use_variational": True, "attn_resolutions_decoder": [], "norm_eps": 1e-6}
    assert {key: config[key] for key in expected} == expected, "a fixture of an autoencoder that is not built"
    imported = read_kl(state)
    assert imported.unused == []
    settings = kl_settings(imported)
    assert settings.z_channels == config["embed_dim"] and settings.attention
    assert (settings.channels, settings.multipliers, settings.res_blocks) == (
        config["ch"],
        tuple(config["ch_mult"]),
        config["num_res_blocks"],
    )
    model = KlAutoencoder(
        channels=settings.channels,
        multipliers=settings.multipliers,
        res_blocks=settings.res_blocks,
        z_channels=settings.z_channels,
        attention=settings.attention,
        latent_scale=settings.latent_scale,
    )
    model.load_state_dict(imported.state)
    return model.eval()


@pytest.fixture(params=golden.fixtures_of("klvae"), ids=golden.fixture_id)
def case(request, monkeypatch):
    description, tensors = golden.load_fixture(request.param)
    groups = description["config"]["num_groups"]
    monkeypatch.setattr(blocks, "group_norm", lambda channels: nn.GroupNorm(groups, channels, eps=1e-6))
    model = build(description["config"], golden.part(tensors, "state."))
    with torch.no_grad():
        yield model, tensors, description


def test_every_recorded_tensor(case):
    model, tensors, description = case
    images, noise = tensors["in.image"], tensors["rand.sample_noise"]
    moments = model.moments(images)
    mean, std = posterior(moments)
    sample = sample_posterior(moments, noise)
    ours = {
        "out.moments": moments,
        "out.mean": mean,
        "out.logvar": 2 * std.log(),
        "out.std": std,
        "out.decode": model.decode(mean),
        "out.sample": sample,
        "out.scaled_sample": sample * model.latent_scale,
    }
    assert set(ours) == {name for name in tensors if name.startswith("out.")}
    for name, value in ours.items():
        assert golden.distance(value, tensors[name]) <= golden.bound(description, name), name


def test_recorded_latents_decode_to_the_recorded_picture(case):
    model, tensors, description = case
    expected = tensors["out.decode"]
    latents = tensors["out.mean"] * KL16_SCALE
    limit = golden.bound(description, "out.decode") * expected.abs().max() / expected.clamp(-1, 1).abs().max()
    assert golden.distance(model.decode_latents(latents), expected.clamp(-1, 1)) <= limit
    assert golden.distance(model.reconstruct(tensors["in.image"]), expected.clamp(-1, 1)) <= limit
