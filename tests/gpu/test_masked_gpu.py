"""MAR and Hi-MAR on a GPU: no waiting, compiled heads, bf16, training steps that agree with the CPU's."""

from dataclasses import replace

import pytest
import torch

from hmar_cli.builders import build_model, build_objective, build_tokenizer
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.sampling.images import autocast
from hmar_cli.sampling.masked import compile_heads, sample_masked
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import Data, Kl, MaskedAr, MaskedArObjective, MaskedArSample, Optim, Recipe, Train
from hmar_cli.training.trainer import Trainer, seed_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def recipe(pivots: str, compile: bool = False) -> Recipe:
    return Recipe(
        data=Data(size=16, pivot_size=8),
        tokenizer=Kl(channels=16, multipliers=(1, 2), res_blocks=1, z_channels=8, latent_scale=1.0),
        model=MaskedAr(
            pivots=pivots,  # type: ignore[arg-type]
            encoder_depth=2,
            decoder_depth=2,
            width=64,
            heads=2,
            buffer_size=4,
            pivot_head_depth=2,
            pivot_head_width=64,
            dense_head="mlp" if pivots == "none" else "transformer",
            dense_head_depth=2,
            dense_head_width=64,
            dense_head_heads=2,
            num_classes=4,
        ),
        objective=MaskedArObjective(pivot_keep=1.0, pivot_keep_warmup=0.0),
        optim=Optim(base_lr=1e-2, warmup=0.0),
        train=Train(batch_size=16, steps=400, ema=0.9, compile=compile),
        sample=MaskedArSample(),
    )


def batches(start: int, rank: int, world: int, size: int):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(start)
    while True:
        yield {
            "moments": torch.randn(size, 16, 8, 8, generator=generator),
            "pivot_moments": torch.randn(size, 16, 4, 4, generator=generator),
            "label": torch.randint(4, (size,), generator=generator),
            "index": torch.arange(size),
        }


def trainer(pivots: str, compile: bool = False, graphs: bool = False) -> Trainer:
    torch.manual_seed(0)
    chosen = recipe(pivots, compile)
    chosen = replace(chosen, train=replace(chosen.train, graphs=graphs))
    tokenizer = build_tokenizer(chosen.tokenizer)
    return Trainer(build_objective(chosen, tokenizer, build_model(chosen)), chosen, 160)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("pivots", ["none", "visual", "conditional"])
