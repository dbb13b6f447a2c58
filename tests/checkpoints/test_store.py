import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hmar_cli.checkpoints import store
from hmar_cli.checkpoints.store import (
    clean,
    find_checkpoint,
    list_steps,
    open_checkpoint,
    prune,
    read_tensors,
    remap_class_embedding,
    save_checkpoint,
    step_folder,
    write_tensors,
)
from hmar_cli.errors import UserError
from hmar_cli.settings import MsvqObjective, NextScale, Recipe

MODEL = Recipe(name="m", model=NextScale(num_classes=2))
TOKENIZER = Recipe(name="t", objective=MsvqObjective())


def save(folder: Path, recipe: Recipe = MODEL, **kwargs) -> Path:
    defaults = {
        "weights": {"model": {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}},
        "class_names": ["cat", "犬"],
        "step": 7,
        "tokenizer": None,
        "tokenizer_hash": "abc",
    }
    save_checkpoint(folder, recipe=recipe, **{**defaults, **kwargs})
    return folder


def test_everything_comes_back(tmp_path):
    tokenizer = save(tmp_path / "tokenizer", TOKENIZER, training=({"x": torch.zeros(1)}, {}))
    big = torch.arange(12.0).view(3, 4)
    folder = save(
        tmp_path / "c",
        weights={"model": {"a": big.T, "view": big[1]}, "ema": {"a": big.T + 1, "view": big[1]}},
        tokenizer=tokenizer,
        licence="MIT",
        source={"file": "x.pth", "sha256": "00"},
        training=({"m": torch.ones(2, dtype=torch.bfloat16)}, {"step": 7}),
    )
    found = open_checkpoint(folder)
    assert (found.kind, found.step, found.class_names) == ("next-scale", 7, ("cat", "犬"))
    assert (found.licence, found.tokenizer_hash, found.weights) == ("MIT", "abc", ("model", "ema"))
    assert found.source == {"file": "x.pth", "sha256": "00"}
    assert found.recipe == MODEL
    assert torch.equal(found.load("model")["a"], big.T)
    assert torch.equal(found.load("model")["view"], big[1])
    assert torch.equal(found.load()["a"], big.T + 1)  # the average, where there is one
    tensors, state = found.training()
    assert tensors["m"].dtype == torch.bfloat16 and state == {"step": 7}
    assert found.tokenizer is not None
    inner = open_checkpoint(found.tokenizer)
    assert inner.kind == "msvq" and not inner.resumable and inner.tokenizer is None
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoint.json",
        "recipe.toml",
        "model.safetensors",
        "ema.safetensors",
        "tokenizer",
        "training",
    }


def test_a_carried_tokenizer_survives_the_deletion_of_its_origin(tmp_path):
    tokenizer = save(tmp_path / "tokenizer", TOKENIZER)
    folder = save(tmp_path / "c", tokenizer=tokenizer)
    assert (folder / "tokenizer" / "model.safetensors").stat().st_nlink == 2  # no second copy on the disk
    for path in sorted(tokenizer.rglob("*"), reverse=True):
        path.unlink()
    assert torch.equal(open_checkpoint(folder / "tokenizer").load()["n"], torch.tensor(3))


def test_tokenizer_is_copied_where_links_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(store.os, "link", refuse)
    folder = save(tmp_path / "c", tokenizer=save(tmp_path / "tokenizer", TOKENIZER))
    assert (folder / "tokenizer" / "model.safetensors").stat().st_nlink == 1
    assert open_checkpoint(folder / "tokenizer").load()


