import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hmar_cli.checkpoints.store import list_steps, open_checkpoint, step_folder
from hmar_cli.errors import UserError
from hmar_cli.training import trainer as trainer_module
from hmar_cli.training.logging import read_rows
from hmar_cli.training.trainer import Trainer, fit, rehearse


def run(out: Path, recipe, objective=None, **kwargs):
    objective = objective or toys.Toy()
    resume = open_checkpoint(out) if kwargs.pop("resume", False) else None
    return objective, fit(
        objective,
        toys.batches,
        recipe=recipe,
        images=toys.IMAGES,
        out=out,
        save=toys.saver(recipe),
        resume=resume,
        device="cpu",
        **kwargs,
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def untimed(out: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "images_per_second"} for row in read_rows(out / "metrics.jsonl")
    ]


def test_a_run_leaves_checkpoints_rows_pictures_and_events(tmp_path):
    seen = []

    def preview(model):
        seen.append((model.training, model[0].weight.clone()))
        return Image.fromarray(np.full((4, 6, 3), len(seen), np.uint8))

    objective, outcome = run(tmp_path, toys.recipe(), preview=preview)
    assert (outcome.step, outcome.interrupted) == (6, 0)
    assert outcome.checkpoint == tmp_path / "step-00000006"
    assert objective.steps == [1, 2, 3, 4, 5, 6]
    assert objective.calls == 12  # two micro-batches a step
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["epoch"] == pytest.approx(6 * 2 / 10)  # 10 micro-batches of 4 in 41 images
    assert rows[0]["progress"] == pytest.approx((0 + 1) / 2 / 6)  # the mean over steps 1 and 2
    for row in rows:
        assert {
            "lr",
            "weight_decay",
            "loss",
            "grad_norm_model",
            "grad_norm_critic",
            "images_per_second",
        } <= set(row)
        assert len(row["per_scale"]) == 2
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step-00000003.png",
        "step-00000006.png",
    ]
    ema = open_checkpoint(tmp_path).load("ema")["0.weight"]
    assert [mode for mode, _ in seen] == [False, False]
    assert torch.equal(seen[-1][1], ema)  # pictures show the averaged weights
    assert not torch.equal(objective.model[0].weight, ema)  # and the trained ones come back
    assert objective.model.training
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"loss", "per_scale/01", "per_scale/02", "grad_norm_model"} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows], rel=1e-6)


