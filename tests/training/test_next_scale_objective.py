"""Next-scale training and masked finetuning: the loss by its formula, masks, what is trained, label dropping."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers.msvq import ScaleQuantizer
from hmar_cli.training.next_scale import MaskedTraining, NextScaleTraining
from hmar_cli.training.weighting import scale_weights

SCALES = Scales.of([1, 2, 4])
CODES = 16


def parts(masked: bool = False, leak_free: bool = False) -> tuple[NextScaleTransformer, ScaleQuantizer]:
    torch.manual_seed(0)
    quantizer = ScaleQuantizer(scales=SCALES, z_channels=4, vocab_size=CODES, phi_count=2)
    model = NextScaleTransformer(
        scales=SCALES, z_channels=4, vocab_size=CODES, num_classes=3, depth=2, width=16, heads=2,
        pattern="diagonal", drop_path_rate=0.0, gamma_init=1.0, masked_layers=int(masked), leak_free=leak_free,
    )  # fmt: skip
    for parameter in model.parameters():  # logits that differ from token to token
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model, quantizer


def batch(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(CODES, (count, SCALES.total), generator=generator),
        "label": torch.arange(count) % 3,
    }


@pytest.mark.parametrize("weighting", ["none", "equal", "lognormal"])
def test_next_scale_loss_weighs_scales_and_averages_images(weighting):
    model, quantizer = parts()
    objective, given = NextScaleTraining(model, quantizer, weighting=weighting, label_drop=0.0), batch()
    loss, metrics = objective(given, 0.0)
    with torch.no_grad():
        logits = model(given["label"], quantizer.teacher_inputs(given["tokens"]))
        logs = logits.log_softmax(dim=-1).gather(-1, given["tokens"][..., None])[..., 0]
        means = [-logs[:, SCALES.slice(k)].mean() for k in range(3)]
    weights = scale_weights(SCALES, weighting)
    assert loss.item() == pytest.approx(sum(w * m.item() for w, m in zip(weights, means, strict=True)))
    assert metrics["cross_entropy_per_scale"].tolist() == pytest.approx([m.item() for m in means])
    right = (logits.argmax(dim=-1) == given["tokens"]).float()
    assert metrics["accuracy"].item() == pytest.approx(right.mean().item())
    assert metrics["accuracy_per_scale"][2].item() == pytest.approx(right[:, SCALES.slice(2)].mean().item())


def test_a_mask_takes_one_share_of_every_scale_but_the_first():
    objective = MaskedTraining(*parts(masked=True))
    counts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mask = objective.draw_mask(torch.device("cpu"))
        torch.manual_seed(seed)
        ratio = torch.rand(()).item()
        found = [mask[:4].sum().item(), mask[4:].sum().item()]
        assert found == [max(1, math.ceil(ratio * n)) for n in (4, 16)]
        counts.add(found[1])
    assert len(counts) > 5


@pytest.mark.parametrize("leak_free", [False, True])
def test_masked_loss_is_the_mean_over_masked_tokens(leak_free, monkeypatch):
    model, quantizer = parts(masked=True, leak_free=leak_free)
    objective, given = MaskedTraining(model, quantizer, label_drop=0.0), batch()
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[1, 6, 19]] = True
    monkeypatch.setattr(objective, "draw_mask", lambda device: mask)
    loss, metrics = objective(given, 0.0)
    places = mask.nonzero()[:, 0] + 1  # in the whole sequence
    tokens = given["tokens"]
    keep = torch.cat([torch.tensor([True]), ~mask]) if leak_free else None
    own = quantizer.own_inputs(tokens, keep)
    with torch.no_grad():
        logits = model(given["label"], quantizer.teacher_inputs(tokens), own, mask)[:, places]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, places].flatten()).item()
    assert loss.item() == pytest.approx(expected)
    assert metrics["cross_entropy_per_scale"].isnan().tolist() == [True, False, False]
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"masked.{name}" for name, _ in objective.branch.named_parameters()}
    assert quantizer.codebook.weight.grad is None


def test_labels_are_dropped_with_their_probability():
    model, quantizer = parts()
    labels = torch.arange(3).repeat(1000)
    kept = NextScaleTraining(model, quantizer, label_drop=0.0).drop_labels(labels)
    assert torch.equal(kept, labels)
    dropped = NextScaleTraining(model, quantizer, label_drop=0.3).drop_labels(labels)
    assert 0.25 < (dropped == model.num_classes).float().mean() < 0.35
    assert torch.equal(dropped[dropped < 3], labels[dropped < 3])


def test_masked_training_needs_a_branch():
    with pytest.raises(ValueError, match="masked branch"):
        MaskedTraining(*parts())