def test_newest_complete_step_is_found(tmp_path):
    for step in (9, 10, 100000000):
        save(step_folder(tmp_path, step), step=step)
    (tmp_path / "step-00000200").mkdir()  # no checkpoint.json: not complete
    (tmp_path / ".step-00000300.1.tmp").mkdir()
    assert [open_checkpoint(path).step for path in list_steps(tmp_path)] == [9, 10, 100000000]
    assert find_checkpoint(tmp_path).name == "step-100000000"
    prune(tmp_path, 2, never=tmp_path / "step-00000009")
    assert len(list_steps(tmp_path)) == 3
    prune(tmp_path, 1)
    assert [path.name for path in list_steps(tmp_path)] == ["step-100000000"]
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000000", "step-00000200"}


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="no checkpoint in"):
        open_checkpoint(tmp_path)
    save(tmp_path / "cache" / "tokenizer")
    with pytest.raises(UserError, match="cache is a cache, no checkpoint") as caught:
        open_checkpoint(tmp_path / "cache")
    assert caught.value.hint == f"it carries a tokenizer in {tmp_path}/cache/tokenizer"
    found = open_checkpoint(save(tmp_path / "c"))
    with pytest.raises(UserError, match="no weights 'ema'"):
        found.load("ema")
    with pytest.raises(UserError, match="without the state of the optimizer"):
        found.training()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("checkpoint.json", "{"),
        ("checkpoint.json", "[]"),
        ("checkpoint.json", '{"format": "other"}'),
        ("checkpoint.json", '{"format": "hmar", "version": 2}'),
        ("checkpoint.json", '{"format": "hmar", "version": 1}'),
        ("recipe.toml", "name = "),
        ("recipe.toml", "[tokenizer]\nnothing = 1"),
    ],
)
def test_broken_description_is_a_user_error(tmp_path, file, content):
    folder = save(tmp_path / "c")
    (folder / file).write_text(content)
    with pytest.raises(UserError):
        open_checkpoint(folder)


def test_cut_weights_are_a_user_error(tmp_path):
    folder = save(tmp_path / "c")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="is broken"):
        open_checkpoint(folder).load()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing file"):
        open_checkpoint(folder).load()


def test_pickles_are_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is broken"):
        read_tensors(path)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    save(tmp_path / "c", step=1)
    monkeypatch.setattr(store, "_flush", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "c", step=2)
    assert open_checkpoint(tmp_path / "c").step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_file_that_may_not_grow_is_an_os_error(tmp_path):
    """A real failure of the file system, as a full disk is one: the size limit of a process."""
    script = (
        "import resource, sys, pathlib, torch, errno\n"
        "from hmar_cli.checkpoints.store import write_tensors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "try:\n"
        "    write_tensors(pathlib.Path(sys.argv[1]), {'a': torch.zeros(100000)})\n"
        "except OSError as error:\n"
        "    print(errno.errorcode[error.errno], error.filename)\n"
    )
    path = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["EFBIG", str(path)], done.stderr


def test_weights_called_model_are_required(tmp_path):
    with pytest.raises(ValueError, match="called 'model'"):
        save(tmp_path / "c", weights={"ema": {}})


def test_tensors_may_share_memory(tmp_path):
    base = torch.arange(10.0)
    write_tensors(tmp_path / "x", {"a": base, "b": base, "c": base[2:4], "d": torch.tensor(1.5)})
    found = read_tensors(tmp_path / "x")
    assert torch.equal(found["b"], base) and found["c"].tolist() == [2, 3] and found["d"].item() == 1.5


def test_class_embeddings_follow_their_classes():
    old = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    fresh = torch.tensor([[10.0], [20.0], [90.0]])
    assert remap_class_embedding(old, fresh, [-1, 1]).flatten().tolist() == [10.0, 2.0, 9.0]
    assert fresh.flatten().tolist() == [10.0, 20.0, 90.0]
    assert remap_class_embedding(old, old * 0, [2, 0, 1]).flatten().tolist() == [3.0, 1.0, 2.0, 9.0]
    bare = remap_class_embedding(old[:3], fresh[:2], [2, -1])  # no row for "no class"
    assert bare.flatten().tolist() == [3.0, 20.0]
    for places in ([0, 3], [0, 1, 2, -1]):
        with pytest.raises(ValueError, match="as many more in both, got 4, and 3 for"):
            remap_class_embedding(old, fresh, places)


def test_description_is_readable_json(tmp_path):
    about = json.loads((save(tmp_path / "c") / "checkpoint.json").read_text())
    assert about["format"] == "hmar" and about["class_names"] == ["cat", "犬"]
    assert set(about["versions"]) == {"python", "torch"}
    assert replace(MODEL) == open_checkpoint(tmp_path / "c").recipe
