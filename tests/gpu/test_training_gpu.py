"""Training on a GPU: no waiting between logs, NaN kept out of the weights, bf16, compilation, resuming."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.checkpoints.store import Checkpoint, open_checkpoint, save_checkpoint
from hmar_cli.errors import UserError
from hmar_cli.settings import Data, Msvq, NextScale, NextScaleObjective, Optim, Recipe, Train
from hmar_cli.training.logging import read_rows
from hmar_cli.training.next_scale import MaskedTraining, NextScaleTraining
from hmar_cli.training.trainer import Outcome, Trainer, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOKENIZER = Msvq(channels=32, multipliers=(1, 1), res_blocks=1, z_channels=8, vocab_size=64, scales=(1, 2, 4))
RECIPE = Recipe(
    name="gpu",
    data=Data(size=8),
    tokenizer=TOKENIZER,
    model=NextScale(depth=2, width=64, heads=1, num_classes=4),
    objective=NextScaleObjective(),
    optim=Optim(base_lr=0.02),
    train=Train(batch_size=16, accumulate=2, steps=8, ema=0.9, log_every=4, save_every=4, sample_every=8),
)


def batches(start: int, rank: int, world: int, size: int) -> Iterator[dict[str, Tensor]]:
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        label = torch.randint(4, (size,), generator=generator)
        yield {
            "tokens": label[:, None].expand(size, 21) * 3,
            "label": label,
            "index": torch.arange(size) + step * size,
        }
        step += 1


def objective(recipe: Recipe, masked: bool = False) -> NextScaleTraining | MaskedTraining:
    torch.manual_seed(0)
    model, quantizer = build_model(recipe), build_tokenizer(TOKENIZER).quantizer
    if masked:
        model.attach_masked_branch(1)
        return MaskedTraining(model, quantizer)
    return NextScaleTraining(model, quantizer)


def run(out: Path, recipe: Recipe, resume: Checkpoint | None = None, **kwargs: object) -> Outcome:
    def save(folder, step, weights, training):  # type: ignore[no-untyped-def]
        save_checkpoint(
            folder,
            recipe=recipe,
            weights=weights,
            class_names=list("abcd"),
            step=step,
            tokenizer=None,
            tokenizer_hash="",
            training=training,
        )

    trained = kwargs.get("objective") or objective(recipe)
    return fit(trained, batches, recipe=recipe, images=160, out=out, save=save, resume=resume)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_do_not_wait_for_the_device(masked: bool, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trainer(objective(RECIPE, masked), RECIPE, 160)
    trained.world = world
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    stream = trained.stream(batches)
    for _ in range(2):  # the first steps load kernels
        trained.train_step(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trained.train_step(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stream.close()
    trained.check()


def test_weights_stay_those_before_a_step_that_is_not_finite(tmp_path: Path) -> None:
    class Poisoned(NextScaleTraining):
        calls = 0

        def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = super().forward(batch, progress)
            self.calls += 1
            return loss * (float("nan") if self.calls == 11 else 1.0), metrics  # step 6

    clean = Trainer(objective(RECIPE), RECIPE, 160)
    stream = clean.stream(batches)
    for _ in range(5):
        clean.train_step(stream)
    stream.close()
    base = objective(RECIPE)
    poisoned = Poisoned(base.model, base.quantizer)
    with pytest.raises(UserError, match="not finite at step 6"):
        run(tmp_path, RECIPE, objective=poisoned)
    for name, tensor in poisoned.model.state_dict().items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(tensor, clean.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert open_checkpoint(tmp_path).step == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_learns_and_resumes(tmp_path: Path, compiled: bool) -> None:
    longer = replace(
        RECIPE, train=replace(RECIPE.train, steps=60, save_every=30, log_every=30, compile=compiled)
    )
    outcome = run(tmp_path, longer)
    assert outcome.plan.precision == "bf16" and outcome.peak_memory_bytes > 0
    whole = read_rows(tmp_path / "metrics.jsonl")
    assert whole[-1]["cross_entropy"] < 0.5 * whole[0]["cross_entropy"]
    resumed = run(tmp_path, longer, open_checkpoint(tmp_path / "step-00000030"))
    assert resumed.last["cross_entropy"] == pytest.approx(whole[-1]["cross_entropy"], rel=0.1)
