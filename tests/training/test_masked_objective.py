"""The objective of MAR and Hi-MAR: which parameters learn, what is dropped, variants of Table 5."""

from dataclasses import replace

import pytest
import torch

from hmar_cli.builders import build_model, build_objective, build_tokenizer
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.settings import (
    Data,
    JointText,
    Kl,
    MaskedAr,
    MaskedArObjective,
    MaskedArSample,
    Optim,
    Recipe,
    Train,
)
from hmar_cli.training.masked import Count, Draws, MaskedArTraining, masked_count, room_for
from hmar_cli.training.optimizer import parameter_groups
from hmar_cli.training.trainer import Trainer

ROWS = {  # of Hi-MAR's Table 5: pivots, head 1, head 2, scale vector
    "mar": ("none", "mlp", "mlp", "none"),
    "visual": ("visual", "mlp", "mlp", "none"),
    "conditional": ("conditional", "mlp", "mlp", "none"),
    "transformer": ("conditional", "mlp", "transformer", "none"),
    "both transformers": ("conditional", "transformer", "transformer", "none"),
    "scale vector": ("conditional", "mlp", "transformer", "table"),
    "paper's scale vector": ("conditional", "mlp", "transformer", "sinusoidal"),
}


def build(row: str, text: JointText | None = None, **objective: object) -> MaskedArTraining:
    pivots, first, second, scale_vector = ROWS[row]
    recipe = Recipe(
        data=Data(size=16, pivot_size=8),
        tokenizer=Kl(channels=8, multipliers=(1, 2), res_blocks=1, z_channels=4, latent_scale=0.5),
        model=MaskedAr(
            pivots=pivots,  # type: ignore[arg-type]
            encoder_depth=1,
            decoder_depth=1,
            width=16,
            heads=2,
            dropout=0.0,
            scale_vector=scale_vector,  # type: ignore[arg-type]
            buffer_size=2,
            pivot_head=first,  # type: ignore[arg-type]
            pivot_head_depth=1,
            pivot_head_width=16,
            pivot_head_heads=2,
            dense_head=second,  # type: ignore[arg-type]
            dense_head_depth=1,
            dense_head_width=16,
            dense_head_heads=2,
            num_classes=3,
        ),
        text=text,
        objective=MaskedArObjective(**objective),  # type: ignore[arg-type]
        sample=MaskedArSample(),
    )
    torch.manual_seed(0)
    model = build_model(recipe)
    assert isinstance(model, MaskedTransformer)
    with torch.no_grad():
        for parameter in model.parameters():  # heads and modulations begin with zeros
            if not parameter.any():
                parameter.normal_(std=0.1)
    built = build_objective(recipe, build_tokenizer(recipe.tokenizer), model)
    assert isinstance(built, MaskedArTraining)
    return built


def batch(count: int = 8) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "moments": torch.randn(count, 8, 8, 8),
        "pivot_moments": torch.randn(count, 8, 4, 4),
        "label": torch.arange(count) % 3,
    }


