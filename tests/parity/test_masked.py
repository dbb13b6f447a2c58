"""MAR and Hi-MAR against what their published formats compute: units, samplers, losses and gradient norms."""

from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from torch import Tensor

from hmar_cli.builders import build_model
from hmar_cli.checkpoints.published_masked import masked_table, read_masked
from hmar_cli.models.diffusion import Diffusion
from hmar_cli.models.heads import MlpHead, TransformerHead
from hmar_cli.models.masked import MaskedTransformer, gather_tokens
from hmar_cli.sampling.masked import sample_masked
from hmar_cli.settings import Data, Kl, MaskedAr, MaskedArObjective, MaskedArSample, Recipe
from hmar_cli.training.masked import Count, Draws, MaskedArTraining


class Case:
    """A fixture with its model, read by the reader that `hmar checkpoint import` uses."""

    def __init__(self, path: Path) -> None:
        self.about, self.tensors = golden.load_fixture(path)
        self.state = golden.part(self.tensors, "state.")
        config = self.about["config"]
        hierarchical = self.about["family"] == "himar"
        side = 8 if hierarchical else 4  # the fixtures' dense grids
        model = MaskedAr(
            pivots="conditional" if hierarchical else "none",
            encoder_depth=config["encoder_depth"],
            decoder_depth=config["decoder_depth"],
            width=config["encoder_embed_dim"],
            heads=config["encoder_num_heads"],
            dropout=0.0,
            scale_vector="table" if hierarchical else "none",
            buffer_size=config["buffer_size"],
            pivot_head="mlp",
            pivot_head_depth=config["diffloss_d"],
            pivot_head_width=config["diffloss_w"],
            dense_head="transformer" if hierarchical else "mlp",
            dense_head_depth=config["gdm_d" if hierarchical else "diffloss_d"],
            dense_head_width=config["gdm_w" if hierarchical else "diffloss_w"],
            dense_head_heads=config.get("head", 4),
            num_classes=config["class_num"],
        )
        recipe = Recipe(
            data=Data(size=16 * side, pivot_size=64 if hierarchical else None),
            tokenizer=Kl(z_channels=config["vae_embed_dim"]),
            model=model,
            objective=MaskedArObjective(),
            sample=MaskedArSample(),
        )
        built = build_model(recipe)
        assert isinstance(built, MaskedTransformer)
        self.model = built.eval()
        self.model.load_state_dict(read_masked(self.state).state)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def close(self, actual: Tensor, name: str) -> None:
        """Compare by the fixture's own metric: largest difference over largest value."""
        expected = self.tensors[name].double()
        assert actual.shape == expected.shape, name
        bound = max(1e-5, 20 * self.about["tolerance"]["float32_noise_floor"].get(name, 0.0))
        error = (actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error.item() <= min(bound, 1e-4), f"{name}: {error.item():.2e}"


def visible(mask: Tensor) -> Tensor:
    """Places [B, V] where a mask [B, n] is 0; every row has as many."""
    return torch.stack([(row == 0).nonzero()[:, 0] for row in mask])


def rows(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h w, C]."""
    return latents.flatten(2).transpose(1, 2)


mar = pytest.mark.parametrize("path", golden.fixtures_of("mar"), ids=golden.fixture_id)
himar = pytest.mark.parametrize("path", golden.fixtures_of("himar"), ids=golden.fixture_id)


@mar
@torch.inference_mode()
def test_mar_units(path: Path) -> None:
    case = Case(path)
    model, places = case.model, visible(case["in.mask"])
    context = model.context(case["in.labels"])
    known = gather_tokens(case["in.tokens"], places)
    encoded = model.encode(context, model.token_proj(known), places, phase=0)
    case.close(encoded, "out.encoder")
    nothing = model.encode(model.drop(context), model.token_proj(known), places, phase=0)
    case.close(nothing, "out.encoder_uncond")
    case.close(model.dense_phase(context, None, known, places), "out.decoder_z")
    head_unit(case, model.dense_head, "in.head", "out.head")
    case.close(rows(case["in.train.latents"]), "out.patchify")


def head_unit(case: Case, head: Any, given: str, expected: str) -> None:
    """The MLP head on rows, each with its own timestep, and under guidance."""
    assert isinstance(head, MlpHead)
    x, t, z = case[f"{given}.x_t"], case[f"{given}.t"], case[f"{given}.c"]
    noise, value = head(x[:, None], t[:, None], z[:, None])
    assert value is not None
    case.close(torch.cat([noise, value], dim=-1)[:, 0], expected)
    half = len(x) // 2
    noise, value = head(torch.cat([x[:half], x[:half]])[:, None], t[:, None], z[:, None])
    assert value is not None
    with_class, without = noise.chunk(2)
    guided = without + case[f"{given}.cfg_scale"] * (with_class - without)
    case.close(torch.cat([torch.cat([guided, guided]), value], dim=-1)[:, 0], f"{expected}_cfg")


class Recorded:
    """The recorded random numbers of a run; a phase's tokens are numbered from 0 here."""

    def __init__(self, case: Case, run: str) -> None:
        about = case.about["runs"][run]
        self.case, self.run = case, about.get("draws_of", run)
        self.hierarchical = case.about["family"] == "himar"
        self.pivots = case.model.pivot_count
        orders = case[f"rand.{self.run}.orders"]
        self.orders = [orders[:, : self.pivots], orders[:, self.pivots :] - self.pivots]

    def order(self, phase: int, n: int) -> Tensor:
        assert self.orders[phase].shape[1] == n
        return self.orders[phase]

    def normal(self, phase: int, step: int, draws: range, places: Tensor, channels: int) -> Tensor:
        name = f"rand.{self.run}.step{step}"
        if self.hierarchical:
            name = f"rand.{self.run}.p1.step{step:02d}" if phase == 0 else f"rand.{self.run}.p2.step{step}"
        initial, later = self.case[f"{name}.init_noise"], self.case[f"{name}.p_noise"]
        if initial.ndim == 4:  # a whole grid
            initial, later = rows(initial), later.flatten(3).transpose(2, 3)
        batch, m = places.shape
        every = torch.cat([initial.reshape(1, batch, m, channels), later.reshape(-1, batch, m, channels)])
        return every[draws.start : draws.stop]


def sample(case: Case, run: str) -> tuple[Any, dict[str, Tensor]]:
    about, traced = case.about["runs"][run], {}
    hierarchical = case.about["family"] == "himar"
    settings = MaskedArSample(
        steps=about["num_iter"],
        pivot_steps=about.get("phase1_iterations", 1),
        cfg=about["cfg"],
        pivot_cfg=about.get("re_cfg", 1.0),
        cfg_schedule=about["cfg_schedule"],
        pivot_cfg_schedule=about["cfg_schedule"],
        temperature=about["temperature"],
    )
    timesteps = [about["timesteps1"], about["timesteps2"]] if hierarchical else [about["timesteps"]] * 2
    result = sample_masked(
        case.model,
        case["in.sample.labels"],
        settings,
        Recorded(case, run),
        trace=lambda name, tensor: traced.__setitem__(name, tensor.clone()),
        processes=(Diffusion(timesteps[0]), Diffusion(timesteps[1])),
    )
    return result, traced


def stacked(traced: dict[str, Tensor], name: str) -> Tensor:
    steps = sorted(int(key.rsplit(".", 1)[1]) for key in traced if key.startswith(name + "."))
    return torch.stack([traced[f"{name}.{step}"] for step in steps])


@mar
@pytest.mark.parametrize("run", ["cfg", "nocfg", "cfg_lowt", "cfg_const"])
def test_mar_sampling(path: Path, run: str) -> None:
    case = Case(path)
    result, traced = sample(case, run)
    case.close(stacked(traced, "tokens.1"), f"out.{run}.tokens")
    case.close(result.latents, f"out.{run}.latents")
    assert result.pivots is None
    if f"out.{run}.z" in case.tensors:
        case.close(stacked(traced, "z.1"), f"out.{run}.z")


@himar
@torch.inference_mode()
def test_himar_units(path: Path) -> None:
    case = Case(path)
    model, pivots = case.model, case.model.pivot_count
    context = model.context(case["in.labels"])
    stack = model.encoder.scale_vector
    assert stack is not None
    case.close(torch.stack([stack(0), stack(1)]), "out.p1.scale_vector_encoder")

    places = visible(case["in.p1.mask"][:, :pivots])
    known = gather_tokens(case["in.p1.cond"], places)
    encoded = model.encode(context, model.pivot_proj(known), places, phase=0)
    case.close(encoded, "out.p1.encoder")
    case.close(model.decode(encoded, places, phase=0), "out.p1.decoder_z")

    places = visible(case["in.p2.mask"][:, pivots:])
    guides = model.guides(case["in.p2.small_z"])
    z = model.dense_phase(context, guides, gather_tokens(case["in.p2.tokens"], places), places)
    expected = case["out.p2.decoder_z"][:, pivots:]
    assert ((z - expected).abs().max() / expected.abs().max()).item() <= 1e-5

    head_unit(case, model.pivot_head, "in.head1", "out.head1")
    head = model.dense_head
    assert isinstance(head, TransformerHead)
    x, t, c = rows(case["in.head2.x_t"]), case["in.head2.t"][:, None], rows(case["in.head2.z"])
    grid = lambda y: y.transpose(1, 2).unflatten(2, model.grid)  # noqa: E731
    case.close(grid(head(x, t, c)[0]), "out.head2")
    half = len(x) // 2
    with_class, without = head(torch.cat([x[:half], x[:half]]), t, c)[0].chunk(2)
    guided = without + case["in.head2.cfg_scale"] * (with_class - without)
    case.close(grid(torch.cat([guided, guided])), "out.head2_cfg")


@himar
@pytest.mark.parametrize("run", ["cfg", "nocfg", "cfg_lowt", "phase1cfg_lowt", "cfg_const_lowt"])
def test_himar_sampling(path: Path, run: str) -> None:
    case = Case(path)
    result, traced = sample(case, run)
    assert result.pivots is not None
    case.close(result.pivots, f"out.{run}.small_latents")
    case.close(result.latents, f"out.{run}.dense_latents")
    for ours, theirs in (("tokens.0", "small_tokens"), ("tokens.1", "dense_tokens")):
        if f"out.{run}.{theirs}" in case.tensors:
            case.close(stacked(traced, ours), f"out.{run}.{theirs}")
    if f"out.{run}.small_z" in case.tensors:
        recorded, seen = case[f"out.{run}.small_z"], torch.zeros_like(case[f"out.{run}.small_z"])
        predicted = case[f"out.{case.about['runs'][run].get('draws_of', run)}.small_pred"].bool()
        for step, chosen in enumerate(predicted):
            seen[chosen] = traced[f"z.0.{step}"][: len(seen)][chosen]
        assert ((seen - recorded).abs().max() / recorded.abs().max()).item() <= 1e-5
    if f"out.{run}.dense_z_last" in case.tensors:
        case.close(traced["z.1.2"], f"out.{run}.dense_z_last")


def masked_first(orders: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """An order whose first places are the masked ones."""
    count = int(mask[0].sum())
    places = torch.stack([torch.argsort(row.logical_not().int(), stable=True) for row in mask.bool()])
    assert all(
        set(a[:count].tolist()) == set(b[:count].tolist()) for a, b in zip(places, orders, strict=True)
    )
    return places, count


def per_masked(values: Tensor, repeats: int, places: Tensor) -> Tensor:
    """Recorded rows (repeat, image, token) at the masked places: [R B, M] or [R B, M, C]."""
    batch = len(places)
    values = values.reshape(repeats * batch, -1, *values.shape[1:])
    index = places.repeat(repeats, 1)
    return values.gather(1, index) if values.ndim == 2 else gather_tokens(values, index)


def gradient_norms(case: Case, loss: Tensor) -> Tensor:
    """Norms by the fixture's list of published names."""
    case.model.zero_grad()
    loss.backward()
    parameters = dict(case.model.named_parameters())
    phases = case.model.phases
    norms = []
    for name in case.about["grad_param_names"]:
        target = masked_table(phases).ours(name)
        assert target is not None
        gradient = parameters[target].grad
        assert gradient is not None, name
        norms.append(gradient.norm())
    return torch.stack(norms)


@mar
def test_mar_training(path: Path) -> None:
    case = Case(path)
    case.model.train()
    objective = MaskedArTraining(case.model, MaskedArObjective(repeats=2), 1.0)
    tokens = rows(case["in.train.latents"])
    order, masked = masked_first(case["rand.train.orders"], case["rand.train.mask"])
    hidden = order[:, :masked]
    draws = Draws(
        order=order,
        count=Count.exact(masked, order.shape[1]),
        dropped=torch.zeros(len(tokens), dtype=torch.bool),
        t=per_masked(case["rand.train.t"], 2, hidden),
        noise=per_masked(case["rand.train.noise"], 2, hidden),
    )
    context = case.model.context(case["in.train.labels"])
    known = gather_tokens(tokens, draws.visible_places)
    encoded = case.model.encode(context, case.model.token_proj(known), draws.visible_places, phase=0)
    case.close(encoded, "out.train.encoder")
    case.close(case.model.dense_phase(context, None, known, draws.visible_places), "out.train.z")
    loss = objective.dense_loss(tokens, context, None, draws)
    case.close(loss, "out.train.loss")
    case.close(gradient_norms(case, loss), "out.train.grad_norm")


def check_intermediates(
    case: Case,
    pivots: Tensor,
    dense: Tensor,
    context: Tensor,
    first: Draws,
    second: Draws,
    without: Tensor,
    variant: str,
) -> None:
    """Transformer outputs of both phases, and which pivots phase 2 sees."""
    model, places = case.model, first.visible_places
    known = gather_tokens(pivots, places)
    case.close(model.encode(context, model.pivot_proj(known), places, phase=0), "out.train.p1.encoder")
    z = model.pivot_phase(context, known, places)
    case.close(z, "out.train.p1.z")
    case.close(z, "out.train.small_z")
    visible = torch.zeros(pivots.shape[:2], dtype=torch.bool).scatter(1, places, True)
    assert torch.equal(visible, case["out.train.small_keep_learned"].bool())
    if variant == "mixed":
        assert without.any() and not without.all()
        guides = model.guides(z.detach(), visible | without[:, None])
        places = second.visible_places
        z = model.dense_phase(context, guides, gather_tokens(dense, places), places)
        case.close(z, "out.train.mixed.p2.z")


@himar
@pytest.mark.parametrize("variant", ["drop", "keep", "mixed"])
def test_himar_training(path: Path, variant: str) -> None:
    case = Case(path)
    case.model.train()
    pivots, dense = rows(case["in.train.cond_latents"]), rows(case["in.train.latents"])
    count, batch = case.model.pivot_count, len(dense)
    nothing = torch.zeros(batch, dtype=torch.bool)
    order, masked = masked_first(case["rand.train.orders"][:, :count], case["rand.train.mask1"][:, :count])
    hidden = order[:, :masked]
    first = Draws(
        order=order,
        count=Count.exact(masked, order.shape[1]),
        dropped=nothing,
        t=per_masked(case["rand.train.t1"], 2, hidden),
        noise=per_masked(case["rand.train.noise1"], 2, hidden),
    )
    order, masked = masked_first(
        case["rand.train.orders"][:, count:] - count, case["rand.train.mask2"][:, count:]
    )
    second = Draws(
        order=order,
        count=Count.exact(masked, order.shape[1]),
        dropped=nothing,
        t=case["rand.train.t2"][:, None],
        noise=rows(case["rand.train.noise2"]),
    )
    chance = 1 - 0.5 * min(1.0, int(case["in.train.epoch"]) / 100)
    u = case[f"in.train.{variant}.cond_drop_u"]
    objective = MaskedArTraining(case.model, MaskedArObjective(repeats=2), 1.0)
    context = case.model.context(case["in.train.labels"])
    check_intermediates(case, pivots, dense, context, first, second, u < chance, variant)
    loss, metrics = objective.two_phases(pivots, dense, context, first, second, u < chance)
    case.close(objective.settings.pivot_weight / (64 / 320) * metrics["pivot_loss"], "out.train.loss1")
    case.close(
        objective.settings.dense_weight / (256 / 320) * metrics["dense_loss"], f"out.train.{variant}.loss2"
    )
    case.close(loss, f"out.train.{variant}.total")
    case.close(gradient_norms(case, loss), f"out.train.{variant}.grad_norm")
