"""From a published file to images, by the commands alone; greedy images must be the recorded ones."""

import json
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_runs import hmar


class World:
    """Published files of a fixture's models on disk, and the checkpoints imported from them."""

    def __init__(self, folder: Path, name: str, format: str) -> None:
        self.about, self.tensors = golden.load_fixture(golden.folder() / f"{name}.json")
        state: dict[str, Tensor] = golden.part(self.tensors, "state.")
        torch.save({k: v for k, v in state.items() if not k.startswith("vae.")}, folder / "model.pth")
        torch.save(golden.part(state, "vae."), folder / "vae.pth")
        sides = ",".join(map(str, self.about["config"]["vae"]["v_patch_nums"]))
        self.tokenizer, self.checkpoint = folder / "tokenizer", folder / "checkpoint"
        arguments = ("checkpoint", "import", folder / "vae.pth", "--format", "msvq", "--scales", sides)
        assert hmar(*arguments, "--out", self.tokenizer).exit_code == 0
        arguments = ("checkpoint", "import", folder / "model.pth", "--format", format, "--scales", sides)
        self.imported = hmar(*arguments, "--tokenizer", self.tokenizer, "--out", self.checkpoint, "--json")
        assert self.imported.exit_code == 0, self.imported.output


@pytest.fixture(scope="module", params=[("var-a", "var"), ("hmar-full-a", "hmar")], ids=["var", "hmar"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), *request.param)


def test_import_accounts_for_every_key_and_states_the_licence(world: World) -> None:
    account = json.loads(world.imported.stdout)
    keys = [k for k in world.tensors if k.startswith("state.") and not k.startswith("state.vae.")]
    assert account["imported"] + len(account["derived"]) == len(keys)
    assert account["licence"] in world.imported.stderr
    about = json.loads(hmar("checkpoint", "inspect", world.checkpoint, "--json").stdout)
    assert about["licence"] == account["licence"]
    assert about["parameters"] == account["parameters"]
    assert about["classes"] == world.about["config"]["transformer"]["num_classes"]
    assert about["source"]["file"] == "model.pth" and len(about["source"]["sha256"]) == 64
    assert about["tokenizer"] == "carried"
    assert "next-scale" in hmar("checkpoint", "inspect", world.checkpoint).stdout


