"""`hmar checkpoint export` is the way back of import: the same files, and the same weights, of every format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toy_runs import FAMILIES, GOLDEN, HIMAR, HMAR_REST, MAR, NEXT_SCALE, VAR, hmar

from hmar_cli.builders import build_image_network
from hmar_cli.checkpoints.store import open_checkpoint, save_checkpoint
from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

PUBLISHED = {
    "msvq": "msvq",
    "var": "var",
    "hmar-nsp": "hmar",
    "hmar-full": "hmar",
    "hmar-mp": "hmar",
    "klvae": "kl",
    "mar": "mar",
    "himar": "himar",
}
"""The import format of each family of fixtures."""
COUNTED = "quantize.ema_vocab_hit_SV"
"""How often training met each code: import leaves it out, and export writes zeros."""


def done(*arguments: object) -> Any:
    result = hmar(*arguments)
    assert result.exit_code == 0, result.output
    return result


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key].shape, actual[key].dtype) == (value.shape, value.dtype), key
        assert key == COUNTED or torch.equal(actual[key], value), key


def fixture_state(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = golden.part(golden.load_fixture(path)[1], "state.")
    return {key: value for key, value in state.items() if not key.startswith("vae.")}


@pytest.mark.parametrize("path", golden.fixtures_of(*PUBLISHED), ids=golden.fixture_id)
def test_a_published_file_comes_back(path: Path, tmp_path: Path) -> None:
    about, state = golden.load_fixture(path)[0], fixture_state(path)
    family, config = about["family"], about["config"]
    torch.save(state, tmp_path / "in.pth")
    flags: list[object] = ["--format", PUBLISHED[family], "--out", tmp_path / "run"]
    if family in GOLDEN:
        (tmp_path / "tiny.toml").write_text(GOLDEN[family])
        flags += ["--recipe", tmp_path / "tiny.toml"]
    elif family != "klvae":
        flags += ["--scales", ",".join(map(str, config["vae"]["v_patch_nums"]))]
    files = {"out": state}
    if family == "hmar-mp":  # its own next-scale model, as masked finetuning starts
        base = {key: value for key, value in state.items() if key != "mask_embed.weight"}
        base["word_embed.bias"] = base.pop("word_embed_bias")
        torch.save(base, tmp_path / "base.pth")
        flags += ["--base", tmp_path / "base.pth"]
        flags += ["--masked-layers", config["transformer"]["n_layers_train"]]
        files["next-scale"] = base
    done("checkpoint", "import", tmp_path / "in.pth", *flags)
    for suffix in ("pth", "safetensors"):
        parts = ("--base", tmp_path / f"next-scale.{suffix}") if len(files) > 1 else ()
        result = done(
            "checkpoint", "export", tmp_path / "run", "--out", tmp_path / f"out.{suffix}", *parts, "--json"
        )
        account = json.loads(result.stdout)
        assert account["format"] == PUBLISHED[family]
        assert account["tensors"] == {str(tmp_path / f"{k}.{suffix}"): len(v) for k, v in files.items()}
        assert account["licence"] == open_checkpoint(tmp_path / "run").licence in result.stderr
        for name, expected in files.items():
            read = torch.load if suffix == "pth" else load_file
            content: Any = read(tmp_path / f"{name}.{suffix}")
            wrapped = {"kl": ["model"], "mar": ["model", "model_ema"], "himar": ["model", "model_ema"]}
            keys = wrapped.get(PUBLISHED[family], []) if suffix == "pth" else []
            assert not keys or list(content) == keys
            for each in [content[key] for key in keys] or [content]:
                equal(each, expected)


# Random small models


Save = Callable[[Path, Recipe, tuple[str, ...]], None]
HMAR = NEXT_SCALE.replace("PATTERN", "diagonal")
MODELS = {
    "var": VAR,
    "var-shared": VAR.replace("depth = 2", "depth = 2\nshared_adaln = true"),
    "hmar": HMAR,
    "hmar-merged": HMAR + HMAR_REST,
    "hmar-all-merged": HMAR + HMAR_REST.replace("layers = 1", "layers = 2"),
    "mar": MAR,
    "himar": HIMAR,
}
PHIS = {"one": "phi_count = 1", "two": "phi_count = 2", "four": "phi_count = 4"}


def checkpoint(folder: Path, text: str, save: Save) -> Path:
    """A checkpoint of random weights of a recipe, whose text goes to toy.toml."""
    (folder / "toy.toml").write_text(text)
    save(folder / "run", load_recipe(str(folder / "toy.toml")), tuple("abcdefgh"))
    return folder / "run"


def same_weights(one: Path, other: Path, which: str = "model") -> None:
    equal(open_checkpoint(one).load(which), open_checkpoint(other).load(which))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_models_are_imported(name: str, suffix: str, tmp_path: Path, save_random: Save) -> None:
    run, family = checkpoint(tmp_path, MODELS[name], save_random), name.split("-")[0]
    told = json.loads(
        done("checkpoint", "export", run, "--out", tmp_path / f"file.{suffix}", "--json").stdout
    )
    flags: tuple[object, ...] = ("--recipe", tmp_path / "toy.toml")
    if family in ("var", "hmar"):
        assert told["not_in_the_file"] == {"scales": [1, 2, 4, 8]}
        flags = ("--scales", "1,2,4,8")
    else:
        assert told["not_in_the_file"]["latent_scale"] == 0.5
    flags = ("--format", family, *flags, "--out", tmp_path / "back")
    done("checkpoint", "import", tmp_path / f"file.{suffix}", *flags)
    same_weights(tmp_path / "back", run)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_masked_branch_and_its_base_are_two_files(layers: int, tmp_path: Path, save_random: Save) -> None:
    text = MODELS["hmar-merged" if layers == 1 else "hmar-all-merged"]
    run, base = checkpoint(tmp_path, text, save_random), tmp_path / "base.pth"
    done("checkpoint", "export", run, "--out", tmp_path / "masked.pth", "--base", base)
    flags = ("--format", "hmar", "--scales", "1,2,4,8", "--masked-layers", layers)
    done("checkpoint", "import", tmp_path / "masked.pth", *flags, "--base", base, "--out", tmp_path / "back")
    same_weights(tmp_path / "back", run)
    done("checkpoint", "import", base, *flags, "--out", tmp_path / "alone")
    state = open_checkpoint(run).load()
    equal(
        open_checkpoint(tmp_path / "alone").load(),
        {key: value for key, value in state.items() if not key.startswith("masked.")},
    )


@pytest.mark.parametrize("name", [*PHIS, "kl"])
def test_a_model_gives_its_tokenizer(name: str, tmp_path: Path, save_random: Save) -> None:
    text = MODELS["mar"] if name == "kl" else VAR.replace("[model]", f"{PHIS[name]}\n[model]")
    run, format = checkpoint(tmp_path, text, save_random), "kl" if name == "kl" else "msvq"
    file, back = tmp_path / "vae.pth", tmp_path / "back"
    done("checkpoint", "export", run, "--format", format, "--out", file)
    if name != "kl":
        assert torch.load(file)[COUNTED].shape == (4, 16)
        assert ("quantize.quant_resi.qresi.bias" in torch.load(file)) == (name == "one")
    scales = () if name == "kl" else ("--scales", "1,2,4,8")
    done("checkpoint", "import", file, "--format", format, *scales, "--out", back)
    same_weights(back, run / "tokenizer")


def test_raw_and_averaged_weights(tmp_path: Path, save_random: Save) -> None:
    for name, text in (("var", VAR), ("mar", MAR)):
        folder = tmp_path / name
        folder.mkdir()
        found = open_checkpoint(checkpoint(folder, text, save_random))
        raw = found.load()
        weights = {"model": raw, "ema": {key: value + 1 for key, value in raw.items()}}
        shared: dict[str, Any] = {"class_names": found.class_names, "step": 1, "tokenizer_hash": ""}
        save_checkpoint(folder / "both", recipe=found.recipe, weights=weights, tokenizer=None, **shared)
        for which in ("", "model", "ema"):
            flags = ("--weights", which) if which else ()
            done("checkpoint", "export", folder / "both", "--out", folder / f"file{which}.pth", *flags)
    key = {"var": "pos_start", "mar": "mask_token"}
    one = {which: torch.load(tmp_path / f"var/file{which}.pth")[key["var"]] for which in ("", "model", "ema")}
    assert torch.equal(one[""], one["ema"]) and torch.equal(one["model"] + 1, one["ema"])
    for which, raw_shift, averaged_shift in (("", 0, 1), ("model", 0, 0), ("ema", 1, 1)):
        file = torch.load(tmp_path / f"mar/file{which}.pth")
        assert torch.equal(file["model"][key["mar"]], raw["mask_token"] + raw_shift)
        assert torch.equal(file["model_ema"][key["mar"]], raw["mask_token"] + averaged_shift)


# What cannot be exported


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    first, *rest = result.stderr.strip().splitlines()
    assert first.startswith("error: ") and rest[-1].startswith("hint: ")
    for word in words:
        assert word in result.stderr


UNFIT = {
    "text": (FAMILIES["text"], "draws from captions", "classes"),
    "visual": (
        HIMAR.replace("[model]", '[model]\npivots = "visual"'),
        "published himar format: 2 tensors differ",
        "needs conditional_proj.weight",
    ),
    "sinusoidal": (
        HIMAR.replace("[model]", '[model]\nscale_vector = "sinusoidal"'),
        "no place for encoder.scale_vector.fc1.weight",
    ),
    "heads": (
        HIMAR.replace("[model]", '[model]\npivot_head = "transformer"\npivot_head_heads = 2'),
        "no place for pivot_head.blocks.0.attention.qkv.weight",
    ),
    "transformer-mar": (
        MAR.replace('dense_head = "mlp"', 'dense_head = "transformer"'),
        "published mar format",
    ),
    "oblong": (
        VAR.replace("4, 8]", "4, [8, 4]]").replace("\nsize = 16", "\nsize = [16, 8]"),
        "8x4",
        "squares",
    ),
    "leak-free": (HMAR + HMAR_REST + "leak_free = true\n", "before they are upsampled"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_of_another_build_is_refused(name: str, tmp_path: Path, save_random: Save) -> None:
    text, *words = UNFIT[name]
    run = checkpoint(tmp_path, text, save_random)
    refused(hmar("checkpoint", "export", run, "--out", tmp_path / "file.pth"), *words)
    assert not (tmp_path / "file.pth").exists()


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe("classifier-tiny")
    state = build_image_network(recipe).state_dict()
    shared: dict[str, Any] = {"class_names": (), "step": 1, "tokenizer_hash": ""}
    save_checkpoint(tmp_path / "run", recipe=recipe, weights={"model": state}, tokenizer=None, **shared)
    refused(hmar("checkpoint", "export", tmp_path / "run", "--out", tmp_path / "file.pth"), "classifier")


def test_mistakes_are_one_line_and_a_hint(tmp_path: Path, save_random: Save) -> None:
    run, file = checkpoint(tmp_path, HMAR + HMAR_REST, save_random), tmp_path / "file.pth"

    def export(*flags: object, out: Path = file, path: Path = run) -> Any:
        return hmar("checkpoint", "export", path, "--out", out, *flags)

    refused(export("--format", "var"), "to the format hmar, not var", "--format hmar")
    refused(export("--format", "kl"), "to the format msvq, not kl")
    refused(export("--weights", "ema"), "no weights 'ema'")
    refused(export("--base", file), "exists")
    refused(export("--base", file, path=run / "tokenizer"), "no masked branch", "leave out --base")
    refused(export(out=tmp_path / "file"), "cannot tell the kind of file", ".safetensors")
    refused(export(path=tmp_path / "nowhere"), "no such checkpoint")
    assert not file.exists()
    file.write_text("mine")
    refused(export(), "exists", "remove it")
    assert file.read_text() == "mine" and not list(tmp_path.glob(".*.tmp"))
