"""Published formats of MAR, Hi-MAR and KL-16: every key is read, training checkpoints never run code."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hmar_cli.builders import build_model, build_tokenizer
from hmar_cli.checkpoints.published import read_weights
from hmar_cli.checkpoints.published_masked import (
    kl_settings,
    read_kl,
    read_masked,
    require_alike,
    write_kl,
    write_masked,
)
from hmar_cli.errors import UserError
from hmar_cli.recipe import load_recipe

MANIFESTS = Path(__file__).parents[1] / "fixtures" / "manifests"
RECIPES = {
    f"{family}_{size}": f"{family}-{size[0]}"
    for family in ("mar", "himar")
    for size in ("base", "large", "huge")
}


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MANIFESTS / f"{name}.json").read_text())
    return found


def full_size(about: dict[str, Any]) -> dict[str, Tensor]:
    """The published state dict, without its numbers."""
    keys = dict(about["keys"])
    for stack, repeated in about["repeated"].items():
        keys |= {
            f"{stack}.{i}.{k}": v for i in range(repeated["count"]) for k, v in repeated["block"].items()
        }
    assert len(keys) == about["num_keys"]
    found = {k: torch.empty(shape, device="meta") for k, (shape, _) in keys.items()}
    assert sum(t.numel() for t in found.values()) == about["total_elements"]
    return found


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", RECIPES)
def test_full_size_models(name: str) -> None:
    about = manifest(name)
    imported = read_masked(full_size(about))
    derived = {"cond_diffloss.net.pos_embed", "cond_diffloss.net.c_pos_embed"}
    assert set(imported.derived) == (derived if name.startswith("himar") else set())
    assert len(imported.state) + len(imported.derived) == about["num_keys"]
    with torch.device("meta"):
        model = build_model(load_recipe(RECIPES[name]))
    assert shapes(model.state_dict()) == shapes(imported.state)
    positions = getattr(model.dense_head, "pos_embed", None)
    assert shapes(write_masked(imported.state, positions)) == shapes(full_size(about))
    assert trainable(model) == about["trainable_parameters"]


def test_full_size_tokenizer() -> None:
    about = manifest("kl16")
    state = full_size(about)
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(1)}
    imported = read_kl(state | loss)
    assert imported.unused == list(loss)
    settings = kl_settings(imported)
    assert settings == replace(load_recipe("kl-16").tokenizer, latent_scale=0.2325)
    with torch.device("meta"):
        tokenizer = build_tokenizer(settings)
    assert shapes(tokenizer.state_dict()) == shapes(imported.state)
    assert shapes(write_kl(imported.state)) == shapes(state)
    assert trainable(tokenizer) == about["trainable_parameters"] == about["total_elements"]


def test_attention_of_the_tokenizer_is_joined_in_order() -> None:
    state = full_size(manifest("kl16"))
    prefix = "encoder.mid.attn_1"
    for part in "kvq":  # in whatever order the file has them
        state[f"{prefix}.{part}.weight"] = torch.full((512, 512, 1, 1), float("qkv".index(part)))
        state[f"{prefix}.{part}.bias"] = torch.full((512,), float("qkv".index(part)))
    joined = read_kl(state).state
    for leaf in ("weight", "bias"):
        thirds = joined[f"{prefix}.qkv.{leaf}"].chunk(3)
        assert [third.unique().tolist() for third in thirds] == [[0.0], [1.0], [2.0]]
    del state[f"{prefix}.k.bias"]
    with pytest.raises(UserError, match=r"attn_1\.qkv\.bias needs q, k and v, found q, v"):
        read_kl(state)


@pytest.mark.parametrize(
    "key",
    [
        "encoder_blocks.0.attn.qkv.scale",
        "encoder_blocks.0.lora.weight",
        "diffloss.net.final_layer.norm.weight",
        "diffloss.net.res_blocks.0.mlp.1.weight",
        "cond_diffloss.net.y_embedder.weight",
        "pos_embed",
    ],
)
def test_an_unknown_key_is_named(key: str) -> None:
    state = full_size(manifest("himar_base")) | {key: torch.empty(1)}
    with pytest.raises(
        UserError, match=r"1 of \d+ keys don't belong to the published himar format"
    ) as caught:
        read_masked(state)
    assert caught.value.details == (key,)


def test_a_file_of_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="don't belong to the published mar format"):
        read_masked({"encoder.conv_in.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"no whole mar file: it has no class_embed\.weight"):
        read_masked({"fake_latent": torch.zeros(1, 8)})
    with pytest.raises(UserError, match="no whole kl file"):
        read_kl({"class_emb.weight": torch.zeros(1)})


# Training checkpoints


class Trap:
    """Pickles to a call that would leave a folder behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def training_checkpoint(**more: Any) -> dict[str, Any]:
    """A file as the published training code writes it."""
    linear = nn.Linear(2, 3)
    model = {f"module.{k}": v for k, v in linear.state_dict().items()}
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "model_ema": {k: nn.Parameter(v + 1) for k, v in linear.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(
            model="mar_base", blr=1e-4, cached_path=None, betas=[0.9, 0.95], resume=""
        ),
    } | more


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_gives_raw_and_averaged_weights(tmp_path: Path, zipped: bool) -> None:
    content = training_checkpoint()
    torch.save(content, tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
    weights = read_weights(tmp_path / "last.pth")
    assert list(weights) == ["model", "ema"]
    for name, key in (("model", "module.weight"), ("ema", "weight")):
        found = weights[name]["weight"]
        assert torch.equal(found, content["model" if name == "model" else "model_ema"][key].detach())
        assert not found.requires_grad
    # what was allowed for this file is so no more
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_averaged_weights_alone_are_the_weights(tmp_path: Path) -> None:
    torch.save({"model_ema": {"w": torch.ones(1)}, "epoch": 3}, tmp_path / "ema.pth")
    assert read_weights(tmp_path / "ema.pth") == {"model": {"w": torch.ones(1)}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "top", "args", "args list", "model", "epoch"])
def test_a_malicious_training_checkpoint_runs_no_code(tmp_path: Path, place: str, zipped: bool) -> None:
    target = tmp_path / "made"
    trap: Any = Trap(target)
    content: Any = {
        "whole": trap,
        "top": training_checkpoint(extra=trap),
        "args": training_checkpoint(args=argparse.Namespace(model="mar_base", resume=trap)),
        "args list": training_checkpoint(args=argparse.Namespace(betas=[{"a": (trap,)}])),
        "model": training_checkpoint(model={"weight": trap}),
        "epoch": training_checkpoint(epoch=trap),
    }[place]
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code: refused"):
        read_weights(tmp_path / "bad.pth")
    assert not target.exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert target.exists()  # the trap is one


def test_averaged_weights_of_another_model_are_refused() -> None:
    state = full_size(manifest("mar_base"))
    weights = {"model": read_masked(state), "ema": read_masked(state)}
    require_alike(weights)
    del weights["ema"].state["token_proj.bias"]
    weights["ema"].state["null_embed"] = torch.empty(3, device="meta")
    with pytest.raises(UserError, match="2 tensors differ") as caught:
        require_alike(weights)
    assert caught.value.details == ("null_embed", "token_proj.bias")
