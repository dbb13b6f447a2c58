"""`hmar train` and `hmar finetune-masked` through the real application."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from toy_runs import hmar, make_cache

from hmar_cli.builders import load_model, load_tokenizer
from hmar_cli.checkpoints.store import open_checkpoint, save_checkpoint, step_folder
from hmar_cli.recipe import load_recipe
from hmar_cli.runs import initialize
from hmar_cli.training.logging import read_rows

SHORT = ("--set", "train.steps=2", "--set", "train.save_every=2", "--device", "cpu")


def train(toys, *arguments):
    return hmar("train", "--recipe", toys / "toy.toml", *arguments, *SHORT)


def refused(result, *words: str) -> None:
    """Exit code 2, one line of error and one of hint."""
    assert result.exit_code == 2, result.output
    assert [line.startswith("error: ") for line in result.stderr.splitlines()].count(True) == 1
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def base(toys, cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("base") / "run"
    result = train(toys, "--data", cache, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_a_model_is_trained_on_a_cache(base, cache):
    found = open_checkpoint(base)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert found.step == 2 and found.weights == ("model", "ema")
    assert list(found.class_names) == manifest["class_names"]
    assert found.tokenizer_hash == manifest["tokenizer_hash"]
    assert found.recipe.model.num_classes == len(manifest["class_names"])
    assert load_recipe(str(base / "recipe.toml")) == found.recipe
    model, tokenizer, _ = load_model(base)
    assert tokenizer.fingerprint() == found.tokenizer_hash
    assert model.class_embed.weight.shape[0] == len(manifest["class_names"]) + 1
    row = read_rows(base / "metrics.jsonl")[-1]
    assert len(row["accuracy_per_scale"]) == len(row["cross_entropy_per_scale"]) == 3
    assert (base / "samples" / "step-00000002.png").is_file()


def test_outcome_as_json_and_the_next_command(toys, cache, tmp_path):
    result = train(toys, "--data", cache, "--out", tmp_path / "run", "--no-ema", "--json")
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    assert outcome["step"] == 2 and outcome["checkpoint"].endswith("step-00000002")
    assert "hmar sample --checkpoint" in result.stderr
    assert open_checkpoint(tmp_path / "run").weights == ("model",)


def test_dry_run_shows_the_plan_and_writes_nothing(toys, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(toys, "--data", cache, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)["plan"]
    assert plan["steps"] == 2 and plan["micro_batch"] == 4 and plan["parameters"]["model"] > 1000
    assert "parameters" in result.stderr and "one step: loss" in result.stderr
    names = json.loads((cache / "manifest.json").read_text())["class_names"]
    classes = f"{len(names)} classes ({', '.join(names[:3])}, …)"
    assert f"data: 30 images of {classes}; 3.5 steps an epoch\n" in result.stderr  # of two halves each
    smaller = ("--set", "train.batch_size=2", "--set", "train.accumulate=1", "--dry-run")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["skipped"] = [{"index": 30, "reason": "broken"}]
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    result = train(toys, "--data", tmp_path / "cache", *smaller)
    assert f"{classes}, 1 more could not be used; 15 steps an epoch\n" in result.stderr
    shutil.rmtree(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_data_shows_what_does_not_depend_on_it(toys, cache, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_data, without = (train(toys, *data, "--dry-run", "--json") for data in (("--data", cache), ()))
    assert without.exit_code == 0, without.output
    found, known = json.loads(without.stdout), json.loads(with_data.stdout)
    classes = 1000 - len(json.loads((cache / "manifest.json").read_text())["class_names"])
    known["plan"]["parameters"]["model"] += 32 * classes  # the recipe's own count, of vectors of 32 numbers
    for key in ("device", "precision", "world", "steps", "micro_batch", "parameters"):
        assert found["plan"][key] == known["plan"][key]
    assert (found["step"], found["last"], found["plan"]["steps_per_epoch"]) == (0, {}, 0)
    none = "data: none was given (--data CACHE), so no step was run; the model is for"
    assert f"{none} 1,000 classes\n" in without.stderr and "one step" not in without.stderr
    assert "length: 2 steps of 8 images\n" in without.stderr
    epochs = train(toys, "--set", "train.epochs=3", "--dry-run")
    by_epochs = hmar("train", "--recipe", toys / "toy.toml", "--dry-run", "--set", "train.steps=0")
    assert "length: 2 steps of 8 images\n" in epochs.stderr
    assert "length: 200 epochs in steps of 8 images\n" in by_epochs.stderr
    masked = hmar("finetune-masked", base, "--recipe", toys / "toy-masked.toml", "--dry-run")
    assert masked.exit_code == 0, masked.output
    assert f"{none} {1000 - classes} classes\n" in masked.stderr  # the base's
    refused(train(toys, "--init", base, "--dry-run"), "--data is missing")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(toys, cache, base):
    refused(train(toys, "--data", cache, "--out", base), "is not empty", "--resume")


def test_a_missing_run_is_not_started_from_scratch(toys, cache, tmp_path):
    refused(train(toys, "--data", cache, "--out", tmp_path / "none", "--resume"), "no run to resume")
    refused(hmar("train", "--out", tmp_path / "none", "--resume"), "no run to resume")
    assert not (tmp_path / "none").exists()


def test_paths_that_do_not_exist_are_refused(toys, cache, tmp_path):
    out = tmp_path / "run"
    refused(train(toys, "--data", tmp_path / "none", "--out", out), "none")
    refused(train(toys, "--data", cache, "--out", out, "--init", tmp_path / "none"), "no such checkpoint")
    refused(train(toys, "--data", cache, "--out", out, "--tokenizer", tmp_path / "none"), "none")
    refused(train(toys, "--out", out), "--data is missing", "hmar tokenize")
    refused(hmar("train"), "--recipe is missing", "hmar recipes list")
    refused(hmar("train", "--recipe", tmp_path / "none.toml"), "none.toml")
    refused(hmar("finetune-masked", tmp_path / "none", "--data", cache), "no such checkpoint")
    refused(hmar("train", "--recipe", toys / "toy.toml", "--device", "tpu"), "--device tpu")
    assert not out.exists()


def test_a_cache_of_another_tokenizer_is_refused_with_both_hashes(toys, cache, other_cache, base, tmp_path):
    ours, other = (
        json.loads((c / "manifest.json").read_text())["tokenizer_hash"] for c in (cache, other_cache)
    )
    assert ours != other
    out = tmp_path / "run"
    given = train(toys, "--data", cache, "--tokenizer", other_cache, "--out", out)
    refused(given, "another tokenizer", ours, other)
    finetuned = hmar(
        "finetune-masked", base, "--recipe", toys / "toy-masked.toml", "--data", other_cache, "--out", out
    )
    refused(finetuned, "another tokenizer", ours, other)
    shutil.copytree(base, out)
    refused(train(toys, "--data", other_cache, "--out", out, "--resume"), "another tokenizer", ours, other)
    swapped = tmp_path / "swapped"
    shutil.copytree(cache, swapped)
    shutil.rmtree(swapped / "tokenizer")
    shutil.copytree(other_cache / "tokenizer", swapped / "tokenizer")
    refused(train(toys, "--data", swapped, "--out", tmp_path / "b"), "another tokenizer", ours, other)


def test_a_cache_that_does_not_fit_the_recipe_is_refused(toys, cache, tmp_path):
    other = ("--set", "tokenizer.scales=[1,3,4]")
    refused(train(toys, "--data", cache, "--out", tmp_path / "a", *other), "[1, 2, 4]", "[1, 3, 4]")
    codes = ("--set", "tokenizer.vocab_size=64")
    refused(train(toys, "--data", cache, "--out", tmp_path / "a", *codes), "codes: 32 in the cache", "64")


def test_a_resumed_run_keeps_its_settings(toys, cache, base, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(base, out)
    changed = ("--set", "model.depth=3", "--set", "train.accumulate=1", "--resume")
    for more in (("--dry-run",), ()):
        result = train(toys, "--data", cache, "--out", out, *changed, *more)
        refused(result, "model.depth: 2 in the run, 3 now", "train.accumulate: 2 in the run, 1 now")
    going_on = ("train", "--out", out, "--resume", "--set", "train.steps=3", "--device", "cpu")
    dry = hmar(*going_on, "--dry-run")
    assert dry.exit_code == 0 and f"resuming {out}" in dry.stderr.replace("\n", ""), dry.output
    assert open_checkpoint(out).step == 2
    longer = hmar(*going_on)
    assert longer.exit_code == 0, longer.output  # recipe and cache are the run's own
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert f"one step: loss {rows[2]['loss']:.4f}, " in dry.stderr
    assert open_checkpoint(out).step == 3


def test_a_resumed_run_that_never_saved_keeps_its_settings(toys, cache, base, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(base / "recipe.toml", out)
    result = train(toys, "--data", cache, "--out", out, "--set", "model.depth=3", "--resume")
    refused(result, "model.depth: 2 in the run, 3 now", "start a new run with another --out")
    result = train(toys, "--data", cache, "--out", out, "--set", "optim.base_lr=0.01", "--resume")
    assert result.exit_code == 0, result.output
    assert "has no checkpoint yet: starting at its first step" in result.stderr


def test_a_dry_run_that_resumes_needs_data_where_the_run_does(toys, base, tmp_path):
    """Alone it needs none, and shows a plan."""
    shutil.copy(base / "recipe.toml", tmp_path)
    masked = ("finetune-masked", base, "--recipe", toys / "toy-masked.toml", "--device", "cpu")
    for more in ((), ("--dry-run",)):
        flags = ("--out", tmp_path, "--resume", *more)
        refused(train(toys, *flags), "--data is missing", "hmar tokenize")
        refused(hmar(*masked, *flags), "--data is missing", "hmar tokenize")


def test_a_resumed_run_keeps_its_data(toys, base, tmp_path):
    out, recipe = tmp_path / "run", load_recipe(str(toys / "toy.toml"))
    shutil.copytree(base, out)
    names = open_checkpoint(base).class_names
    renamed = make_cache(tmp_path / "renamed", recipe, 0, tuple(reversed(names)))
    result = train(toys, "--data", renamed, "--out", out, "--resume")
    refused(result, f"data: classes {', '.join(names[:3])}", f"{', '.join(names[:-4:-1])}, … now")
    fewer = make_cache(tmp_path / "fewer", recipe, 0, images=20)
    refused(train(toys, "--data", fewer, "--out", out, "--resume"), "data: 30 images in the run, 20 now")


def test_an_imported_checkpoint_cannot_be_resumed(toys, cache, base, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(base, out)
    shutil.rmtree(step_folder(out, 2) / "training")
    for more in (("--dry-run",), ()):
        result = train(toys, "--data", cache, "--out", out, "--resume", *more)
        refused(result, "without the state of the optimizer", "--init")


def test_init_carries_class_embeddings_by_name(toys, cache, base, tmp_path):
    names = list(open_checkpoint(base).class_names)
    names = [names[2], "unicorn", *names[:2], *names[3:]]
    mixed = make_cache(tmp_path / "mixed", load_recipe(str(toys / "toy.toml")), 0, tuple(names))
    still = (
        "--set",
        "optim.base_lr=1e-12",
        "--set",
        "optim.weight_decay=0",
        "--set",
        "optim.weight_decay_end=0",
    )
    result = train(toys, "--data", mixed, "--out", tmp_path / "run", "--init", base, *still)
    assert result.exit_code == 0, result.output
    assert f"{len(names) - 1} of {len(names)} classes found by name" in result.stderr
    assert "; new, so starting from random numbers: unicorn\n" in result.stderr
    toy = load_recipe(str(toys / "toy.toml"))
    other = make_cache(tmp_path / "other", toy, 1, tuple(names))
    stopped = train(toys, "--data", other, "--out", tmp_path / "o", "--init", base)
    refused(stopped, "the cache was made by another tokenizer")
    assert "class embeddings" not in stopped.stderr
    old, new = (open_checkpoint(path).load("ema") for path in (base, tmp_path / "run"))
    key = "class_embed.weight"
    assert open_checkpoint(tmp_path / "run").class_names == tuple(names)
    torch.testing.assert_close(new[key][0], old[key][2])
    torch.testing.assert_close(new[key][2:4], old[key][:2])
    torch.testing.assert_close(new[key][-1], old[key][-1])
    torch.testing.assert_close(new["word_embed.weight"], old["word_embed.weight"])
    assert (new[key][1] - old[key][2]).abs().max() > 1e-3


def test_init_takes_no_class_whose_name_says_not_which(tmp_path):
    model, old = torch.nn.ModuleDict({"class_embed": torch.nn.Embedding(3, 1)}), torch.arange(4.0)[:, None]
    fresh = model.class_embed.weight.detach().clone()
    names = ("crane", "dog", "crane")
    origin = SimpleNamespace(
        class_names=names, folder=tmp_path, load=lambda: {"class_embed.weight": old.clone()}
    )
    initialize(model, origin, ("crane", "dog"))
    assert model.class_embed.weight.flatten().tolist() == [fresh[0].item(), 1, 3]


def test_init_from_a_model_of_another_tokenizer_is_refused(toys, other_cache, base, tmp_path):
    ours = json.loads((other_cache / "manifest.json").read_text())["tokenizer_hash"]
    result = train(toys, "--data", other_cache, "--out", tmp_path / "r", "--init", base)
    refused(result, "another tokenizer", open_checkpoint(base).tokenizer_hash, ours)
    assert not (tmp_path / "r").exists()


def test_a_log_without_a_bar_says_rate_and_time_left(toys, cache, tmp_path):
    result = train(toys, "--data", cache, "--out", tmp_path / "run")
    assert re.search(r"step 1/2 epoch .* loss .* accuracy .* images/s ETA 0:00:\d\d\n", result.stderr)
    assert re.search(r"step 2/2 epoch .* images/s ETA 0:00:00\n", result.stderr)


def test_the_implementation_of_attention_is_said_and_free(toys, cache, base, tmp_path):
    """A run may go on with another one; what cannot run here or does not exist is refused."""
    out = tmp_path / "run"
    shutil.copytree(base, out)
    other = ("--set", "model.attention=reference")
    longer = ("--resume", "--set", "train.steps=3", "--device", "cpu")
    result = hmar("train", "--out", out, *longer, *other)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("attention: reference (asked for by name)\n") == 1
    measured = train(toys, "--data", cache, "--out", tmp_path / "m", "--set", "model.attention=measure")
    assert "attention: sdpa (one dense call per scale is the fastest without a GPU)\n" in measured.stderr
    masked = ("--recipe", toys / "toy-masked.toml", "--data", cache, "--device", "cpu", *other)
    finetuned = hmar("finetune-masked", base, *masked, "--out", tmp_path / "f")
    assert "attention: reference (" in finetuned.stderr
    for name, words in (
        ("flex", "cannot run here: FlexAttention"),
        ("fast", 'model.attention: expected "auto"'),
    ):
        new = tmp_path / name
        refused(train(toys, "--data", cache, "--out", new, "--set", f"model.attention={name}"), words)
        assert not new.exists()


def test_init_with_another_model_is_refused(toys, cache, base, tmp_path):
    result = train(toys, "--data", cache, "--out", tmp_path / "r", "--init", base, "--set", "model.depth=3")
    refused(result, "don't fit")
    refused(train(toys, "--data", cache, "--out", tmp_path / "r", "--init", cache / "tokenizer"), "msvq")


def test_masked_finetuning_trains_its_branch_alone(toys, cache, base, tmp_path):
    out = tmp_path / "masked"
    result = hmar(
        "finetune-masked", base, "--recipe", toys / "toy-masked.toml", "--data", cache, "--out", out,
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    row = read_rows(out / "metrics.jsonl")[-1]
    for key in ("accuracy_per_scale", "cross_entropy_per_scale"):  # the first scale is never masked
        assert [each is None for each in row[key]] == [True, False, False]
    before, after = open_checkpoint(base).load(), open_checkpoint(out).load("model")
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    branch = {name for name in after if name.startswith("masked.")}
    assert branch == set(after) - set(before)
    changed = [
        name for name in branch
        if name.replace("masked.blocks.0", "blocks.1").removeprefix("masked.") in before
        and not torch.equal(after[name], before[name.replace("masked.blocks.0", "blocks.1").removeprefix("masked.")])
    ]  # fmt: skip
    assert len(changed) > 8
    model, _, checkpoint = load_model(out)
    assert model.masked is not None and checkpoint.recipe.objective.kind == "masked"
    moments = checkpoint.training()[0]
    assert all("model.masked." in name for name in moments if name.startswith("optimizer."))
    again = hmar("finetune-masked", out, "--recipe", toys / "toy-masked.toml", "--data", cache, "--dry-run")
    assert again.exit_code == 0, again.output  # a merged model is a base, too


def test_masked_finetuning_refuses_other_bases(toys, cache, base, tmp_path):
    masked = (
        "--recipe",
        toys / "toy-masked.toml",
        "--data",
        cache,
        "--out",
        tmp_path / "m",
        "--device",
        "cpu",
    )
    refused(hmar("finetune-masked", cache / "tokenizer", *masked), "not a next-scale model")
    other = hmar("finetune-masked", base, *masked, "--set", "model.width=64")
    refused(other, "another model", "model.width: 64 in the recipe, 32", "hint: ")
    refused(hmar("finetune-masked", base, "--data", cache), "no recipe named 'toy-masked'")
    wrong = hmar("finetune-masked", base, "--recipe", toys / "toy.toml", "--data", cache)
    refused(wrong, "does not finetune", "hmar train")
    refused(
        hmar("train", "--recipe", toys / "toy-masked.toml"), "finetunes a trained model", "finetune-masked"
    )
    var = tmp_path / "var"
    result = train(toys, "--data", cache, "--out", var, "--set", "model.pattern=causal")
    assert result.exit_code == 0, result.output
    refused(hmar("finetune-masked", var, *masked), "model.pattern")
    refused(hmar("finetune-masked", var, "--data", cache), "is a VAR", "model.pattern")
    refused(hmar("finetune-masked", cache / "tokenizer", "--data", cache), "not a next-scale model")


def test_finetuning_keeps_the_licence_of_its_base(toys, cache, base, tmp_path):
    found = open_checkpoint(base)
    save_checkpoint(
        tmp_path / "licensed",
        recipe=found.recipe,
        weights={"model": found.load()},
        class_names=found.class_names,
        step=0,
        tokenizer=found.tokenizer,
        tokenizer_hash=found.tokenizer_hash,
        licence="non-commercial",
    )
    masked = ("--recipe", toys / "toy-masked.toml", "--data", cache, "--device", "cpu")
    assert hmar("finetune-masked", tmp_path / "licensed", *masked, "--out", tmp_path / "m").exit_code == 0
    assert open_checkpoint(tmp_path / "m").licence == "non-commercial"
    assert train(toys, "--data", cache, "--init", tmp_path / "m", "--out", tmp_path / "i").exit_code == 0
    assert open_checkpoint(tmp_path / "i").licence == "non-commercial"


def test_images_that_cannot_be_used_are_counted(toys, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")
    for number in (3, 7):
        (folder / f"{number}.png").write_bytes(b"no picture")
    run = ("train", "--recipe", toys / "toy-msvq.toml", "--device", "cpu", "--data", folder)
    result = hmar(*run, "--set", "train.save_every=3", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "\n2 images could not be used, so others took their places\n" in result.stderr
    counts = [row["unusable_images"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert counts == sorted(counts) and counts[-1] == 2
    shutil.rmtree(step_folder(tmp_path / "run", 4))
    assert hmar(*run, "--set", "train.save_every=3", "--out", tmp_path / "run", "--resume").exit_code == 0
    assert [row["unusable_images"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == counts


def test_a_tokenizer_is_trained_and_resumed_exactly(toys, tmp_path):
    recipe = ("--recipe", toys / "toy-msvq.toml", "--device", "cpu")
    whole = hmar("train", *recipe, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "hmar tokenize" in whole.stderr
    found = open_checkpoint(tmp_path / "whole")
    assert found.kind == "msvq" and load_tokenizer(tmp_path / "whole").fingerprint() == found.tokenizer_hash
    assert (tmp_path / "whole" / "samples" / "step-00000004.png").is_file()
    row = read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert len(row["usage_per_scale"]) == 3 and 0 < row["usage"] <= 1 and row["psnr"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(step_folder(tmp_path / "parts", 4))
    resumed = hmar("train", *recipe, "--out", tmp_path / "parts", "--resume")
    assert resumed.exit_code == 0, resumed.output
    for name in ("model.safetensors", "ema.safetensors", "training/optimizer.safetensors"):
        one, two = (step_folder(tmp_path / run, 4) / name for run in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes(), name
    refused(hmar("train", *recipe, "--tokenizer", tmp_path / "whole"), "--init")
    started = hmar("train", *recipe, "--init", tmp_path / "whole", "--out", tmp_path / "more", *SHORT)
    assert started.exit_code == 0, started.output


@pytest.mark.parametrize("command", ["train", "finetune-masked"])
def test_help_has_examples(command):
    result = hmar(command, "--help")
    assert result.exit_code == 0
    assert f"hmar {command}" in result.stdout and "Examples" in result.stdout