def test_a_picture_that_is_not_finite_is_one_warning_and_training_goes_on(tmp_path, capfd):
    drawn = []

    def preview(model):
        drawn.append(model[0].weight.clone())
        if len(drawn) == 1:
            raise FloatingPointError("the model's logits are not finite")
        return Image.new("RGB", (6, 4))

    objective, outcome = run(tmp_path, toys.recipe(), preview=preview)
    assert outcome.step == 6 and objective.model.training
    assert not torch.equal(drawn[0], objective.model[0].weight)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert line == "warning: no picture of step 3: the model's logits are not finite"
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00000006.png"]
    run(tmp_path / "without", toys.recipe())
    assert files(tmp_path / "without") == {
        name: data for name, data in files(tmp_path).items() if not name.startswith("without")
    }  # the averaged weights went back to their place


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    models = []
    for parts in (1, 2, 4):
        recipe = toys.recipe(accumulate=parts)
        objective, _ = run(tmp_path / str(parts), recipe, toys.Toy(noise=0))
        assert objective.calls == 6 * parts
        models.append(torch.cat([p.detach().flatten() for p in objective.model.parameters()]))
    losses = [[row["loss"] for row in read_rows(tmp_path / n / "metrics.jsonl")] for n in ("1", "2", "4")]
    for other, loss in zip(models[1:], losses[1:], strict=True):
        torch.testing.assert_close(other, models[0], rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(losses[0], rel=1e-5)


def test_resumed_run_repeats_the_whole_one_bit_for_bit(tmp_path):
    recipe = toys.recipe(steps=9, save_every=3, log_every=2)
    run(tmp_path / "whole", recipe)
    # stopped after step 3, in the middle of an epoch and between two rows
    broken = toys.Toy()

    def stop(step):
        if step == 5:
            raise RuntimeError("power cut")
        toys.Toy.on_step(broken, step)

    broken.on_step = stop
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "parts", recipe, broken)
    assert [row["step"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl")] == [2, 4]
    run(tmp_path / "parts", recipe, resume=True)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    newest = {name for name in whole if name.startswith("step-00000009")}
    assert len(newest) == 3  # model, ema, optimizer
    for name in newest:
        assert whole[name] == parts[name], name


def test_resuming_without_its_ema_is_refused(tmp_path):
    run(tmp_path, toys.recipe(steps=3, ema=0.0))
    with pytest.raises(UserError, match="ema"):
        run(tmp_path, toys.recipe(steps=6), resume=True)


def test_keeps_the_newest_and_the_one_resumed_from(tmp_path):
    recipe = toys.recipe(steps=5, save_every=1, keep=2)
    run(tmp_path, recipe)
    assert [p.name for p in list_steps(tmp_path)] == ["step-00000004", "step-00000005"]
    run(tmp_path, replace(recipe, train=replace(recipe.train, steps=9)), resume=True)
    kept = [p.name for p in list_steps(tmp_path)]
    assert kept == ["step-00000005", "step-00000008", "step-00000009"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_stops_before_a_step_that_is_not_finite(tmp_path, where):
    clean = toys.Toy()
    trained = Trainer(clean, toys.recipe(), toys.IMAGES, "cpu")
    stream = trained.stream(toys.batches)
    for _ in range(4):
        trained.train_step(stream)
    objective = toys.Toy(poison=4, where=where)
    with pytest.raises(UserError, match="not finite at step 5") as error:
        run(tmp_path, toys.recipe(), objective)
    assert objective.steps == [1, 2, 3, 4]
    for name, tensor in objective.model.state_dict().items():
        assert torch.equal(tensor, clean.model.state_dict()[name]), name
    indices = [next(toys.batches(8 + i, 0, 1, 4))["index"].tolist() for i in range(2)]
    assert any(" ".join(str(i) for part in indices for i in part) in line for line in error.value.details)
    assert error.value.hint == f"lower optim.base_lr or optim.clip; {step_folder(tmp_path, 3)} is good"
    number = "nan" if where == "loss" else r"\d\.\d+"
    (means,) = [line for line in error.value.details if line.startswith("means since the last log: ")]
    assert re.search(rf": loss {number}, grad norm model nan, grad norm critic ", means)
    assert open_checkpoint(tmp_path).step == 3  # the older checkpoint is whole
    assert all(t.isfinite().all() for t in open_checkpoint(tmp_path).load().values())


def test_advice_fits_precision_and_what_was_saved(tmp_path):
    for name, precision, hint in (
        ("a", "fp32", "lower optim.base_lr or optim.clip"),
        ("b", "bf16", "lower optim.base_lr or optim.clip, or try train.precision=fp32"),
    ):
        with pytest.raises(UserError, match="not finite at step 2") as error:
            run(tmp_path / name, toys.recipe(precision=precision), toys.Toy(poison=1))
        assert error.value.hint == hint
    run(tmp_path, toys.recipe(steps=3))
    with pytest.raises(UserError, match="not finite at step 4") as error:
        run(tmp_path, toys.recipe(), toys.Toy(poison=0), resume=True)
    assert error.value.hint.endswith(f"; {step_folder(tmp_path, 3)} is good")


def test_a_device_that_is_not_asked_skips_every_update_after_a_bad_one():
    """What happens on a GPU between two log steps, on the CPU."""
    objective = toys.Toy(poison=2)
    trained = Trainer(objective, toys.recipe(), toys.IMAGES, "cpu")
    trained.patient = True
    stream = trained.stream(toys.batches)
    for _ in range(2):
        trained.train_step(stream)
    names = [
        name for name in trained.optimizer.parameters if name != "model.0.bias"
    ]  # on_step changes that one
    before = {name: trained.optimizer.parameters[name].detach().clone() for name in names}
    moments = {name: tensor.clone() for name, tensor in trained.optimizer.state_dict().items()}
    for _ in range(3):
        trained.train_step(stream)
    for name, value in before.items():
        assert torch.equal(trained.optimizer.parameters[name], value), name
    for name, value in trained.optimizer.state_dict().items():
        assert torch.equal(value, moments[name]), name
    with pytest.raises(UserError, match="not finite at step 3"):
        trained.check()


def test_the_device_is_read_only_when_something_is_logged(monkeypatch):
    reads = []
    original = Trainer.check
    monkeypatch.setattr(Trainer, "check", lambda self: (reads.append(self.step), original(self))[1])
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (reads.append("item"), item(self))[1])
    trained = Trainer(toys.Toy(), toys.recipe(), toys.IMAGES, "cpu")
    trained.patient = True  # as on a GPU
    stream = trained.stream(toys.batches)
    trained.train_step(stream)
    trained.train_step(stream)
    assert reads == []
    trained.patient = False  # as on a CPU
    trained.train_step(stream)
    assert reads[0] == 2


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    objective = toys.Toy()

    def on_step(step):
        toys.Toy.on_step(objective, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    objective.on_step = on_step
    before = signal.getsignal(signal.SIGINT)
    _, outcome = run(tmp_path, toys.recipe(), objective)
    assert (outcome.step, outcome.interrupted) == (2, signal.SIGINT)
    assert open_checkpoint(tmp_path).step == 2
    assert signal.getsignal(signal.SIGINT) is before
    run(tmp_path, toys.recipe(), resume=True)
    run(tmp_path / "whole", toys.recipe())
    assert untimed(tmp_path) == untimed(tmp_path / "whole")


def test_a_signal_counts_once_all_processes_agree(tmp_path, monkeypatch):
    plain = Trainer._stop

    def late(self):
        agreed = plain(self)
        if self.step == 2:  # too late for this agreement: to be kept for the next, not acted on alone
            signal.raise_signal(signal.SIGTERM)
        return agreed

    monkeypatch.setattr(Trainer, "_stop", late)
    _, outcome = run(tmp_path, toys.recipe(save_every=100))
    assert (outcome.step, outcome.interrupted) == (3, signal.SIGTERM)
    assert [path.name for path in list_steps(tmp_path)] == ["step-00000003"]


@pytest.mark.parametrize(("patient", "read"), [(True, [0, 0, 0, 15]), (False, [0, 15])])
def test_another_processs_signal_is_read_once_a_gpu_has_more_to_do(monkeypatch, patient, read):
    trained = Trainer(toys.Toy(), toys.recipe(), toys.IMAGES, "cpu")
    trained.world, trained.patient = 2, patient

    def all_reduce(worst, _operation):
        assert worst.tolist() == [0, 0]  # all is finite here, and no signal has come
        worst[1] = 15.0 if trained.step == 1 else 0.0

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    stream, found = trained.stream(toys.batches), []
    for _ in read:
        trained.train_step(stream)
        found.append(trained._stop())
    assert found == read


def test_a_full_disk_leaves_older_checkpoints_whole(tmp_path, monkeypatch):
    recipe = toys.recipe()
    save, calls = toys.saver(recipe), []

    def full(folder, step, weights, training):
        calls.append(step)
        if step == 6:
            monkeypatch.setattr("hmar_cli.checkpoints.store.save_file", no_space)
        save(folder, step, weights, training)

    def no_space(tensors, path):
        from safetensors import SafetensorError

        Path(path).write_bytes(b"some of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as error:
        fit(
            toys.Toy(), toys.batches, recipe=recipe, images=toys.IMAGES, out=tmp_path, save=full, device="cpu"
        )
    assert error.value.errno == 28
    assert calls == [3, 6]
    assert [p.name for p in list_steps(tmp_path)] == ["step-00000003"]
    assert open_checkpoint(tmp_path).training()[1]["step"] == 3


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size 9 cannot be shared"):
        Trainer(toys.Toy(), toys.recipe(batch_size=9), toys.IMAGES, "cpu")
    with pytest.raises(UserError, match="41 images, fewer than the 48"):
        Trainer(toys.Toy(), toys.recipe(batch_size=96), toys.IMAGES, "cpu")


def test_one_process_is_not_wrapped():
    objective = toys.Toy()
    assert Trainer(objective, toys.recipe(), toys.IMAGES, "cpu").wrapped is objective


def test_plan_counts_parameters_steps_and_memory():
    plan = Trainer(toys.Toy(), toys.recipe(steps=0, epochs=3), toys.IMAGES, "cpu").plan
    model = 3 * 8 + 8 + 8 + 8 + 8 * 2 + 2
    assert plan.parameters == plan.trainable == {"model": model, "critic": 3}
    assert plan.steps_per_epoch == 5
    assert plan.steps == 15
    assert plan.micro_batch == 4
    assert plan.memory_bytes == 4 * (4 * (model + 3) + model)


def test_rehearsal_runs_one_step_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = rehearse(toys.Toy(), toys.batches, recipe=toys.recipe(), images=toys.IMAGES, device="cpu")
    assert outcome.checkpoint is None and outcome.step == 1
    assert outcome.last["loss"] > 0
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_of_a_resumed_run_runs_its_next_step(tmp_path):
    """The loss is of that step alone, where the run's next row has the mean of two."""
    run(tmp_path / "a", toys.recipe(log_every=1))
    run(tmp_path / "b", toys.recipe())
    before = sorted(tmp_path.rglob("*"))
    outcomes = [
        rehearse(
            toys.Toy(),
            toys.batches,
            recipe=toys.recipe(),
            images=toys.IMAGES,
            resume=open_checkpoint(folder),
            device="cpu",
        )
        for folder in list_steps(tmp_path / "b")
    ]
    assert [outcome.step for outcome in outcomes] == [4, 6]
    outcomes[0].last.pop("images_per_second")
    assert outcomes[0].last == untimed(tmp_path / "a")[3]
    assert outcomes[1].last == {}  # the run is finished
    assert sorted(tmp_path.rglob("*")) == before


def test_bf16_runs_under_autocast(monkeypatch):
    seen = []

    class Watching(toys.Toy):
        def forward(self, batch, progress):
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().forward(batch, progress)

    for precision, expected in (("bf16", torch.bfloat16), ("fp32", False), ("auto", False)):
        seen.clear()
        rehearse(
            Watching(),
            toys.batches,
            recipe=toys.recipe(precision=precision),
            images=toys.IMAGES,
            device="cpu",
        )
        assert set(seen) == {expected}


def test_compile_compiles_the_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(self))
    objective = toys.Toy()
    Trainer(objective, toys.recipe(compile=True), toys.IMAGES, "cpu")
    assert compiled == [objective.model]


def test_graphs_are_left_out_without_a_gpu_and_it_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    trained = Trainer(toys.Toy(), toys.recipe(graphs=True), toys.IMAGES, "cpu")
    assert trained.graphed is None
    assert "graphs: none (they need a GPU)" in capfd.readouterr().err


def test_seeds_differ_by_step_micro_batch_rank_and_seed():
    drawn = set()
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        shared = trainer_module.seed_step(*place)
        first, alike = torch.rand(2), torch.rand(2, generator=shared)
        shared = trainer_module.seed_step(*place)
        assert torch.equal(torch.rand(2), first) and torch.equal(torch.rand(2, generator=shared), alike)
        drawn |= {tuple(first.tolist()), tuple(alike.tolist())}
    assert len(drawn) == 5 + 4  # of what is shared, the two ranks draw the same


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        run(tmp_path / "run", toys.recipe(), wandb=True)
    assert not (tmp_path / "run").exists()


def test_rows_are_json_lines_that_survive_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
