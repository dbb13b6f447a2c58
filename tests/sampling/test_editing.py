"""Edits: their limits, what stays and what is drawn, for all families, over many regions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hmar_cli.errors import UserError
from hmar_cli.models.heads import MlpHead, TransformerHead
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.models.text import JointTextEncoder
from hmar_cli.pictures.painter import ModelPainter
from hmar_cli.sampling.editing import EditSettings, edit_images, model_size, region_views
from hmar_cli.sampling.images import Job, Labels, Prompts, Sampler, steady
from hmar_cli.sampling.masked import KnownTokens, sample_masked
from hmar_cli.sampling.next_scale import KeptTokens, sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import MaskedArSample, NextScaleSample
from hmar_cli.tokenizers.kl import KlAutoencoder, posterior
from hmar_cli.tokenizers.msvq import MultiScaleVQ

SCALES = Scales.of([1, 2, [2, 3], [4, 6]])
HEIGHT, WIDTH, GRID, PIVOTS = 8, 12, (4, 6), (2, 3)
REFINED = ((1,), (1, 3), (2, 2, 2), (4, 8, 12))
NEXT_SCALE = ["var", "hmar", "hmar-refined", "hmar-leak-free"]
MASKED = ["mar", "mar-transformer", "himar", "himar-visual"]
TEXT = ["himar-clip", "himar-joint"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Family:
    """A tiny random model with its tokenizer and settings."""

    model: Any
    tokenizer: Any
    settings: Any
    conditions: Any

    def edit(self, images: Tensor, region: Tensor, indices: list[int], **changes: float) -> Tensor:
        return edit_images(
            self.model,
            self.tokenizer,
            images,
            region,
            self.conditions.encode(indices, CPU),
            self.settings,
            EditSettings(**changes),  # type: ignore[arg-type]
            PhiloxNoise(5, torch.tensor(indices)),
        )


def encode_text(texts: Any) -> Any:
    """Embeddings [B, 2, 6], another one for every text."""
    return np.stack([np.random.default_rng(len(text)).normal(size=(2, 6)).astype("f4") for text in texts])


def encode_ids(texts: Any) -> Any:
    return np.array([[len(text) % 7, 1] for text in texts])


def make(name: str) -> Family:
    torch.manual_seed(0)
    if name in NEXT_SCALE:
        refines = name in ("hmar-refined", "hmar-leak-free")
        tokenizer: Any = MultiScaleVQ(
            channels=8, multipliers=(1, 1), res_blocks=1, z_channels=4, vocab_size=32, scales=SCALES
        )
        model: Any = NextScaleTransformer(
            scales=SCALES,
            z_channels=4,
            vocab_size=32,
            num_classes=3,
            depth=2,
            width=32,
            heads=2,
            pattern="causal" if name == "var" else "diagonal",
            masked_layers=int(refines),
            leak_free=name == "hmar-leak-free",
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        settings: Any = NextScaleSample(top_k=20, top_p=0.95, schedule=REFINED if refines else ())
        return Family(model.eval(), tokenizer.eval(), settings, Labels((0, 2, 1)))
    tokenizer = KlAutoencoder(
        channels=8, multipliers=(1, 1), res_blocks=1, z_channels=3, latent_scale=0.8
    ).eval()
    settings = MaskedArSample(steps=4, pivot_steps=3, head_sampler="dpm++", head_steps=4, pivot_head_steps=4)
    model = masked_model(name)
    if name == "himar-clip":
        return Family(model, tokenizer, settings, Prompts(("a", "of", "the"), lambda device: encode_text))
    if name == "himar-joint":
        return Family(model, tokenizer, settings, Prompts(("a", "of", "the"), lambda device: encode_ids))
    return Family(model, tokenizer, settings, Labels((0, 2, 1)))


def masked_model(name: str) -> MaskedTransformer:
    mlp = {"channels": 3, "cond_width": 16, "depth": 1, "width": 16}
    text = JointTextEncoder(width=6, depth=1, heads=1, context_length=2) if "joint" in name else None
    built = MaskedTransformer(
        grid=GRID,
        pivot_grid=PIVOTS,
        channels=3,
        pivots="none" if name.startswith("mar") else "visual" if "visual" in name else "conditional",
        num_classes=3,
        text_width=6 if name in TEXT else 0,
        text=text,
        context_length=2,
        encoder_depth=1,
        decoder_depth=1,
        width=16,
        heads=2,
        pivot_head=MlpHead(**mlp),
        dense_head=MlpHead(**mlp) if name == "mar" else TransformerHead(**mlp, heads=2, grid=GRID),
    )
    for parameter in built.parameters():  # heads and modulations begin with zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return built.eval()


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_region(seed: int) -> Tensor:
    """Boxes and free forms, hard and soft, sometimes touching a single token."""
    rng = np.random.default_rng(seed)
    region = torch.zeros(HEIGHT, WIDTH)
    for _ in range(int(rng.integers(1, 3))):
        top, left = int(rng.integers(0, HEIGHT)), int(rng.integers(0, WIDTH))
        bottom, right = int(rng.integers(top + 1, HEIGHT + 1)), int(rng.integers(left + 1, WIDTH + 1))
        region[top:bottom, left:right] = 1.0 if rng.random() < 0.5 else float(rng.uniform(0.05, 1))
    if rng.random() < 0.3:
        region *= torch.from_numpy(rng.random((HEIGHT, WIDTH)) < 0.5)
    return region


def decoded(family: Family, draw: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the tokenizer is given to decode while `draw` runs, [B, C, h, w]."""
    seen: list[Tensor] = []
    name = "decode" if isinstance(family.tokenizer, MultiScaleVQ) else "decode_latents"
    plain = getattr(family.tokenizer, name)
    with monkeypatch.context() as patch:
        patch.setattr(family.tokenizer, name, lambda x: (seen.append(x), plain(x))[1])
        draw()
    return torch.cat(seen)