@pytest.mark.parametrize("batch_size", [1, 2])
def test_greedy_samples_are_the_recorded_images(world: World, tmp_path: Path, batch_size: int) -> None:
    runs = world.about["config"]["generations"]
    name = next(n for n, run in runs.items() if run["top_k"] == 1 and run["cfg"] == 1.5)
    schedule = json.dumps(runs[name].get("mask_schedule") or []).replace("[]", "none")
    labels = ",".join(map(str, world.tensors["in.gen_labels"].tolist()))
    arguments = ("sample", "--checkpoint", world.checkpoint, "--labels", labels, "--cfg", 1.5, "--top-k", 1)
    arguments += (
        "--top-p",
        0,
        "--schedule",
        schedule,
        "--batch-size",
        batch_size,
        "--out",
        tmp_path,
        "--npz",
    )
    result = hmar(*arguments, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert (
        result.stderr.count("attention: sdpa (one dense call per scale is the fastest without a GPU)\n") == 1
    )
    expected = (world.tensors[f"out.{name}.image"].permute(0, 2, 3, 1) * 255).round().numpy()
    for i, image in enumerate(expected):
        with Image.open(tmp_path / f"{i:06d}.png") as drawn:
            assert np.abs(np.asarray(drawn) - image).max() <= 1
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == expected.shape and arrays["arr_0"].dtype == np.uint8
    record = json.loads((tmp_path / "sample.json").read_text())
    assert record["top_k"] == 1 and record["seed"] == 0 and record["cfg"] == 1.5


def sample(world: World, out: Path, *extra: object) -> Any:
    arguments = ("sample", "--checkpoint", world.checkpoint, "--device", "cpu", "--schedule", "none")
    return hmar(*arguments, "--out", out, *extra)


def pixels(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(out.glob("0*.png"))]


def test_batch_size_and_interruption_change_nothing(world: World, tmp_path: Path) -> None:
    """Images that an interrupted run left are kept, the others come out the same."""
    for name, batch in (("one", 1), ("three", 3)):
        assert sample(world, tmp_path / name, "--count", 5, "--batch-size", batch).exit_code == 0
    whole = pixels(tmp_path / "one")
    assert len(set(whole)) == 5 and pixels(tmp_path / "three") == whole
    (tmp_path / "one" / "000003.png").unlink()
    before = (tmp_path / "one" / "000001.png").stat().st_mtime_ns
    result = sample(world, tmp_path / "one", "--count", 5, "--batch-size", 2, "--json")
    assert json.loads(result.stdout)["already_there"] == 4
    assert pixels(tmp_path / "one") == whole
    assert (tmp_path / "one" / "000001.png").stat().st_mtime_ns == before
    result = sample(world, tmp_path / "one", "--count", 6, "--json")  # more of the same
    assert json.loads(result.stdout)["already_there"] == 5 and pixels(tmp_path / "one")[:5] == whole


def test_an_array_of_all_images_is_never_one_of_some(world: World, tmp_path: Path) -> None:
    def shape() -> Any:
        path = tmp_path / "samples.npz"
        return np.load(path)["arr_0"].shape[0] if path.exists() else None

    for count, flags, found in (
        (2, ("--npz",), 2),
        (2, (), 2),  # nothing has changed
        (3, (), None),
        (3, ("--npz",), 3),
        (2, (), None),
        (2, ("--npz",), 2),
    ):
        assert sample(world, tmp_path, "--count", count, *flags).exit_code == 0
        assert shape() == found
    (tmp_path / "000001.png").unlink()
    assert sample(world, tmp_path, "--count", 2).exit_code == 0 and shape() is None


def test_a_dry_run_says_in_a_few_lines_what_would_be_drawn(world: World, tmp_path: Path) -> None:
    flags = ("--count", 7, "--labels", "3,1", "--top-k", 4, "--dry-run")
    lines = [line.split(maxsplit=1) for line in sample(world, tmp_path / "a", *flags).stdout.splitlines()]
    assert [name for name, _ in lines] == ["images", "classes", "weights", "sampler", "output"]
    said = dict(lines)
    assert said["images"].startswith("7 by seed 0") and said["classes"].startswith("2: ")
    assert "top k 4" in said["sampler"] and "schedule none" in said["sampler"]
    assert str(world.checkpoint) in said["weights"] and said["output"] == str(tmp_path / "a")
    about = json.loads(sample(world, tmp_path / "a", *flags, "--json").stdout)
    assert (about["count"], about["top_k"], about["labels"]) == (7, 4, [3, 1])
    assert not (tmp_path / "a").exists()


def test_mistakes_are_one_line_and_a_hint(world: World, tmp_path: Path) -> None:
    cases = {
        "no class 'zebra'": ("--labels", "zebra"),
        "--schedule 1,2: expected passes for": ("--schedule", "1,2"),
        "--schedule abc: no such schedule": ("--schedule", "abc"),
        "--schedule 1,x,1,1: no such schedule": ("--schedule", "1,x,1,1"),
        "--schedule [[1: not JSON": ("--schedule", "[[1"),
        "'fp16' is not one of 'auto', 'bf16', 'fp32'": ("--precision", "fp16", "--dry-run"),
        "no weights 'best'": ("--weights", "best"),
    }
    for message, extra in cases.items():
        result = sample(world, tmp_path, *extra)
        assert result.exit_code == 2, result.output
        first, *rest = result.stderr.strip().splitlines()
        assert first.startswith("error: ") and message in first
        assert rest[-1].startswith("hint: ")
    assert sample(world, tmp_path / "other", "--count", 1).exit_code == 0
    result = sample(world, tmp_path / "other", "--count", 1, "--cfg", 0.5)
    assert result.exit_code == 2 and "other settings (cfg)" in result.stderr
    result = hmar("sample", "--checkpoint", tmp_path / "nowhere")
    assert result.exit_code == 2 and "nowhere" in result.stderr


def test_var_refuses_to_refine(world: World, tmp_path: Path) -> None:
    result = sample(world, tmp_path, "--schedule", "1,2,1,1", "--count", 1)
    if world.imported.stdout.count("merged"):
        assert result.exit_code == 0
    else:
        assert result.exit_code == 2 and "masked branch" in result.stderr
