"""Training the tokenizer: terms and their gradients, code usage and revival, resuming, learning at all."""

import copy
import json

import torch
from toy_runs import run_two

from hmar_cli.evaluation.reconstruction import evaluate_tokenizer
from hmar_cli.models.scales import Scales
from hmar_cli.settings import MsvqObjective
from hmar_cli.tokenizers.msvq import MultiScaleVQ, Quantized
from hmar_cli.training.tokenizer import CodeUsage, MsvqTraining, to_signed

SCALES = Scales.of([1, 2, 4])


def tokenizer(vocab_size=16):
    torch.manual_seed(0)
    return MultiScaleVQ(
        channels=8, multipliers=(1, 2), res_blocks=1, z_channels=4, vocab_size=vocab_size, scales=SCALES
    )


def batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)}


def quantized(tokens, vectors=None, distances=None):
    tokens = torch.as_tensor(tokens)
    vectors = torch.zeros(*tokens.shape, 4) if vectors is None else vectors
    distances = torch.ones(tokens.shape) if distances is None else distances
    return Quantized(torch.empty(0), torch.empty(0), tokens, vectors, distances)


def train(objective, steps, start=0):
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    losses = []
    for step in range(start, start + steps):
        torch.manual_seed(step)
        loss, _ = objective(batch(seed=step), step / 100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.on_step(step + 1)
        losses.append(loss.item())
    return losses


def test_metrics_have_the_same_names_and_shapes_in_every_step():
    objective = MsvqTraining(
        tokenizer(), MsvqObjective(adversarial_weight=0.1, adversarial_start=0.5, discriminator_channels=8)
    )
    shapes = [{k: v.shape for k, v in objective(batch(), p)[1].items()} for p in (0.0, 0.9)]
    assert shapes[0] == shapes[1]
    assert shapes[0]["usage_per_scale"] == (3,) and shapes[0]["usage"] == () and shapes[0]["psnr"] == ()
    assert set(shapes[0]) >= {
        "loss",
        "reconstruction",
        "perceptual",
        "quantization",
        "adversarial",
        "discriminator",
    }
    assert all(not v.requires_grad for v in objective(batch(), 0.9)[1].values())


def test_uint8_and_float_images_are_the_same():
    objective = MsvqTraining(tokenizer(), MsvqObjective())
    pixels = batch()["image"]
    assert to_signed(pixels).min() >= -1 and to_signed(pixels).max() <= 1
    assert torch.equal(objective({"image": pixels}, 0.0)[0], objective({"image": to_signed(pixels)}, 0.0)[0])


def test_discriminator_rests_until_its_start():
    plain = MsvqTraining(tokenizer(), MsvqObjective())
    adversarial = MsvqTraining(tokenizer(), MsvqObjective(adversarial_weight=0.1, discriminator_channels=8))
    assert set(adversarial.networks) == {"model", "discriminator"} and set(plain.networks) == {"model"}
    assert torch.equal(plain(batch(), 0.49)[0], adversarial(batch(), 0.49)[0])
    assert plain(batch(), 0.5)[0] != adversarial(batch(), 0.5)[0]


def test_one_backward_gives_each_network_its_own_loss():
    """Gradients equal those of the two separate steps that GAN training usually takes."""
    settings = {"perceptual": "none", "l2": 0.0, "commitment": 0.0, "adversarial_start": 0.0}
    objective = MsvqTraining(
        tokenizer(), MsvqObjective(adversarial_weight=0.3, discriminator_channels=8, **settings)
    )
    loss, _ = objective(batch(), 0.0)
    loss.backward()
    together = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()

    images = to_signed(batch()["image"])
    inner = objective.model.quantizer(objective.model.features(images))
    pictures = objective.model.picture(inner.f_hat)
    generator = inner.loss - 0.3 * objective.discriminator(pictures).mean()
    own = dict(objective.model.named_parameters(prefix="model"))
    grads = torch.autograd.grad(generator, own.values(), allow_unused=True)
    for name, grad in zip(own, grads, strict=True):
        if grad is not None:
            torch.testing.assert_close(together[name], grad)
    scores = objective.discriminator(images), objective.discriminator(pictures.detach())
    hinge = 0.5 * (torch.relu(1 - scores[0]).mean() + torch.relu(1 + scores[1]).mean())
    theirs = dict(objective.discriminator.named_parameters(prefix="discriminator"))
    for name, grad in zip(theirs, torch.autograd.grad(hinge, theirs.values()), strict=True):
        torch.testing.assert_close(together[name], grad)


def test_decay_spares_codebook_norms_and_biases():
    objective = MsvqTraining(tokenizer(), MsvqObjective())
    decayed = {n for n, p in objective.model.named_parameters() if not objective.undecayed(n, p)}
    assert "quantizer.codebook.weight" not in decayed and "encoder.conv_in.weight" in decayed
    assert not any("norm" in name or name.endswith("bias") for name in decayed)


def test_usage_is_counted_per_scale_within_the_window():
    usage = CodeUsage(SCALES, 4, window=2, revive_after=0)
    tokens = torch.zeros(1, 21, dtype=torch.long)
    tokens[0, 1:5] = torch.tensor([0, 1, 1, 0])
    tokens[0, 5:] = torch.arange(16) % 4
    assert usage.shares()[1].tolist() == [0, 0, 0]
    usage.count(quantized(tokens))
    usage.step()
    assert usage.shares()[1].tolist() == [0.25, 0.5, 1.0]
    for share in (1.0, 0.25):
        usage.count(quantized(torch.zeros(1, 21, dtype=torch.long)))
        usage.step()
        assert usage.shares()[1].tolist() == [0.25, 0.5 if share == 1 else 0.25, share]


def test_idle_codes_become_badly_represented_vectors():
    usage = CodeUsage(SCALES, 4, window=3, revive_after=3)
    codebook = torch.arange(16.0).reshape(4, 4)
    before = codebook.clone()
    distances = torch.zeros(1, 21)
    distances[0, [3, 7]] = torch.tensor([5.0, 6.0])  # only these two are not represented already
    vectors = torch.randn(1, 21, 4)
    tokens = torch.arange(21)[None] % 2  # codes 2 and 3 are never used
    for step in range(1, 4):
        usage.count(quantized(tokens, vectors, distances))
        usage.step()
        usage.revive(codebook, step)
        assert torch.equal(codebook, before) == (step < 3)
    assert torch.equal(codebook[:2], before[:2])
    assert {tuple(row) for row in codebook[2:].tolist()} == {tuple(vectors[0, i].tolist()) for i in (3, 7)}
    assert usage.idle.tolist() == [0, 0, 0, 0]  # a revived code has its time again


def test_more_idle_codes_than_vectors():
    usage = CodeUsage(Scales.of([1]), 8, window=1, revive_after=1)
    codebook = torch.zeros(8, 4)
    vectors = torch.randn(2, 1, 4)
    usage.count(quantized(torch.zeros(2, 1, dtype=torch.long), vectors, torch.ones(2, 1)))
    usage.step()
    usage.revive(codebook, 1)
    assert torch.equal(codebook[0], torch.zeros(4))
    assert {tuple(row) for row in codebook[1:].tolist()} == {tuple(row) for row in vectors[:, 0].tolist()}


def test_evaluation_mode_counts_nothing():
    objective = MsvqTraining(tokenizer(), MsvqObjective()).eval()
    objective(batch(), 0.0)
    assert objective.usage.hits.sum() == 0


def test_continuing_from_resume_state_is_exact():
    settings = {"perceptual": "none", "revive_after": 3}
    whole = MsvqTraining(tokenizer(64), MsvqObjective(**settings))
    expected = train(whole, 8)
    first = MsvqTraining(tokenizer(64), MsvqObjective(**settings))
    losses = train(first, 5)
    second = MsvqTraining(tokenizer(64), MsvqObjective(**settings))
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load_resume_state({k: v.clone() for k, v in first.resume_state().items()})
    losses += train(second, 3, start=5)
    assert losses == expected
    assert second.model.fingerprint() == whole.model.fingerprint()


def test_compilation_reaches_what_training_calls(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **kwargs: lambda *args: calls.append(1) or call(*args))
    objective, calls = MsvqTraining(tokenizer(), MsvqObjective()), []
    expected = objective(batch(), 0.0)[0]
    objective.compile_networks()
    assert calls == []
    assert torch.equal(objective(batch(), 0.0)[0], expected)
    assert calls == [1, 1]  # encoder and decoder


WORKER = """
import json
import torch
from hmar_cli.models.scales import Scales
from hmar_cli.tokenizers.msvq import Quantized
from hmar_cli.training.tokenizer import CodeUsage

usage, codebook = CodeUsage(Scales.of([1, 2, 4]), 4, window=2, revive_after=2), torch.zeros(4, 4)
for step in (1, 2):
    tokens = torch.full((1, 21), rank)  # process 0 uses code 0, process 1 code 1
    vectors = torch.randn(1, 21, 4, generator=torch.Generator().manual_seed(10 * rank + step))
    usage.count(Quantized(torch.empty(0), torch.empty(0), tokens, vectors, torch.ones(1, 21)))
    usage.step()
    usage.revive(codebook, step)
print(json.dumps([codebook.tolist(), usage.shares()[1].tolist()]))
"""


def test_two_processes_agree_on_usage_and_revival():
    (codebook, share), other = (json.loads(lines[-1]) for lines in run_two(WORKER))
    assert [codebook, share] == other
    assert share == [0.5, 0.5, 0.5]
    assert codebook[0] == codebook[1] == [0, 0, 0, 0]
    assert 0 not in codebook[2] and 0 not in codebook[3] and codebook[2] != codebook[3]


def test_training_improves_and_evaluation_reports_it():
    objective = MsvqTraining(tokenizer(), MsvqObjective(perceptual="none", revive_after=10))
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(0, 256, (16, 3, 1, 1), dtype=torch.uint8, generator=generator).expand(
        -1, -1, 8, 8
    )
    before = evaluate_tokenizer(objective.model.eval(), colours.split(8)).summary()
    objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    for step in range(40):
        loss, _ = objective({"image": colours}, step / 40)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.on_step(step + 1)
    after = evaluate_tokenizer(objective.model.eval(), colours.split(8)).summary()
    assert after["psnr"] > before["psnr"] + 3
