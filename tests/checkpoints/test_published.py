"""Published formats: every key of the full-size files is read, unsafe files are refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.checkpoints.published import (
    Imported,
    merge,
    model_settings,
    read_file,
    read_msvq,
    read_transformer,
    split,
    tokenizer_settings,
    write_msvq,
    write_transformer,
)
from hmar_cli.errors import UserError
from hmar_cli.settings import Recipe

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "manifests"
TRANSFORMERS = [
    path.stem for path in sorted(MANIFESTS.glob("*.json")) if path.stem.startswith(("var", "hmar"))
]


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MANIFESTS / f"{name}.json").read_text())
    return found


def published_state(about: dict[str, Any]) -> dict[str, Tensor]:
    """The full-size state dict, without its numbers."""
    keys = dict(about["keys"])
    for stack, block in about["repeated"].items():
        keys |= {f"{stack}.{i}.{k}": v for i in range(block["count"]) for k, v in block["keys"].items()}
    assert len(keys) == about["state_keys"]
    return {
        k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for k, (shape, dtype) in keys.items()
    }


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_full_size_transformers(name: str) -> None:
    about = manifest(name)
    imported, published = read_transformer(published_state(about)), shapes(published_state(about))
    derived = {
        k for k in published_state(about) if k.endswith(("lvl_1L", "attn_bias_for_masking", "zero_k_bias"))
    }
    assert set(imported.derived) == derived
    assert len(imported.state) + len(derived) == about["state_keys"]
    if imported.format == "masked":
        state = {k: v for k, v in imported.state.items() if k != "masked.mask_embed"}
        imported = merge(Imported("next-scale", state), imported, about["config"]["n_layers_train"])
    settings, objective = model_settings(imported, "causal" if name.startswith("var") else "diagonal")
    sides = tuple(about["config"]["patch_nums"])
    recipe = Recipe(model=settings, objective=objective)
    recipe = Recipe(
        model=settings,
        objective=objective,
        tokenizer=type(recipe.tokenizer)(scales=sides),
    )
    with torch.device("meta"):
        model = build_model(recipe)
    assert shapes(model.state_dict()) == shapes(imported.state)
    state = split(imported.state)[1] if "mp" in name else imported.state
    assert shapes(write_transformer(state, recipe.scales.lengths, settings.pattern)) == published
    if "mp" not in name:
        assert sum(p.numel() for p in model.parameters()) == about["parameters"]


def test_full_size_tokenizer() -> None:
    about = manifest("vqvae-ch160v4096z32")
    imported = read_msvq(published_state(about))
    assert imported.derived == ["quantize.ema_vocab_hit_SV"]
    sides = tuple(about["config"]["v_patch_nums"])
    with torch.device("meta"):
        tokenizer = build_tokenizer(tokenizer_settings(imported, sides))
    assert shapes(tokenizer.state_dict()) == shapes(imported.state)
    assert shapes(write_msvq(imported.state, len(sides))) == shapes(published_state(about))
    assert sum(p.numel() for p in tokenizer.parameters()) == about["parameters"]


def test_unknown_keys_are_named() -> None:
    state = published_state(manifest("var-d16")) | {"blocks.0.lora.weight": torch.empty(1)}
    with pytest.raises(UserError, match=f"1 of {len(state)} keys") as caught:
        read_transformer(state)
    assert caught.value.details == ("blocks.0.lora.weight",)
    with pytest.raises(UserError, match="published msvq format"):
        read_msvq(state)


class Trap:
    """Pickles to a call that would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_files_never_run_code(tmp_path: Path) -> None:
    for name, content in {"a.pth": {"w": torch.ones(1), "args": Trap(tmp_path / "a")}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="refused"):
            read_file(tmp_path / name)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"w": Trap(tmp_path / "raw")}))
    with pytest.raises(UserError):
        read_file(tmp_path / "raw.pth")
    assert not (tmp_path / "a").exists() and not (tmp_path / "raw").exists()


def test_files_and_wrappers(tmp_path: Path) -> None:
    state = {"module.a": torch.arange(3.0), "module.b": torch.ones(2, 2)}
    expected = {"a": state["module.a"], "b": state["module.b"]}
    torch.save({"trainer": {"var_wo_ddp": state}, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "plain.pth")
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "safe.bin")
    for name in ("wrapped.pth", "plain.pth", "plain.safetensors", "safe.bin"):
        read = read_file(tmp_path / name)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut off")
    save_file({"a": torch.ones(9)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    (tmp_path / "page.pth").write_text("hello: a page that says that the file is not there")
    (tmp_path / "short.pth").write_bytes(b"\x80\x02.")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("missing", "cut", "page", "short", "empty", "list"):
        with pytest.raises(UserError):
            read_file(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="no readable checkpoint"):
        read_file(tmp_path / "cut.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name in ("picture.png", "page.pth", "empty.pth"):
        with pytest.raises(UserError, match="neither a PyTorch nor a safetensors file"):
            read_file(tmp_path / name)
