"""Text towers, compared with what open_clip itself makes of the same weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from hmar_cli.builders import build_model
from hmar_cli.errors import UserError
from hmar_cli.models.text import (
    VOCABULARY,
    ClipTextEncoder,
    JointTextEncoder,
    tokenize,
    tower_config,
    tower_size,
)
from hmar_cli.recipe import load_recipe

CAPTIONS = ["a red circle left of a blue square", "", "an orange book, flat style " * 20]
TEXT = {"context_length": 12, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2}
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": TEXT,
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny towers among those that open_clip knows."""
    folder = tmp_path_factory.mktemp("towers")
    coca = {**TINY, "multimodal_cfg": {**TEXT, "layers": 1}, "custom_text": True}
    coca["text_cfg"] = {**TEXT, "embed_cls": True, "output_tokens": True}
    for name, config in {
        "tiny": TINY,
        "tiny-quickgelu": {**TINY, "quick_gelu": True},
        "tiny-coca": coca,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture
def model(towers: None) -> Any:
    torch.manual_seed(0)
    return open_clip.create_model("tiny").eval()


def pooled(encoder: ClipTextEncoder, ids: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """What CLIP makes of the hidden states: that of the end token (the largest id), projected."""
    hidden = encoder(ids)
    assert hidden.shape == (*ids.shape, encoder.width)
    return hidden[torch.arange(len(ids)), ids.argmax(dim=1)] @ projection


def test_ids_are_those_of_clip() -> None:
    ids = tokenize(CAPTIONS, 12)
    assert ids.dtype == torch.int64 and ids.shape == (3, 12)
    assert tokenize(["Hello  world!"], 6).tolist() == [
        [49406, 3306, 1002, 256, 49407, 0]
    ]  # as CLIP publishes it
    assert ids[0, 0] == 49406 and ids[0, 9:].tolist() == [49407, 0, 0]  # a token a word
    assert ids[0, 1] == ids[0, 6]  # "a"
    assert ids[1].tolist() == [49406, 49407] + [0] * 10
    assert ids[2, -1] == 49407 and (ids[2] > 0).all()  # cut off, but ended
    assert int(ids.max()) < VOCABULARY <= 2**16
    assert tokenize([], 12).shape == (0, 12)


def whole(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def wrapped(state: dict[str, Any], path: Path) -> None:
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)


def text_alone(state: dict[str, Any], path: Path) -> None:
    save_file({key: value for key, value in state.items() if not key.startswith("visual.")}, path)


def custom_names(state: dict[str, Any], path: Path) -> None:
    custom = {key if key.startswith(("visual.", "logit")) else f"text.{key}": v for key, v in state.items()}
    save_file(custom, path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (whole, "whole.pt"),
        (wrapped, "wrapped.pth"),
        (text_alone, "text.safetensors"),
        (custom_names, "c.safetensors"),
    ],
)
def test_a_local_file_gives_what_open_clip_gives(
    model: Any, tmp_path: Path, write: Callable[[dict[str, Any], Path], None], name: str
) -> None:
    write(model.state_dict(), tmp_path / name)
    encoder = ClipTextEncoder.from_pretrained("tiny", str(tmp_path / name))
    assert (encoder.width, encoder.context_length) == (64, 12)
    ids = encoder.tokenize(CAPTIONS)
    assert torch.equal(ids, tokenize(CAPTIONS, 12))
    with torch.no_grad():
        expected = model.encode_text(ids)
    torch.testing.assert_close(pooled(encoder, ids, model.text_projection), expected)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(ids).requires_grad


def test_a_file_of_openai_has_the_quick_gelu(model: Any, tmp_path: Path) -> None:
    from open_clip.model import build_model_from_openai_state_dict

    extra = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12)}
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({**state, **extra, "vocab_size": torch.tensor(VOCABULARY)}, tmp_path / "openai.pt")
    theirs = build_model_from_openai_state_dict(dict(state)).float()
    encoder = ClipTextEncoder.from_pretrained("tiny", str(tmp_path / "openai.pt"))
    ids = encoder.tokenize(CAPTIONS)
    with torch.no_grad():
        expected, plain = theirs.encode_text(ids), model.encode_text(ids)
    found = pooled(encoder, ids, theirs.text_projection)
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 100 * (found - expected).abs().max()
    torch.save(state, tmp_path / "renamed.pt")  # without the marks of OpenAI, the tower's name says it
    named = ClipTextEncoder.from_pretrained("tiny-quickgelu", str(tmp_path / "renamed.pt"))
    assert torch.equal(named(ids), encoder(ids))


