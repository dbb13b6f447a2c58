"""Sampling of MAR and Hi-MAR: schedules, what depends on what, and numbers that are not finite."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hmar_cli.models.heads import MlpHead, TransformerHead
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.sampling.masked import guidance, mask_lengths, sample_masked
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import MaskedArSample


def model(pivots: str = "conditional", **settings: object) -> MaskedTransformer:
    torch.manual_seed(0)
    built = MaskedTransformer(
        grid=(4, 6),
        pivot_grid=(2, 3),
        channels=3,
        pivots=pivots,  # type: ignore[arg-type]
        num_classes=5,
        context_length=2,
        encoder_depth=1,
        decoder_depth=1,
        width=16,
        heads=2,
        pivot_head=MlpHead(channels=3, cond_width=16, depth=1, width=16),
        dense_head=TransformerHead(channels=3, cond_width=16, depth=1, width=16, heads=2, grid=(4, 6)),
        **settings,  # type: ignore[arg-type]
    )
    for parameter in built.parameters():  # heads and modulations begin with zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return built.eval()


SETTINGS = MaskedArSample(steps=4, pivot_steps=3, head_sampler="dpm++", head_steps=4, pivot_head_steps=4)


def draw(built: MaskedTransformer, images: list[int], settings: MaskedArSample = SETTINGS) -> Tensor:
    labels = torch.tensor(images) % 5
    return sample_masked(built, labels, settings, PhiloxNoise(7, torch.tensor(images))).latents


@pytest.mark.parametrize("total", [6, 16, 64, 256])
def test_every_step_draws_something(total: int) -> None:
    for steps in (1, 2, total // 2, total):
        lengths = [total, *mask_lengths(total, steps)]
        lengths[-1] = 0
        drawn = [before - after for before, after in itertools.pairwise(lengths)]
        assert sum(drawn) == total and min(drawn) >= 1


def test_guidance_grows_with_what_is_known() -> None:
    assert guidance(3.0, "linear", 64, 64) == 1
    assert guidance(3.0, "linear", 64, 32) == 2
    assert guidance(3.0, "constant", 64, 64) == 3


@pytest.mark.parametrize("pivots", ["none", "visual", "conditional"])
@pytest.mark.parametrize("head_sampler", ["ddpm", "ddim", "dpm++"])
def test_an_image_is_the_same_in_any_batch(pivots: str, head_sampler: str) -> None:
    settings = MaskedArSample(
        steps=4, pivot_steps=3, head_sampler=head_sampler, head_steps=4, pivot_head_steps=4
    )  # type: ignore[arg-type]
    built = model(pivots)
    together = draw(built, [3, 0, 8], settings)
    assert together.shape == (3, 3, 4, 6)
    for place, image in enumerate([3, 0, 8]):
        torch.testing.assert_close(together[place], draw(built, [image], settings)[0], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize("head_sampler", ["ddpm", "dpm++"])
def test_ancestral_sampling_begins_in_float32(head_sampler: str) -> None:
    """Its first step multiplies the head's error by hundreds, so bfloat16 would be lost there."""
    built, seen = model(), []
    for head in (built.pivot_head, built.dense_head):
        assert head is not None
        head.input.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        draw(built, [0, 1], replace(SETTINGS, head_sampler=head_sampler))  # type: ignore[arg-type]
    first = torch.float32 if head_sampler == "ddpm" else torch.bfloat16
    assert seen == [first, torch.bfloat16, torch.bfloat16, torch.bfloat16] * (3 + 4)


@pytest.mark.parametrize("scale_vector", ["none", "table", "sinusoidal"])
def test_every_scale_vector(scale_vector: str) -> None:
    assert draw(model(scale_vector=scale_vector), [0]).isfinite().all()


def test_pivots_reach_the_dense_tokens_as_conditional_tokens_alone() -> None:
    """Other latents of the same conditional tokens change nothing; other conditional tokens do."""
    built = model()
    with torch.no_grad():
        before = draw(built, [0])
        assert built.conditional_proj is not None
        bias = built.conditional_proj.bias.clone()
        built.conditional_proj.bias += 10 * torch.randn(16)
        assert (draw(built, [0]) - before).norm() / before.norm() > 1e-4
        built.conditional_proj.bias.copy_(bias)
        built.empty_pivots += 1  # used in training only
        torch.testing.assert_close(draw(built, [0]), before)


def test_settings_that_cannot_be_followed() -> None:
    with pytest.raises(ValueError, match="expected 1 to 24 steps for 24 tokens, got 25"):
        draw(model(), [0], MaskedArSample(steps=25, pivot_steps=3))
    with pytest.raises(ValueError, match="expected 1 to 6 steps for 6 tokens, got 7"):
        draw(model(), [0], MaskedArSample(pivot_steps=7))
    with pytest.raises(ValueError, match='expected temperature 1 for "ddim"'):
        draw(model(), [0], MaskedArSample(head_sampler="ddim", temperature=0.9))


def test_broken_weights_are_named() -> None:
    built = model()
    with torch.no_grad():
        built.dense_head.output.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(built, [0])


def test_normal_numbers_are_normal_and_belong_to_their_place() -> None:
    noise = PhiloxNoise(5, torch.arange(40))
    places = torch.arange(32).expand(40, -1)
    numbers = noise.normal(1, 2, range(8), places, 10)
    assert numbers.shape == (8, 40, 32, 10)
    assert numbers.mean().abs() < 0.01
    assert (numbers.std() - 1).abs() < 0.01
    assert (numbers.pow(4).mean() - 3).abs() < 0.1
    flat = numbers.transpose(0, 3).reshape(10, -1)  # channels are independent
    assert (torch.corrcoef(flat) - torch.eye(10)).abs().max() < 0.03
    part = PhiloxNoise(5, torch.tensor([7])).normal(1, 2, range(3, 4), places[:1, 9:12], 10)
    assert torch.equal(part[0, 0], numbers[3, 7, 9:12])
    others = [noise.normal(p, s, range(8), places, 10) for p, s in ((0, 2), (1, 3))]
    assert all((other != numbers).float().mean() > 0.99 for other in others)


def test_orders_are_permutations() -> None:
    orders = PhiloxNoise(5, torch.arange(30)).order(1, 24)
    assert (orders.sort(dim=1).values == torch.arange(24)).all()
    assert len({tuple(row) for row in orders.tolist()}) == 30
    assert not torch.equal(orders, PhiloxNoise(5, torch.arange(30)).order(0, 24))