def test_steps_do_not_wait_for_the_device(pivots: str, graphs: bool) -> None:
    trained = trainer(pivots, graphs=graphs)
    stream = trained.stream(batches)
    for _ in range(60 if graphs else 2):  # the first steps load kernels, or meet a shape for the first time
        trained.train_step(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trained.train_step(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def built(pivots: str) -> MaskedTransformer:
    torch.manual_seed(1)
    model = build_model(recipe(pivots))
    assert isinstance(model, MaskedTransformer)
    for parameter in model.parameters():  # heads begin with zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


SETTINGS = MaskedArSample(steps=4, pivot_steps=4, head_sampler="dpm++", head_steps=8, pivot_head_steps=8)


@pytest.mark.parametrize("pivots", ["none", "conditional"])
def test_samples_are_those_of_the_cpu(pivots: str) -> None:
    model, labels, images = built(pivots), torch.arange(4), torch.arange(4)
    on_cpu = sample_masked(model, labels, SETTINGS, PhiloxNoise(3, images)).latents
    model.cuda()
    on_gpu = sample_masked(model, labels.cuda(), SETTINGS, PhiloxNoise(3, images.cuda())).latents
    assert ((on_gpu.cpu() - on_cpu).abs().max() / on_cpu.abs().max()).item() < 1e-3


@pytest.mark.parametrize("head_sampler", ["ddpm", "dpm++"])
@pytest.mark.parametrize("pivots", ["none", "conditional"])
def test_sampling_never_waits_for_the_device(pivots: str, head_sampler: str) -> None:
    """One look at the device a call, at the end: whether all numbers were finite."""
    model, labels, images = built(pivots).cuda(), torch.arange(4).cuda(), torch.arange(4).cuda()
    settings = replace(SETTINGS, head_sampler=head_sampler)  # type: ignore[arg-type]
    sample_masked(model, labels, settings, PhiloxNoise(3, images))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError) as waited:
            sample_masked(model, labels, settings, PhiloxNoise(3, images))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any("if not finite" in str(entry.statement) for entry in waited.traceback)


@pytest.mark.parametrize("pivots", ["none", "conditional"])
def test_compiled_heads_draw_the_same(pivots: str) -> None:
    model, labels, images = built(pivots).cuda(), torch.arange(4).cuda(), torch.arange(4).cuda()
    plain = sample_masked(model, labels, SETTINGS, PhiloxNoise(3, images)).latents
    compile_heads(model, half=False)
    compiled = sample_masked(model, labels, SETTINGS, PhiloxNoise(3, images)).latents
    assert ((compiled - plain).abs().max() / plain.abs().max()).item() < 1e-3


@pytest.mark.parametrize("pivots", ["none", "conditional"])
def test_compiled_heads_in_half_precision(pivots: str) -> None:
    """As far from float32 as plain ones under autocast, at most twice."""
    model, labels, images = built(pivots).cuda(), torch.arange(4).cuda(), torch.arange(4).cuda()

    def draw(precision: str) -> torch.Tensor:
        with autocast(torch.device("cuda"), precision):
            return sample_masked(model, labels, SETTINGS, PhiloxNoise(3, images)).latents

    exact, plain = draw("fp32"), draw("bf16")
    compile_heads(model, half=True)
    assert model.dense_head.input.weight.dtype == torch.float32
    assert (draw("bf16") - exact).norm() <= 2 * (plain - exact).norm()


def test_bf16_is_close_to_fp32() -> None:
    model, labels, images = built("conditional").cuda(), torch.arange(4).cuda(), torch.arange(4).cuda()
    full = sample_masked(model, labels, SETTINGS, PhiloxNoise(3, images)).latents
    with autocast(torch.device("cuda"), "bf16"):
        half = sample_masked(model, labels, SETTINGS, PhiloxNoise(3, images)).latents
    assert ((half - full).norm() / full.norm()).item() < 0.1


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("pivots", ["none", "conditional"])
def test_a_recorded_step_is_that_step(pivots: str, compile: bool) -> None:
    """Replays draw anew, as the seed says, and give what the same kernels give without a recording."""
    trained = trainer(pivots, compile, graphs=True)
    assert trained.graphed is not None
    stream = trained.stream(batches)
    losses = []
    for _ in range(12):
        trained.objective.shared = seed_step(0, trained.step, 0, 0)
        shapes, numbers = trained.objective.draw_shapes(trained.step / trained.plan.steps)
        batch = {name: tensor.cuda() for name, tensor in next(stream).items() if name != "index"}
        batch |= {name: torch.tensor(number).cuda() for name, number in numbers.items()}
        gradients = {}
        for name in ("recorded", "replayed", "plain"):
            torch.cuda.manual_seed(5)
            trained.optimizer.adam.zero_grad(set_to_none=False)
            if name == "plain":
                loss, _ = trained.losses(batch, shapes)
                loss.backward()
                loss = loss.detach()  # while its graph lives, gradients are bound to this stream
            else:
                loss, _ = trained.graphed(batch, shapes)
            losses.append(loss.clone())
            gradients[name] = [
                p.grad.clone() for p in trained.optimizer.parameters.values() if p.grad is not None
            ]
        for name in ("recorded", "replayed"):
            for gradient, expected in zip(gradients[name], gradients["plain"], strict=True):
                torch.testing.assert_close(
                    gradient, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item()
                )
        torch.testing.assert_close(losses[-3], losses[-1], rtol=1e-3, atol=0)
        torch.testing.assert_close(losses[-2], losses[-1], rtol=1e-3, atol=0)
        trained.optimizer.norms()
        trained.optimizer.step(trained.step, keep=True)
        trained.step += 1
    assert len({loss.item() for loss in losses[::3]}) > 6
    assert len(trained.graphed.recordings) > 1


@pytest.mark.parametrize("compile", [False, True])
def test_steps_change_the_weights_and_keep_them_finite(compile: bool) -> None:
    trained = trainer("conditional", compile)
    before = {name: p.detach().clone() for name, p in trained.objective.named_parameters()}
    stream = trained.stream(batches)
    for _ in range(4):  # masked counts differ, so do the shapes
        trained.train_step(stream)
    trained.check()
    for name, parameter in trained.objective.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name
