"""Readers of the published checkpoint formats of VAR, HMAR and their tokenizer.

Each format is a list of key patterns; a reader renames a published state dict to this project's names, reads the
settings off the shapes, and accounts for every key. Files are read without unpickling anything but tensors.
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hmar_cli.errors import UserError, first_line
from hmar_cli.settings import MaskedObjective, Msvq, NextScale, NextScaleObjective

State = dict[str, Tensor]

BROKEN = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
    struct.error,
    SafetensorError,
)
"""What reading a file can end in that is cut short, damaged, or no checkpoint at all."""

_ATTENTION = {
    "attn.mat_qkv.weight": "attention.qkv.weight",
    "attn.q_bias": "attention.q_bias",
    "attn.v_bias": "attention.v_bias",
    "attn.scale_mul_1H11": "attention.log_scale",
    "attn.proj.weight": "attention.proj.weight",
    "attn.proj.bias": "attention.proj.bias",
    "ffn.fc1.weight": "feed_forward.fc1.weight",
    "ffn.fc1.bias": "feed_forward.fc1.bias",
    "ffn.fc2.weight": "feed_forward.fc2.weight",
    "ffn.fc2.bias": "feed_forward.fc2.bias",
    "ada_lin.1.weight": "adaln.linear.weight",
    "ada_lin.1.bias": "adaln.linear.bias",
    "ada_gss": "adaln.offsets",
}
_WHOLE = {
    "pos_start": "start_embed",
    "pos_1LC": "pos_embed",
    "class_emb.weight": "class_embed.weight",
    "lvl_embed.weight": "level_embed.weight",
    "word_embed.weight": "word_embed.weight",
    "word_embed.bias": "word_embed.bias",
    "word_embed_bias": "word_embed.bias",
    "mask_embed.weight": "masked.mask_embed",
    "shared_ada_lin.1.weight": "shared_adaln.linear.weight",
    "shared_ada_lin.1.bias": "shared_adaln.linear.bias",
}
_HEAD = {
    "head_nm.ada_lin.1.weight": "head.adaln.linear.weight",
    "head_nm.ada_lin.1.bias": "head.adaln.linear.bias",
    "head.weight": "head.linear.weight",
    "head.bias": "head.linear.bias",
}
_RESHAPED = {"log_scale": (-1,), "mask_embed": (-1,), "adaln.offsets": (6, 1, -1)}
_DERIVED = re.compile(
    r"lvl_1L|attn_bias_for_masking|(\w*blocks\.\d+\.)?attn\.zero_k_bias|quantize\.ema_vocab_hit_SV"
)
"""Buffers that follow from the settings, or that no output depends on."""

_MSVQ = (
    (re.compile(r"quantize\.embedding\.weight"), r"quantizer.codebook.weight"),
    (re.compile(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(weight|bias)"), r"quantizer.phis.\1.\2"),
    (re.compile(r"quantize\.quant_resi\.qresi\.(weight|bias)"), r"quantizer.phis.0.\1"),
    (re.compile(r"((?:encoder|decoder|quant_conv|post_quant_conv)\..+)"), r"\1"),
)


@dataclass
class Imported:
    """A published state dict under this project's names.

    Attributes:
        format: "msvq", "next-scale" (VAR, or HMAR before masked finetuning), "masked" (HMAR's masked model alone),
            "merged" (HMAR's sampling model), "kl", "mar" or "himar".
        state: tensors by this project's names.
        derived: published keys that were left out because they follow from the settings.
        shared: keys of a masked model that were left out because its next-scale model has them.
        unused: keys that were left out because they only served training.
    """

    format: str
    state: State
    derived: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def masked_layers(self) -> int:
        """Blocks of the masked branch."""
        return 1 + max(
            (int(k.split(".")[2]) for k in self.state if k.startswith("masked.blocks.")), default=-1
        )


def read_file(path: Path) -> State:
    """Read the tensors of a published file: the raw weights, where it holds averaged ones too (`read_weights`).

    Raises:
        UserError: the file is missing, broken, would run code, or holds no state dict.
    """
    return read_weights(path)["model"]


def read_weights(path: Path) -> dict[str, State]:
    """Read the weights of a published file: safetensors, or a PyTorch file loaded with `weights_only`.

    A training checkpoint that wraps its state dict (`trainer.var_wo_ddp`, `trainer.hmar_wo_ddp`, `model`,
    `state_dict`) is unwrapped. What it holds beside is never used: moments, counters and the run's arguments, the
    only object beyond tensors and plain values that is let through.

    Returns:
        "model", and "ema" where a training checkpoint holds `model_ema`.

    Raises:
        UserError: the file is missing, broken, would run code, or holds no state dict.
    """
    loaded = _load(path)
    averaged = loaded.get("model_ema") if isinstance(loaded, dict) else None
    for wrapper in ("trainer", "model", "state_dict", "var_wo_ddp", "hmar_wo_ddp", "model_ema"):
        inner = loaded.get(wrapper) if isinstance(loaded, dict) else None
        if isinstance(inner, dict):
            loaded = inner
    sets = {"model": loaded}
    if averaged is not None and averaged is not loaded:
        sets["ema"] = averaged
    return {name: _state(path, found) for name, found in sets.items()}


def _state(path: Path, found: object) -> State:
    """A state dict without the prefixes of wrapped modules."""
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()) or not found:
        raise UserError(f"{path} holds no state dict", "expected a dictionary of tensors")
    return {re.sub(r"^(module|_orig_mod)\.", "", k): v.detach() for k, v in found.items()}


def _load(path: Path) -> object:
    """What a file holds; of a PyTorch file, tensors stay on the disk until they are used."""
    if not path.is_file():
        raise UserError(
            f"no such file: {path}", "download the published file first; imports never fetch anything"
        )
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{" and not head.startswith(
        (b"PK", b"\x80")
    ):  # a length and JSON; a zip file or a pickle
        raise UserError(
            f"{path} is neither a PyTorch nor a safetensors file", "give the file of weights itself"
        )
    try:
        if head[8:] == b"{":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # not so in files of PyTorch before 1.6
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds pickled objects beyond tensors, which could run code: refused",
            "keep only its state dict, on a machine where you trust the file",
        ) from error
    except BROKEN as error:
        raise UserError(
            f"{path} is no readable checkpoint: {first_line(error)}",
            "download the file again",
        ) from error


def read_msvq(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published multi-scale tokenizer.

    Raises:
        UserError: keys that the format doesn't have.
    """
    imported, unknown = Imported("msvq", {}), []
    for key, value in state.items():
        target = next((p.sub(to, key) for p, to in _MSVQ if p.fullmatch(key)), None)
        if target is not None:
            imported.state[target] = value.float()
        elif _DERIVED.fullmatch(key):
            imported.derived.append(key)
        else:
            unknown.append(key)
    require_known(unknown, len(state), "msvq")
    require_present(imported, ("encoder.conv_in.weight", "quantizer.codebook.weight"))
    return imported


def read_transformer(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published VAR or HMAR transformer; keys of a tokenizer inside it (`vae.`) are left out.

    Raises:
        UserError: keys that the format doesn't have.
    """
    merged = any(key.startswith("base_blocks.") for key in state)
    masked = "mask_embed.weight" in state and not merged
    imported = Imported("merged" if merged else "masked" if masked else "next-scale", {})
    lower = len({k.split(".")[1] for k in state if k.startswith("base_blocks.")})
    unknown = []
    for key, value in state.items():
        if key.startswith(("vae.", "vae_proxy.", "vae_local.")) or _DERIVED.fullmatch(key):
            imported.derived.append(key)
        elif (target := _transformer_key(key, lower)) is not None:
            shape = next((s for leaf, s in _RESHAPED.items() if target.endswith(leaf)), value.shape)
            imported.state[target] = value.float().reshape(shape)
        else:
            unknown.append(key)
    require_known(unknown, len(state), "transformer")
    require_present(imported, ("class_embed.weight", "pos_embed", "word_embed.weight", "head.linear.weight"))
    require_present(imported, ("blocks.0.attention.log_scale", "blocks.0.feed_forward.fc1.weight"))
    return imported


def _transformer_key(key: str, lower: int) -> str | None:
    """This project's name of a published transformer key; `lower` blocks are shared in the merged format."""
    if key in _WHOLE:
        return _WHOLE[key]
    if key in _HEAD:
        return _HEAD[key]
    if key.startswith("ns_head") and key[3:] in _HEAD:
        return _HEAD[key[3:]]
    if key.startswith("mask_head") and key[5:] in _HEAD:
        return "masked." + _HEAD[key[5:]]
    match = re.fullmatch(r"(base_|ns_|mask_|)blocks\.(\d+)\.(.+)", key)
    if match is None or match[3] not in _ATTENTION:
        return None
    index = int(match[2]) + (lower if match[1] == "ns_" else 0)
    return f"{'masked.' if match[1] == 'mask_' else ''}blocks.{index}.{_ATTENTION[match[3]]}"


def require_known(unknown: Sequence[str], count: int, format: str) -> None:
    """Refuse keys that a format doesn't have, naming the first of them; `count` is how many the file has in all."""
    if unknown:
        raise UserError(
            f"{len(unknown)} of {count} keys don't belong to the published {format} format",
            "check --format",
            [*unknown[:8], *(["..."] if len(unknown) > 8 else [])],
        )


def require_present(imported: Imported, names: Sequence[str]) -> None:
    """Refuse a file without the tensors that its settings are read off; loading finds whatever else is missing."""
    if missing := [name for name in names if name not in imported.state]:
        raise UserError(
            f"this is no whole {imported.format} file: it has no {', '.join(missing)}",
            "check --format, or download the file again",
        )


def merge(next_scale: Imported, masked: Imported, layers: int) -> Imported:
    """Join a next-scale model and a masked model into the sampling model (supplement D.3).

    Lower and late blocks, embeddings and the next-scale head come from the next-scale model; late blocks, head and
    mask embedding of the masked branch from the masked one.

    Args:
        next_scale: of format "next-scale".
        masked: of format "masked".
        layers: late blocks that masked finetuning trained.

    Raises:
        UserError: files of another kind or depth, or fewer blocks than `layers`.
    """
    state = dict(next_scale.state)
    depth = block_count(state)
    if next_scale.format != "next-scale" or block_count(masked.state) != depth:
        raise UserError(
            f"a masked model of {block_count(masked.state)} blocks cannot be merged with a {next_scale.format} "
            f"model of {depth}",
            "pass the next-scale file of the same size with --base",
        )
    if layers > depth:
        raise UserError(f"--masked-layers {layers}: the model has {depth} blocks")
    shared = []
    for key, value in masked.state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
        if match and int(match[1]) >= depth - layers:
            state[f"masked.blocks.{int(match[1]) - depth + layers}.{match[2]}"] = value
        elif key.startswith("head."):
            state[f"masked.{key}"] = value
        elif key == "masked.mask_embed":
            state[key] = value
        else:
            shared.append(key)
    return Imported("merged", state, [*next_scale.derived, *masked.derived], shared)


def block_count(state: Mapping[str, Tensor]) -> int:
    """Number of blocks of the next-scale branch."""
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))


def model_settings(
    imported: Imported, pattern: str
) -> tuple[NextScale, NextScaleObjective | MaskedObjective]:
    """Read the settings of a transformer off its shapes.

    Args:
        imported: of format "next-scale" or "merged".
        pattern: "causal" or "diagonal", which no shape tells.
    """
    state = imported.state
    classes, width = state["class_embed.weight"].shape
    heads = state["blocks.0.attention.log_scale"].numel()
    model = NextScale(
        pattern="causal" if pattern == "causal" else "diagonal",
        depth=block_count(state),
        width=width,
        heads=heads,
        mlp_ratio=state["blocks.0.feed_forward.fc1.weight"].shape[0] / width,
        shared_adaln="shared_adaln.linear.weight" in state,
        num_classes=classes - 1,
    )
    if imported.format == "merged":
        return model, MaskedObjective(layers=imported.masked_layers)
    return model, NextScaleObjective(weighting="none" if pattern == "causal" else "lognormal")


def tokenizer_settings(imported: Imported, scales: tuple[int | tuple[int, int], ...]) -> Msvq:
    """Read the settings of a tokenizer off its shapes.

    Args:
        imported: of format "msvq".
        scales: sides of the scales, which no shape tells.
    """
    state = imported.state
    vocab_size, z_channels = state["quantizer.codebook.weight"].shape
    return Msvq(
        **convolution_settings(state),
        z_channels=z_channels,
        vocab_size=vocab_size,
        scales=scales,
        phi_count=len({k.split(".")[2] for k in state if k.startswith("quantizer.phis.")}),
    )


def convolution_settings(state: State) -> dict[str, Any]:
    """Read what both kinds of tokenizers set of their encoder off its shapes: its channels, levels and blocks."""
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "res_blocks": 1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down.0.block.")),
    }