def test_the_hidden_states_of_coca_are_normed_too(towers: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    coca = open_clip.create_model("tiny-coca").eval()
    with torch.no_grad():
        coca.text.ln_final.bias.fill_(3.0)
    torch.save(coca.state_dict(), tmp_path / "coca.pt")
    encoder = ClipTextEncoder.from_pretrained("tiny-coca", str(tmp_path / "coca.pt"))
    hidden = encoder(encoder.tokenize(CAPTIONS))
    assert hidden.shape == (3, 12, 64)
    torch.testing.assert_close(hidden.mean(dim=-1), torch.full((3, 12), 3.0))
    torch.testing.assert_close(hidden.var(dim=-1, unbiased=False), torch.ones(3, 12), rtol=1e-3, atol=0)


def test_a_tag_is_downloaded_by_open_clip(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(model.state_dict(), tmp_path / "file.pt")
    tags = {"openai": {"quick_gelu": True}, "laion": {"quick_gelu": False}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda tower: list(tags))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda tower, tag: tags.get(tag, {}))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(tmp_path / "file.pt"))
    plain, quick = (ClipTextEncoder.from_pretrained("tiny", tag) for tag in ("laion", "openai"))
    ids = plain.tokenize(CAPTIONS)
    with torch.no_grad():
        expected = model.encode_text(ids)
    torch.testing.assert_close(pooled(plain, ids, model.text_projection), expected)
    assert not torch.allclose(quick(ids), plain(ids))

    def offline(tag: object) -> str:
        raise FileNotFoundError("Failed to download file")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ConnectionError, match="tiny openai cannot be downloaded: Failed"):
        ClipTextEncoder.from_pretrained("tiny", "openai")


def test_the_size_of_a_tower_is_known_without_its_weights() -> None:
    assert tower_size("ViT-L-14") == (77, 768)
    with pytest.raises(ValueError, match="ViT-L-14"):
        tower_size("ViT-L14")
    with pytest.raises(ValueError, match="roberta-ViT-B-32"):
        tower_size("roberta-ViT-B-32")


def test_unknown_towers_tags_and_files(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ViT-B-32.*got 'ViT-B32'"):
        ClipTextEncoder.from_pretrained("ViT-B32", "openai")
    with pytest.raises(ValueError, match=r"openai, .*got 'openia'"):
        ClipTextEncoder.from_pretrained("ViT-L-14", "openia")
    for missing in ("nowhere.pt", "folder/weights"):
        with pytest.raises(FileNotFoundError, match=missing):
            ClipTextEncoder.from_pretrained("ViT-L-14", missing)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for broken in ("noise.pt", "noise.safetensors"):
        with pytest.raises(ValueError, match="expected"):
            ClipTextEncoder.from_pretrained("tiny", str(tmp_path / broken))


def test_weights_of_another_text_part_are_refused(model: Any, tmp_path: Path) -> None:
    state = dict(model.state_dict())
    norm, long = state["ln_final.bias"], torch.zeros(77, 64)
    cases = {
        "no text weight ln_final.bias": {k: v for k, v in state.items() if k != "ln_final.bias"},
        "an unknown text weight transformer.resblocks.2": {
            **state,
            "transformer.resblocks.2.ln_1.bias": norm,
        },
        r"expected positional_embedding of \(12, 64\), got \(77, 64\)": {
            **state,
            "positional_embedding": long,
        },
    }
    for message, broken in cases.items():
        torch.save(broken, tmp_path / "broken.pt")
        with pytest.raises(ValueError, match=message):
            ClipTextEncoder.from_pretrained("tiny", str(tmp_path / "broken.pt"))


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_pickle_runs_no_code(model: Any, tmp_path: Path) -> None:
    target = tmp_path / "made"
    for legacy in (False, True):
        torch.save(
            {**model.state_dict(), "args": Payload(target)},
            tmp_path / "evil.pt",
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(ValueError, match="expected tensors alone"):
            ClipTextEncoder.from_pretrained("tiny", str(tmp_path / "evil.pt"))
    assert not target.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert target.is_dir()  # the file was dangerous


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_a_torchscript_program_is_refused(towers: None, tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"TorchScript program.*state_dict\(\)"):
        ClipTextEncoder.from_pretrained("tiny", str(tmp_path / "program.pt"))


def test_the_joint_encoder_trains_all_that_it_has() -> None:
    torch.manual_seed(0)
    encoder = JointTextEncoder(width=32, depth=2, heads=2, context_length=12)
    ids = tokenize(CAPTIONS, 12)
    hidden = encoder(ids)
    assert hidden.shape == (3, 12, 32) and hidden.dtype == torch.float32
    (hidden * torch.randn_like(hidden)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert set(encoder.state_dict()) == set(gradients)  # no buffers, no projection
    assert (encoder.width, encoder.context_length) == (32, 12)


def test_every_token_of_the_joint_encoder_sees_the_whole_caption() -> None:
    torch.manual_seed(0)
    encoder = JointTextEncoder(width=32, depth=2, heads=2, context_length=12)
    first, last = encoder(tokenize(["a red circle", "a red square"], 12)).detach()
    assert (first - last).abs().amax(dim=-1).min() > 1e-4


def test_wrong_arguments_of_the_joint_encoder() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        JointTextEncoder(width=32, depth=1, heads=3, context_length=12)
    encoder = JointTextEncoder(width=32, depth=1, heads=2, context_length=12)
    with pytest.raises(ValueError, match=r"\[B, 12\], got \(1, 8\)"):
        encoder(torch.zeros(1, 8, dtype=torch.int64))


def test_a_recipe_with_an_unknown_tower_is_told_in_one_line():
    with pytest.raises(UserError, match=r"text\.tower: expected a tower of open_clip .* got 'ViT-X'"):
        build_model(load_recipe("himar-s-coco", ["text.tower=ViT-X"]))
    with pytest.raises(ValueError, match=r"such as ViT-B-32, ViT-L-14, got 'none'$"):  # near to none of 150
        tower_config("none")
