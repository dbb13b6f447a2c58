import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from torch import nn

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.checkpoints.published import transformer_table
from hmar_cli.errors import UserError
from hmar_cli.settings import Optim
from hmar_cli.training.ema import Ema
from hmar_cli.training.next_scale import MaskedTraining, NextScaleTraining
from hmar_cli.training.optimizer import Optimizer, parameter_groups, trainable_parameters

GOLDEN = Path(os.environ.get("HMAR_GOLDEN") or Path(__file__).parents[1] / "fixtures" / "golden")


def train(objective, optimizer, steps):
    for step in range(steps):
        loss, _ = objective(next(toys.batches(step, 0, 1, 8)), 0.0)
        loss.backward()
        optimizer.norms()
        optimizer.step(step)


def test_groups_sum_to_all_trainable_parameters():
    objective = toys.Toy()
    decayed, undecayed = parameter_groups(objective)
    assert sorted([*decayed, *undecayed]) == sorted(trainable_parameters(objective))
    assert set(decayed) == {"model.0.weight", "model.3.weight", "critic.weight"}
    total = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    assert total == sum(p.numel() for group in (decayed, undecayed) for p in group.values())


def test_parameter_outside_the_networks_is_refused():
    objective = toys.Toy()
    objective.stray = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"stray\.weight"):
        trainable_parameters(objective)


@pytest.mark.parametrize("entry", json.loads((GOLDEN / "loss-weights.json").read_text())["param_groups"])
def test_groups_match_the_published_ones(toy, entry):
    groups = json.loads((GOLDEN / "loss-weights.json").read_text())["param_groups"][entry]
    masked = entry.startswith("masked")
    recipe = replace(toy, model=replace(toy.model, depth=4, shared_adaln="shared_aln true" in entry))
    model, quantizer = build_model(recipe), build_tokenizer(recipe.tokenizer).quantizer
    if masked:
        model.attach_masked_branch(2)
        objective = MaskedTraining(model, quantizer)
    else:
        objective = NextScaleTraining(model, quantizer)
    ours = [
        {".".join("{i}" if part.isdigit() else part for part in name.split(".")) for name in group}
        for group in parameter_groups(objective)
    ]
    prefix = "model.masked." if masked else "model."
    for found, kind in zip(ours, ("decay", "no_decay"), strict=True):
        expected = set()
        for key in groups[kind]:
            name = transformer_table("masked").ours(key.replace("{i}", "7"))
            assert name is not None, key
            name = name.removeprefix("masked.").replace(".7.", ".{i}.")
            expected.add(prefix + name)
        assert found == expected


def test_weight_decay_is_decoupled_and_only_on_its_group():
    objective = toys.Toy()
    optimizer = Optimizer(objective, Optim(base_lr=1e-2, weight_decay=0.5, warmup=0.0), 256, 10)
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0)
    for name, parameter in optimizer.parameters.items():
        factor = 1 - 1e-2 * 0.5 if name in optimizer.groups["decayed"] else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_gradients_are_clipped_network_by_network():
    objective = toys.Toy()
    optimizer = Optimizer(objective, Optim(clip=2.0), 256, 10)
    for name, parameter in optimizer.parameters.items():
        parameter.grad = torch.full_like(parameter, 100.0 if name.startswith("model") else 0.01)
    norms = optimizer.norms()
    model = [p.grad for n, p in optimizer.parameters.items() if n.startswith("model")]
    size = sum(p.numel() for p in model)
    assert norms["model"].item() == pytest.approx(100 * math.sqrt(size), rel=1e-5)
    assert torch.cat([g.flatten() for g in model]).norm().item() == pytest.approx(2.0, rel=1e-4)
    assert objective.critic.weight.grad.flatten().tolist() == pytest.approx([0.01, 0.01])
    unclipped = Optimizer(objective, Optim(clip=0.0), 256, 10)
    objective.critic.weight.grad.fill_(1000.0)
    unclipped.norms()
    assert objective.critic.weight.grad.max() == 1000


def test_moments_travel_by_name():
    objective = toys.Toy()
    optimizer = Optimizer(objective, Optim(), 256, 10)
    train(objective, optimizer, 3)
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert state["model.0.weight.step"] == 3
    other = Optimizer(toys.Toy(), Optim(), 256, 10)
    other.load(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(UserError, match=r"unknown entries, such as model\.9"):
        other.load({**state, "model.9.weight.step": torch.zeros(())})
    with pytest.raises(UserError, match=r"model\.0\.weight"):
        other.load({**state, "model.0.weight.exp_avg": torch.zeros(1)})


def test_ema_warms_up_and_averages_buffers():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).requires_grad_(False)
    model[0].requires_grad_(True)
    ema = Ema(model, 0.5)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = start["0.weight"].clone()
    for update, decay in enumerate([0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5]):
        model[0].weight.data.add_(1.0)
        model[1].running_mean.add_(1.0)
        model[1].num_batches_tracked.add_(1)
        expected = decay * expected + (1 - decay) * model[0].weight
        ema.update()
        assert ema.updates == update + 1
        torch.testing.assert_close(ema.state_dict()["0.weight"], expected.detach())
    state = ema.state_dict()
    assert 0 < state["1.running_mean"] < 10
    assert state["1.num_batches_tracked"] == 10  # not a number to average
    assert state["1.weight"].data_ptr() == model[1].weight.data_ptr()  # frozen: no second copy
    live, averaged = model[0].weight.detach().clone(), state["0.weight"].clone()
    with ema.applied():
        assert torch.equal(model[0].weight, averaged)
    assert torch.equal(model[0].weight, live)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_ema_decay_must_average(decay):
    with pytest.raises(ValueError, match="decay between 0 and 1"):
        Ema(nn.Linear(1, 1), decay)