@pytest.mark.parametrize("row", ROWS)
def test_every_parameter_learns(row: str) -> None:
    objective = build(row, pivot_keep=0.5, pivot_keep_warmup=0.0, label_drop=0.3)
    loss, metrics = objective(batch(32), 0.5)
    loss.backward()
    without = [name for name, p in objective.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    expected = {"loss"} if row == "mar" else {"loss", "pivot_loss", "dense_loss"}
    assert set(metrics) == expected and all(not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("row", ROWS)
def test_groups_hold_every_parameter_once(row: str) -> None:
    objective = build(row)
    groups = parameter_groups(objective)
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(f"model.{name}" for name, _ in objective.model.named_parameters())
    undecayed = set(groups[1])
    assert all(name in undecayed for name in names if "_head." in name)
    assert "model.null_embed" not in undecayed and "model.mask_token" not in undecayed


def test_conditional_tokens_bring_no_gradient_to_phase_one() -> None:
    objective = build("scale vector", pivot_keep=1.0, pivot_keep_warmup=0.0, pivot_weight=0.0)
    objective(batch(), 0.5)[0].backward()
    head = objective.model.pivot_head
    assert head is not None
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())
    phases = objective.model.encoder.pos_embed.grad
    assert phases is not None and not phases[0].any() and phases[1].any()


def test_text_encoder_learns_along() -> None:
    text = JointText(width=16, depth=1, heads=2, context_length=6)
    objective = build("scale vector", text, pivot_keep=0.5, pivot_keep_warmup=0.0)
    given = batch()
    del given["label"]
    given["text"] = torch.randint(1, 400, (8, 6))
    objective(given, 0.5)[0].backward()
    assert objective.model.text is not None
    assert all(p.grad is not None and p.grad.any() for p in objective.model.text.parameters())


def test_the_plain_loss_leaves_the_variance_alone() -> None:
    objective = build("mar", variational=False)
    objective(batch(), 0.5)[0].backward()
    gradient = objective.model.dense_head.output.weight.grad
    assert gradient is not None
    noise, variance = gradient.chunk(2)
    assert noise.any() and not variance.any()


def test_masked_counts_are_those_of_the_host() -> None:
    """Counts are drawn on the CPU, so that no step waits for the device; at least one token is masked."""
    assert masked_count(64, "cosine", 0.0) == 1
    assert masked_count(64, "truncated-normal", 0.0) == 45
    assert masked_count(64, "beta", 0.999999) == 64
    objective = build("scale vector")
    torch.manual_seed(3)
    first = objective.draw_counts()
    torch.manual_seed(3)
    assert objective.draw_counts() == first and [total for _, total in first] == [16, 64]


def test_processes_draw_one_count_and_their_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """So none waits for the one that sees the most tokens. Resuming draws the same again."""
    drawn: list[Draws] = []
    plain = MaskedArTraining.draw
    monkeypatch.setattr(
        MaskedArTraining, "draw", lambda self, *given: drawn.append(plain(self, *given)) or drawn[-1]
    )

    def follow(rank: int, first: int = 0) -> list[Draws]:
        recipe = Recipe(optim=Optim(base_lr=1e-3), train=Train(batch_size=8, accumulate=2, steps=6))
        trained = Trainer(build("scale vector"), recipe, 64, "cpu")
        trained.rank, trained.step = rank, first
        stream = (batch(4) for _ in range(99))
        drawn.clear()
        while trained.step < 6:
            trained.train_step(stream)
        return list(drawn)

    one, other = follow(0), follow(1)
    assert [draws.count for draws in one] == [draws.count for draws in other]
    assert len({draws.count.masked for draws in one[::2]}) > 6  # dense ones of 12 micro-batches
    assert not any(torch.equal(mine.order, theirs.order) for mine, theirs in zip(one, other, strict=True))
    again = follow(1, first=4)
    assert [draws.count for draws in again] == [draws.count for draws in one[-8:]]
    assert all(torch.equal(new.noise, old.noise) for new, old in zip(again, other[-8:], strict=True))


def with_room(draws: Draws, tokens: int) -> Draws:
    """The same draws where the count is known to the device alone."""
    masked = draws.count.masked
    assert isinstance(masked, int)
    count = Count.roomy(torch.tensor(masked), room_for(tokens - masked, tokens), tokens)
    assert count.hidden >= masked and count.seen >= tokens - masked
    t, noise = draws.t, draws.noise
    if noise.shape[1] == masked:  # an MLP head: whatever fills the room must not matter
        more = count.hidden - masked
        noise = torch.cat([noise, torch.full((len(noise), more, noise.shape[2]), 7.0)], dim=1)
        t = torch.cat([t, torch.full((len(t), more), 999)], dim=1)
    return replace(draws, count=count, t=t, noise=noise)


@pytest.mark.parametrize("masked", [(1, 1), (3, 40), (16, 64), (12, 57)])
@pytest.mark.parametrize("row", ["mar", "visual", "transformer", "both transformers"])
def test_room_to_spare_changes_nothing(row: str, masked: tuple[int, int]) -> None:
    """A step whose shapes are fixed beforehand has the loss and the gradients of one that has no room."""
    objective, given = build(row, repeats=2), batch(4)
    found = []
    for roomy in (False, True):
        torch.manual_seed(2)
        objective.zero_grad()
        dense = objective.latents(given["moments"])
        context = objective.model.context(given["label"])
        second = objective.draw(dense, objective.model.dense_head, Count.exact(masked[1], 64))
        second = with_room(second, 64) if roomy else second
        if objective.model.pivot_head is None:
            loss = objective.dense_loss(dense, context, None, second)
        else:
            pivots = objective.latents(given["pivot_moments"])
            first = objective.draw(pivots, objective.model.pivot_head, Count.exact(masked[0], 16))
            first = with_room(first, 16) if roomy else first
            hidden = torch.tensor([True, False, False, True])
            loss, _ = objective.two_phases(pivots, dense, context, first, second, hidden)
        loss.backward()
        parameters = objective.model.named_parameters()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in parameters if p.grad is not None}))
    (loss, gradients), (with_spare, spare_gradients) = found
    torch.testing.assert_close(with_spare, loss, rtol=1e-5, atol=1e-6)
    assert set(gradients) == set(spare_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(spare_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_shapes_of_a_step_are_few_and_hold_every_count() -> None:
    objective = build("scale vector", pivot_keep=0.4, pivot_keep_warmup=0.5)
    torch.manual_seed(0)
    drawn = [objective.draw_shapes(0.25) for _ in range(300)]
    assert 1 < len({shapes for shapes, _ in drawn}) <= 2 * 8
    for shapes, numbers in drawn:
        assert isinstance(shapes, tuple)
        assert numbers["pivot_drop"] == pytest.approx(0.8)
        for room, total, masked in zip(
            shapes, (16, 64), (numbers["masked_0"], numbers["masked_1"]), strict=True
        ):
            assert 1 <= masked <= total and total - masked <= room <= total
    shapes, numbers = drawn[0]
    extended = batch() | {name: torch.tensor(number) for name, number in numbers.items()}
    loss, metrics = objective.forward_shapes(extended, shapes)
    assert loss.isfinite() and set(metrics) == {"loss", "pivot_loss", "dense_loss"}


def test_latents_are_scaled_samples() -> None:
    objective = build("mar")
    moments = torch.cat([torch.full((2, 4, 8, 8), 3.0), torch.full((2, 4, 8, 8), -60.0)], dim=1)
    latents = objective.latents(moments)
    assert latents.shape == (2, 64, 4)
    torch.testing.assert_close(latents, torch.full((2, 64, 4), 1.5), rtol=1e-5, atol=1e-5)
