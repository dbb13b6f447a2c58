"""Training a classifier: loss, accuracy, shifts, learning at all."""

import pytest
import torch
from torch.nn import functional as F

from hmar_cli.models.classifier import ImageClassifier
from hmar_cli.training.classifier import ClassifierTraining, shifted


def objective(**settings):
    torch.manual_seed(0)
    network = ImageClassifier(channels=8, multipliers=(1, 2), res_blocks=1, num_classes=3)
    return ClassifierTraining(network, **settings)


def batch(count=12):
    """Images whose class is their brightest colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 60
    return {"image": images, "label": labels}


def test_the_loss_is_a_smoothed_cross_entropy_of_unshifted_images_in_evaluation():
    training, data = objective(label_smoothing=0.2).eval(), batch()
    loss, metrics = training(data, 0.0)
    logits = training.model(data["image"].float() / 127.5 - 1)
    chosen, spread = logits.log_softmax(1)[range(12), data["label"]], logits.log_softmax(1).mean(1)
    torch.testing.assert_close(loss, -(0.8 * chosen + 0.2 * spread).mean())
    torch.testing.assert_close(metrics["accuracy"], (logits.argmax(1) == data["label"]).float().mean())
    assert set(metrics) == {"loss", "accuracy"} and not any(m.requires_grad for m in metrics.values())


def test_images_move_by_whole_pixels_and_are_mirrored_at_the_border():
    torch.manual_seed(0)
    images = torch.rand(200, 3, 8, 12)
    moved = shifted(images, 0.25)
    around = F.pad(images, (3, 3, 2, 2), mode="reflect")
    found = set()
    for i in range(len(images)):
        places = [
            (r, c)
            for r in range(5)
            for c in range(7)
            if torch.equal(moved[i], around[i, :, r : r + 8, c : c + 12])
        ]
        assert len(places) == 1
        found.update(places)
    assert found == {(r, c) for r in range(5) for c in range(7)}
    assert torch.equal(shifted(images, 0.0), images)


def test_only_training_shifts():
    data = batch()
    for mode, same in ((True, False), (False, True)):
        training = objective(shift=0.5).train(mode)
        torch.nn.init.normal_(training.model.blocks[0].conv2.weight)
        losses = [training(data, 0.0)[0].item() for _ in range(2)]
        assert (losses[0] == losses[1]) is same


@pytest.mark.parametrize("bf16", [False, True])
def test_it_learns(bf16):
    training, data = objective(), batch()
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, metrics = training(data, 0.0)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in training.parameters())
        optimizer.step()
    assert loss.dtype == torch.float32 and metrics["accuracy"] == 1