def of_the_picture(family: Family, images: Tensor) -> Tensor:
    """Features or scaled latents of pictures, [B, C, h, w]."""
    with torch.no_grad():
        if isinstance(family.tokenizer, MultiScaleVQ):
            parts = [family.tokenizer.quantizer.f_hat(family.tokenizer.encode(x)) for x in images.split(1)]
        else:
            parts = [posterior(family.tokenizer.moments(x))[0] * 0.8 for x in images.split(1)]
    return torch.cat(parts)


# Limits


@pytest.mark.parametrize("name", [NEXT_SCALE[0], MASKED[0]])
def test_what_is_compiled_where_it_is_left_open(name: str) -> None:
    """Batches of VAR and HMAR are recorded on a GPU; heads of MAR and Hi-MAR are compiled on request, anywhere."""
    family, gpu = make(name), torch.device("cuda")
    job = Job(settings=family.settings, conditions=family.conditions, count=1, seed=0, batch_size=1)
    heads = name in MASKED
    assert [job.compiles(place) for place in (gpu, CPU)] == [not heads, False]
    assert [replace(job, compile=True).compiles(place) for place in (gpu, CPU)] == [True, heads]
    assert not replace(job, compile=False).compiles(gpu)


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ([9], 9),
        ([9, 5], 5),  # it records, and is all there is to go by
        ([9, 5, 2], 2),
        ([9, 5, 2, 4], 3),
        ([9, 5, 2, 4, 1], 2),
    ],
)
def test_the_time_of_a_batch_leaves_out_those_that_load_and_record(times: list[int], seconds: int) -> None:
    assert steady(times) == seconds


