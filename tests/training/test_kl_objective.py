"""Training the KL autoencoder: terms and their gradients, its measures, compilation, learning at all."""

import copy

import pytest
import torch

from hmar_cli.evaluation.reconstruction import evaluate_tokenizer
from hmar_cli.settings import KlObjective
from hmar_cli.tokenizers.kl import KlAutoencoder, posterior
from hmar_cli.tokenizers.losses import psnr
from hmar_cli.training.optimizer import parameter_groups, trainable_parameters
from hmar_cli.training.tokenizer import KlTraining


def autoencoder(multipliers=(1, 2)):
    torch.manual_seed(0)
    return KlAutoencoder(channels=8, multipliers=multipliers, res_blocks=1, z_channels=4)


def batch(count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)}


def compute(objective, progress=0.0, seed=0, **data):
    torch.manual_seed(seed)
    return objective(batch(**data), progress)


def test_metrics_have_the_same_names_and_shapes_in_every_step():
    objective = KlTraining(
        autoencoder(), KlObjective(adversarial_weight=0.1, adversarial_start=0.5, discriminator_channels=8)
    )
    shapes = [{k: v.shape for k, v in compute(objective, p)[1].items()} for p in (0.0, 0.9)]
    assert shapes[0] == shapes[1] and set(shapes[0].values()) == {()}
    assert set(shapes[0]) == {
        *("loss", "reconstruction", "perceptual", "kl", "adversarial", "discriminator"),
        *("psnr", "latent_std"),
    }
    assert all(not v.requires_grad for v in compute(objective, 0.9)[1].values())


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_the_loss_is_that_of_latent_diffusion_per_number_of_the_image(size):
    """Sums over an image's numbers and over its latents, divided by the image's numbers."""
    model = autoencoder()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    objective = KlTraining(model, KlObjective(l1=0.7, l2=0.3, perceptual="none", kl_weight=0.01))
    torch.manual_seed(5)
    loss, metrics = objective({"image": images}, 0.0)
    mean, std = posterior(model.moments(images))
    torch.manual_seed(5)
    z = mean + std * torch.randn_like(mean)
    pictures = model.decode(z)
    errors = 0.7 * (pictures - images).abs() + 0.3 * (pictures - images).square()
    normal = torch.distributions.Normal
    nats = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0))
    whole = (errors.sum() + 0.01 * nats.sum()) / 2  # of an image
    torch.testing.assert_close(loss, whole / (3 * size[0] * size[1]))
    torch.testing.assert_close(metrics["kl"], nats.mean().detach())
    torch.testing.assert_close(metrics["latent_std"], z.std().detach())
    torch.testing.assert_close(metrics["psnr"], psnr(images, pictures.detach()).mean())


def test_the_divergence_moves_the_encoder_alone():
    objective = KlTraining(autoencoder(), KlObjective(l1=0.0, l2=0.0, perceptual="none", kl_weight=1.0))
    compute(objective)[0].backward()
    grads = {name: p.grad for name, p in objective.model.named_parameters()}
    assert grads["quant_conv.bias"].abs().min() > 0
    assert grads["encoder.conv_in.weight"].abs().sum() > 0
    decoder = [g for n, g in grads.items() if n.startswith(("decoder", "post_quant"))]
    assert all(g is None or not g.any() for g in decoder)


def test_the_picture_s_error_reaches_mean_and_variance():
    objective = KlTraining(autoencoder(), KlObjective(perceptual="none", kl_weight=0.0))
    compute(objective)[0].backward()
    grad = objective.model.quant_conv.bias.grad
    assert grad[:4].abs().min() > 0 and grad[4:].abs().min() > 0


def test_every_step_draws_anew():
    objective = KlTraining(autoencoder(), KlObjective())
    assert compute(objective, seed=1)[0] == compute(objective, seed=1)[0] != compute(objective, seed=2)[0]


def test_perceptual_term_is_weighted():
    plain, weighted = (
        KlTraining(autoencoder(), KlObjective(perceptual_weight=w, kl_weight=0.0)) for w in (0.0, 0.5)
    )
    assert plain.perceptual is None and weighted.perceptual is not None
    (without, _), (loss, metrics) = compute(plain), compute(weighted)
    torch.testing.assert_close(loss, without + 0.5 * metrics["perceptual"])


def test_discriminator_rests_until_its_start():
    plain = KlTraining(autoencoder(), KlObjective())
    adversarial = KlTraining(autoencoder(), KlObjective(adversarial_weight=0.1, discriminator_channels=8))
    assert set(adversarial.networks) == {"model", "discriminator"} and set(plain.networks) == {"model"}
    assert adversarial.unused_parameters and not plain.unused_parameters
    assert torch.equal(compute(plain, 0.49)[0], compute(adversarial, 0.49)[0])
    loss, metrics = compute(adversarial, 0.5)
    expected = compute(plain, 0.5)[0] + 0.1 * metrics["adversarial"] + metrics["discriminator"]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("levels", "size", "layers"), [(1, 8, 1), (2, 8, 1), (3, 32, 2), (4, 32, 2), (5, 48, 3)]
)
def test_discriminator_follows_the_stride(levels, size, layers):
    model = KlAutoencoder(channels=4, multipliers=(1,) * levels, res_blocks=1, z_channels=2)
    objective = KlTraining(
        model,
        KlObjective(
            adversarial_weight=0.1, adversarial_start=0.0, discriminator_channels=4, perceptual="none"
        ),
    )
    assert objective.discriminator is not None
    strides = [m.stride for m in objective.discriminator.modules() if isinstance(m, torch.nn.Conv2d)]
    assert strides.count((2, 2)) == layers
    assert compute(objective, size=size)[0].isfinite()


def test_groups_cover_all_parameters_and_spare_biases_and_norms():
    objective = KlTraining(autoencoder(), KlObjective(adversarial_weight=0.1, discriminator_channels=8))
    decayed, undecayed = parameter_groups(objective)
    assert {**decayed, **undecayed}.keys() == trainable_parameters(objective).keys()
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert "model.quant_conv.weight" in decayed and "model.quant_conv.bias" in undecayed


def test_compilation_reaches_what_training_calls(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **kwargs: lambda *args: calls.append(1) or call(*args))
    objective, calls = KlTraining(autoencoder(), KlObjective()), []
    expected = compute(objective)[0]
    objective.compile_networks()
    assert calls == []
    assert torch.equal(compute(objective)[0], expected)
    assert calls == [1, 1]  # encoder and decoder


def test_training_improves_the_pictures_and_the_divergence_has_weight():
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(0, 256, (16, 3, 1, 1), dtype=torch.uint8, generator=generator).expand(
        -1, -1, 8, 8
    )
    found = {}
    for weight in (1e-6, 0.1):
        objective = KlTraining(
            autoencoder(), KlObjective(perceptual="none", l1=0.0, l2=1.0, kl_weight=weight)
        )
        before = evaluate_tokenizer(copy.deepcopy(objective.model).eval(), colours.split(8)).summary()
        optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
        for step in range(40):
            torch.manual_seed(step)
            loss, metrics = objective({"image": colours}, step / 40)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = evaluate_tokenizer(objective.model.eval(), colours.split(8)).summary()
        assert after["psnr"] > before["psnr"] + 3
        found[weight] = metrics["kl"].item()
    assert found[0.1] < 0.8 * found[1e-6]