@pytest.mark.parametrize("name", NEXT_SCALE + MASKED + TEXT)
def test_a_full_region_is_plain_sampling(name: str) -> None:
    family, indices = make(name), [4, 0, 9]
    job = Job(settings=family.settings, conditions=family.conditions, count=10, seed=5, batch_size=3)
    plain, _ = Sampler(family.model, family.tokenizer, job, CPU)(indices)
    edited = family.edit(pictures(3), torch.ones(HEIGHT, WIDTH), indices)
    assert torch.equal(edited, plain)
    assert (edited[0] - edited[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", NEXT_SCALE + MASKED + TEXT)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_an_empty_region_is_the_reconstruction(name: str, strength: float) -> None:
    family = make(name)
    images = pictures(2)
    edited = family.edit(images, torch.zeros(HEIGHT, WIDTH), [0, 1], strength=strength)
    expected = torch.cat([family.tokenizer.reconstruct(each) for each in images.split(1)])
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NEXT_SCALE + MASKED + TEXT)
def test_a_picture_is_edited_the_same_in_any_batch(name: str) -> None:
    family, images, region = make(name), pictures(3), random_region(2)
    together = family.edit(images, region, [3, 0, 8])
    for place, index in enumerate([3, 0, 8]):
        alone = family.edit(images[place : place + 1], region, [index])
        if name in NEXT_SCALE:
            assert torch.equal(together[place], alone[0])
        torch.testing.assert_close(together[place], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["var", "hmar-refined", "mar", "himar"])
def test_variations_of_one_picture(name: str) -> None:
    family, image = make(name), pictures(1)
    region = torch.zeros(HEIGHT, WIDTH)
    region[:, 6:] = 1
    several = family.edit(image, region, [0, 3, 6])  # one condition
    repeated = family.edit(image.repeat(3, 1, 1, 1), region, [0, 3, 6])
    assert torch.equal(several, repeated)
    assert min((several[a] - several[b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 0.01


# What stays and what is drawn


@pytest.mark.parametrize("name", NEXT_SCALE + MASKED)
@pytest.mark.parametrize("seed", range(12))
def test_tokens_outside_the_region_are_the_pictures(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, images, region = make(name), pictures(2), random_region(seed)
    changes = {"least_coverage": seed % 3 / 3}
    features = decoded(family, lambda: family.edit(images, region, [0, 1], **changes), monkeypatch)
    kept, covered = of_the_picture(family, images), region_views(family.model, region, EditSettings())[-1]
    outside, inside = ~covered.drawn, covered.drawn
    assert inside.any() == bool(region.any())
    torch.testing.assert_close(features[..., outside], kept[..., outside], rtol=0, atol=1e-6)
    if name in MASKED:
        assert ((features - kept).abs().amax(dim=1)[:, inside] > 1e-4).all()  # each one is new
    elif inside.any():
        assert (features - kept).abs().amax(dim=1)[:, inside].max() > 1e-4  # a code may be drawn again


@pytest.mark.parametrize("name", NEXT_SCALE)
@pytest.mark.parametrize("seed", range(4))
def test_features_are_blended_by_coverage(name: str, seed: int) -> None:
    family, region = make(name), random_region(seed)
    views = region_views(family.model, region, EditSettings(least_coverage=0))
    quantizer, own = family.tokenizer.quantizer, family.tokenizer.encode(pictures(2))
    kept = kept_tokens(own, views)
    noise = PhiloxNoise(5, torch.arange(2))
    with torch.no_grad():
        tokens, f_hat = sample_next_scale(
            family.model, quantizer, torch.tensor([0, 2]), family.settings, noise, kept=kept
        )
        picture, new = quantizer.f_hat(own), quantizer.f_hat(tokens)
    expected = picture + views[-1].coverage * (new - picture)
    torch.testing.assert_close(f_hat, expected, rtol=1e-5, atol=1e-5)
    drawn = torch.cat(kept.drawn)
    assert torch.equal(tokens[:, ~drawn], own[:, ~drawn])


@pytest.mark.parametrize("name", ["var", "hmar-refined"])
def test_a_soft_region_is_the_weight_of_the_new_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one scale to draw, which sees kept scales alone, the new tokens are those of the hard region."""
    family, images = make(name), pictures(2)
    soft = torch.linspace(0.1, 1, HEIGHT)[:, None].expand(-1, WIDTH)
    picture, half, new = (
        decoded(family, lambda x=region: family.edit(images, x, [0, 1], keep_scales=3), monkeypatch)
        for region in (torch.zeros(HEIGHT, WIDTH), soft, torch.ones(HEIGHT, WIDTH))
    )
    weight = soft.unflatten(0, (-1, 2)).mean(1)[:, ::2]  # [h, w]
    torch.testing.assert_close(half, picture + weight * (new - picture), rtol=1e-5, atol=1e-5)


def kept_tokens(tokens: Tensor, views: list[Any]) -> KeptTokens:
    drawn = tuple(view.drawn.flatten() for view in views)
    return KeptTokens(tokens, drawn, tuple(int(each.sum()) for each in drawn), views[-1].coverage)


@pytest.mark.parametrize("name", ["var", "hmar"])
@pytest.mark.parametrize("keep_scales", [0, 2])
def test_what_is_drawn_sees_what_is_kept(name: str, keep_scales: int) -> None:
    """The logits of all scales, those of VAR from its cache, are the ones of a call on blended features."""
    family, seen = make(name), {}
    region = torch.zeros(HEIGHT, WIDTH)
    region[2:7, 3:9] = 1
    views = region_views(family.model, region, EditSettings(keep_scales=keep_scales, least_coverage=0))
    quantizer, labels = family.tokenizer.quantizer, torch.tensor([0, 2])
    kept = kept_tokens(family.tokenizer.encode(pictures(2)), views)
    settings = replace(family.settings, cfg=0.0)
    with torch.no_grad():
        tokens, _ = sample_next_scale(
            family.model,
            quantizer,
            labels,
            settings,
            PhiloxNoise(5, torch.arange(2)),
            trace=seen.__setitem__,
            kept=kept,
        )
        f_hat, inputs = quantizer.f_hat(tokens[:, :0]), []
        for k in range(len(SCALES) - 1):
            f_hat = f_hat + kept.contribution(tokens[:, SCALES.slice(k)], k, quantizer)
            inputs.append(quantizer.scale_input(f_hat, k + 1))
        expected = family.model(labels, torch.cat(inputs, dim=1))
    asked = [k for k in range(len(SCALES)) if f"logits.{k}" in seen]
    assert asked == list(range(keep_scales, len(SCALES)))
    for k in asked:
        torch.testing.assert_close(seen[f"logits.{k}"], expected[:, SCALES.slice(k)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["hmar-refined", "hmar-leak-free"])
@pytest.mark.parametrize("seed", range(6))
def test_refinement_redraws_the_region_alone(name: str, seed: int) -> None:
    family, seen = make(name), {}
    views = region_views(family.model, random_region(seed), EditSettings(least_coverage=0))
    kept = kept_tokens(family.tokenizer.encode(pictures(2)), views)
    sample_next_scale(
        family.model,
        family.tokenizer.quantizer,
        torch.tensor([0, 2]),
        family.settings,
        PhiloxNoise(5, torch.arange(2)),
        trace=seen.__setitem__,
        kept=kept,
    )
    for k in range(1, len(SCALES)):
        passes, count = REFINED[k], kept.counts[k]
        counts = [-(-count * sum(passes[j:]) // sum(passes)) for j in range(1, len(passes))]
        wanted = sorted({n for n in counts if n}, reverse=True)
        found = [seen[name] for name in seen if name.startswith(f"masked.{k}.")]
        assert [positions.shape[1] for positions in found] == wanted
        for positions in found:
            assert kept.drawn[k][positions].all()


def test_a_single_token_is_refined_with_its_neighbours_in_view() -> None:
    family, seen = make("hmar-refined"), {}
    region = torch.zeros(HEIGHT, WIDTH)
    region[3, 3] = 1
    views = region_views(family.model, region, EditSettings(least_coverage=0))
    assert [int(view.drawn.sum()) for view in views] == [1, 1, 1, 1]
    own = family.tokenizer.encode(pictures(1))
    other = own.clone()
    other[:, SCALES.slice(3)] = (other[:, SCALES.slice(3)] + 1) % 32
    logits = []
    for tokens in (own, other):
        sample_next_scale(
            family.model,
            family.tokenizer.quantizer,
            torch.tensor([0]),
            family.settings,
            PhiloxNoise(5, torch.arange(1)),
            trace=seen.__setitem__,
            kept=kept_tokens(tokens, views),
        )
        logits.append((seen["logits.3"], seen["logits.3.1"]))
    assert torch.equal(logits[0][0], logits[1][0])  # the draft sees earlier scales alone
    assert (logits[0][1] - logits[1][1])[:, 7].abs().max() > 1e-3


@pytest.mark.parametrize("impose_known", [True, False])
@pytest.mark.parametrize("head_sampler", ["ddpm", "dpm++"])
@pytest.mark.parametrize("name", MASKED)
def test_known_tokens_stay_known_in_both_phases(name: str, impose_known: bool, head_sampler: str) -> None:
    family, seen = make(name), {}
    settings = replace(family.settings, impose_known=impose_known, head_sampler=head_sampler)
    generator = torch.Generator().manual_seed(3)
    pivots = KnownTokens(torch.randn(2, 6, 3, generator=generator), torch.arange(6) < 2, 2)
    dense = KnownTokens(torch.randn(2, 24, 3, generator=generator), torch.arange(24) % 5 == 0, 5)
    sampled = sample_masked(
        family.model,
        torch.tensor([0, 2]),
        settings,
        PhiloxNoise(5, torch.arange(2)),
        trace=seen.__setitem__,
        known=(None if family.model.pivot_grid is None else pivots, dense),
    )
    for phase, known in ((0, pivots), (1, dense)):
        found = [tokens for key, tokens in seen.items() if key.startswith(f"tokens.{phase}.")]
        assert len(found) == (0 if phase == 0 and family.model.pivot_grid is None else (2, 4)[phase])
        for tokens in found:  # after every step
            assert torch.equal(tokens[:, ~known.region], known.tokens[:, ~known.region])
    drawn = sampled.latents.flatten(2).transpose(1, 2)[:, dense.region]
    assert ((drawn - dense.tokens[:, dense.region]).abs() > 1e-4).all()


@pytest.mark.parametrize("name", MASKED)
def test_what_mar_draws_sees_what_is_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, region = make(name), torch.zeros(HEIGHT, WIDTH)
    region[2:6, 4:8] = 1
    drawn = region_views(family.model, region, EditSettings())[-1].drawn
    one, two = (
        decoded(family, lambda x=images: family.edit(x, region, [0]), monkeypatch)
        for images in pictures(2).split(1)
    )
    assert ((one - two)[..., drawn].abs() > 1e-5).any()


def test_known_pivots_are_the_learned_empty_ones_to_the_second_phase() -> None:
    region = torch.zeros(HEIGHT, WIDTH)
    region[:, 6:] = 1
    for name, region_matters in (("himar", True), ("himar-visual", False)):
        family, images = make(name), pictures(1)
        before = [family.edit(images, each, [0]) for each in (region, torch.ones(HEIGHT, WIDTH))]
        with torch.no_grad():
            family.model.empty_pivots += 3
        after = [family.edit(images, each, [0]) for each in (region, torch.ones(HEIGHT, WIDTH))]
        assert torch.equal(before[0], after[0]) != region_matters
        assert torch.equal(before[1], after[1])  # no pivot is known


def test_pivots_come_from_the_shrunken_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    family, images, seen = make("himar"), pictures(1), []
    plain = family.tokenizer.moments
    monkeypatch.setattr(family.tokenizer, "moments", lambda x: (seen.append(x), plain(x))[1])
    family.edit(images, random_region(0), [0])
    small = images.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], small)
    torch.testing.assert_close(seen[1], images)


# How much is drawn


@pytest.mark.parametrize("name", ["var", "hmar-refined"])
@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"strength": 0.9}, 0),
        ({"strength": 0.75}, 1),
        ({"strength": 0.5}, 2),
        ({"strength": 0.01}, 3),  # something is drawn all the same
        ({"keep_scales": 3}, 3),
        ({"strength": 0.75, "keep_scales": 2}, 2),
    ],
)
def test_first_scales_that_are_kept(name: str, changes: dict[str, Any], first: int) -> None:
    family, steps = make(name), []
    views = region_views(family.model, torch.ones(HEIGHT, WIDTH), EditSettings(**changes))
    own = family.tokenizer.encode(pictures(2))

    class Recorded(PhiloxNoise):
        def draw(self, probabilities: Tensor, step: int) -> Tensor:
            steps.append(step)
            return super().draw(probabilities, step)

    tokens, _ = sample_next_scale(
        family.model,
        family.tokenizer.quantizer,
        torch.tensor([0, 2]),
        family.settings,
        Recorded(5, torch.arange(2)),
        kept=kept_tokens(own, views),
    )
    begin = SCALES.offsets[first]
    assert torch.equal(tokens[:, :begin], own[:, :begin])
    assert not torch.equal(tokens[:, begin:], own[:, begin:])
    draws = [len(passes) for passes in REFINED] if family.settings.schedule else [1] * 4
    assert steps == list(range(sum(draws[:first]), sum(draws)))  # the numbers that a full edit would use


@pytest.mark.parametrize("name", MASKED)
def test_strength_is_the_share_of_the_region(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, images = make(name), pictures(2)
    region = torch.zeros(HEIGHT, WIDTH)
    region[2:8, 2:12] = 1  # 15 tokens
    kept, before = of_the_picture(family, images), torch.zeros(2, *GRID, dtype=torch.bool)
    for strength, count in ((0.05, 1), (0.2, 3), (0.5, 8), (1.0, 15)):
        draw = decoded(
            family, lambda s=strength: family.edit(images, region, [0, 1], strength=s), monkeypatch
        )
        changed = (draw - kept).abs().amax(dim=1) > 1e-5
        assert changed.sum(dim=(1, 2)).tolist() == [count, count]
        assert (changed | ~before).all()  # a stronger edit draws those of a weaker one, and more
        before = changed
    assert not torch.equal(before[0], torch.ones(GRID, dtype=torch.bool))


def test_a_small_region_takes_fewer_steps() -> None:
    family = make("himar")
    region = torch.zeros(HEIGHT, WIDTH)
    region[0, 0] = 1  # one pivot, one token
    edited = family.edit(pictures(1), region, [0])
    with pytest.raises(ValueError, match="expected 1 to 24 steps for 24 tokens, got 25"):
        replace(family, settings=replace(family.settings, steps=25)).edit(pictures(1), region, [0])
    assert edited.isfinite().all()


# The region as the model sees it


def test_views_of_a_region() -> None:
    region = torch.zeros(HEIGHT, WIDTH)
    region[0:2, 0:3] = 1  # a token and a half
    hmar = make("hmar").model
    views = region_views(hmar, region, EditSettings(keep_scales=1, least_coverage=0))
    assert [view.name for view in views] == [f"scale {k} of 4" for k in (1, 2, 3, 4)]
    assert [tuple(view.coverage.shape) for view in views] == list(SCALES.grids)
    assert views[3].coverage[0].tolist() == [1, 0.5, 0, 0, 0, 0] and views[3].coverage.sum() == 1.5
    assert views[2].coverage.flatten().tolist() == [0.375, 0, 0, 0, 0, 0]
    assert views[1].coverage.flatten().tolist() == [0.25, 0, 0, 0]
    assert views[0].coverage.tolist() == [[0.0625]]
    assert [int(view.drawn.sum()) for view in views] == [0, 1, 1, 2]
    for least, drawn in (
        (0.05, [1, 1, 1, 2]),
        (0.25, [0, 0, 1, 2]),
        (0.5, [0, 0, 0, 2]),
    ):  # "above", not "from"
        views = region_views(hmar, region, EditSettings(least_coverage=least))
        assert [int(view.drawn.sum()) for view in views] == drawn
    full = region_views(hmar, torch.ones(HEIGHT, WIDTH), EditSettings(least_coverage=0.999))
    assert all(view.drawn.all() for view in full)
    assert [
        (v.name, tuple(v.drawn.shape)) for v in region_views(make("mar").model, region, EditSettings())
    ] == [("tokens", GRID)]
    both = region_views(make("himar").model, region, EditSettings(strength=0.5))
    assert [(v.name, int(v.drawn.sum())) for v in both] == [("pivots", 1), ("tokens", 2)]


@pytest.mark.parametrize("seed", range(20))
def test_a_coarse_token_is_drawn_where_a_fine_one_is(seed: int) -> None:
    """Unless a least coverage is asked for, a region never vanishes from a scale."""
    region = random_region(seed)
    for name in ("hmar", "himar"):
        *coarse, finest = region_views(make(name).model, region, EditSettings(least_coverage=0))
        assert torch.equal(finest.drawn, torch.nn.functional.max_pool2d(region[None], 2)[0] > 0)
        for view in coarse:
            pooled = torch.nn.functional.adaptive_max_pool2d(finest.drawn[None].float(), view.drawn.shape)[0]
            assert torch.equal(view.drawn, pooled > 0)


# Refusals


def test_wrong_arguments() -> None:
    family, mar, region = make("hmar"), make("mar"), torch.ones(HEIGHT, WIDTH)
    assert model_size(family.model, family.tokenizer) == model_size(mar.model, mar.tokenizer) == (8, 12)
    for strength in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected a strength above 0"):
            EditSettings(strength=strength)
    with pytest.raises(ValueError, match="expected 0 or more scales to keep, got -1"):
        EditSettings(keep_scales=-1)
    for least in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a least coverage from 0"):
            EditSettings(least_coverage=least)
    with pytest.raises(ValueError, match="expected at most 3 scales to keep, got 4"):
        family.edit(pictures(1), region, [0], keep_scales=4)
    with pytest.raises(ValueError, match="expected no scales to keep"):
        mar.edit(pictures(1), region, [0], keep_scales=1)
    for wrong in (region * 1.5, region - 1.5, region * float("nan")):
        with pytest.raises(ValueError, match="numbers from 0 to 1"):
            family.edit(pictures(1), wrong, [0])
    with pytest.raises(ValueError, match="region of at least 4 x 6"):
        region_views(family.model, torch.ones(3, 6), EditSettings())
    with pytest.raises(ValueError, match=r"expected images .* got .*12, 8"):
        family.edit(pictures(1).transpose(2, 3), region, [0])
    with pytest.raises(ValueError, match=r"got images .* and a region .*12, 8"):
        family.edit(pictures(1), region.T, [0])
    with pytest.raises(ValueError, match=r"expected 1 image or 3, as many .* got 2"):
        family.edit(pictures(2), region, [0, 1, 2])
    for one, other in ((family, mar), (mar, family)):
        with pytest.raises(ValueError, match="expected the tokenizer and the settings"):
            replace(one, settings=other.settings).edit(pictures(1), region, [0])


@pytest.mark.parametrize("name", NEXT_SCALE + MASKED + TEXT)
def test_without_a_condition_no_class_and_no_text_is_seen(name: str) -> None:
    family, region, batches = make(name), random_region(2).numpy(), set()
    painter = ModelPainter(family.model, family.tokenizer, None, family.settings, EditSettings())
    images = np.full((2, HEIGHT, WIDTH, 3), 90, np.uint8)
    if isinstance(family.model, MaskedTransformer):
        family.model.decoder.register_forward_pre_hook(lambda stack, inputs: batches.add(len(inputs[0])))
    first = painter.paint(images, region, [4, 7], 0)
    assert batches <= {2}  # nothing to guide towards
    seen = family.model.text_proj if name in TEXT else family.model.class_embed
    with torch.no_grad():
        for parameter in seen.parameters():
            parameter[:3].add_(1.0)  # of VAR and HMAR, the row below stands for "no class"
    assert (painter.paint(images, region, [4, 7], 0) == first).all()


@pytest.mark.parametrize("name", ["hmar", "himar"])
@pytest.mark.parametrize("broken", ["model", "tokenizer"])
def test_broken_weights_are_named(name: str, broken: str) -> None:
    family = make(name)
    head = family.model.head.linear if name == "hmar" else family.model.dense_head.output
    with torch.no_grad():
        (head.bias if broken == "model" else family.tokenizer.decoder.conv_out.bias)[0] = float("nan")
    with pytest.raises(UserError, match=rf"images 3 to 4: the {broken}'s .*not finite"):
        family.edit(pictures(2), torch.ones(HEIGHT, WIDTH), [3, 4])
    job = Job(settings=family.settings, conditions=family.conditions, count=10, seed=5, batch_size=2)
    with pytest.raises(UserError, match=rf"images 3 to 4: the {broken}'s .*not finite"):
        Sampler(family.model, family.tokenizer, job, CPU)([3, 4])
