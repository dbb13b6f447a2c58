"""The published checkpoint formats of VAR, HMAR and their tokenizer, read and written.

Each format is a table of names and shapes that is read in either direction. A reader renames a published state dict
to this project's names, reads the settings off the shapes, and accounts for every key; a writer goes the other way
and adds the buffers that follow from the settings. Files are read without unpickling anything but tensors.
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

FIRST, LAST = -2, -3
"""In shapes of a `Table`: the length of a tensor's first or last axis. -1 is what is left."""

_BLOCK = {
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
_SHAPES = {
    "log_scale": ((1, -1, 1, 1), (-1,)),
    "mask_embed": ((1, -1), (-1,)),
    "adaln.offsets": ((1, 1, 6, -1), (6, 1, -1)),
}
_DERIVED = r"(vae|vae_proxy|vae_local)\..+|lvl_1L|attn_bias_for_masking|(\w*blocks\.\d+\.)?attn\.zero_k_bias"
"""A tokenizer inside a model's file, and buffers that follow from the settings."""


@dataclass(frozen=True)
class Table:
    """How a published format names and shapes this project's tensors, read in either direction.

    Attributes:
        format: its name, for messages.
        names: published names and this project's; # is the number of a block or a phi. Of several published names of
            one tensor, the last is written.
        shapes: by the end of this project's name, the published shape and this project's, where they differ.
        same: pattern of names that are the same in both.
        derived: pattern of published names that are not read.
        whole: no model of the format lacks one of the names.
    """

    format: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    same: str = "(?!)"
    derived: str = "(?!)"
    whole: bool = False

    def ours(self, key: str) -> str | None:
        """This project's name of a published one; None if there is none."""
        return self._rename(key, self.names)

    def read(self, imported: "Imported", state: Mapping[str, Tensor]) -> None:
        """Put published tensors into `imported`, under this project's names and in its shapes.

        Raises:
            UserError: names that the format doesn't have.
        """
        unknown = []
        for key, value in state.items():
            if re.fullmatch(self.derived, key):
                imported.derived.append(key)
            elif (target := self.ours(key)) is not None:
                imported.state[target] = self._reshape(value.float(), target, 1)
            else:
                unknown.append(key)
        require_known(unknown, len(state), self.format)

    def write(self, state: Mapping[str, Tensor]) -> State:
        """This project's tensors under their published names and in the published shapes.

        Raises:
            UserError: tensors that the format has no place for, or others that it needs.
        """
        names = {ours: published for published, ours in self.names.items()}
        written, unfit = {}, []
        for key, value in state.items():
            if (target := self._rename(key, names)) is not None:
                written[target] = self._reshape(value, key, 0)
            else:
                unfit.append(f"no place for {key}")
        if self.whole:
            unfit += [f"needs {name}" for name in names if name.replace("#", "0") not in state]
        if unfit:
            raise UserError(
                f"this model does not fit the published {self.format} format: {len(unfit)} tensors differ",
                "only models that are built as the published ones can be exported",
                [*unfit[:8], *(["..."] if len(unfit) > 8 else [])],
            )
        return written

    def _rename(self, key: str, names: Mapping[str, str]) -> str | None:
        if key in names or re.fullmatch(self.same, key):
            return names.get(key, key)
        number = re.search(r"(?<=blocks\.)\d+|(?<=phis\.)\d+|(?<=qresi_ls\.)\d+", key)
        target = number and names.get(f"{key[: number.start()]}#{key[number.end() :]}")
        return target.replace("#", number[0]) if number and target else None

    def _reshape(self, value: Tensor, ours: str, side: int) -> Tensor:
        """A tensor in its published shape (side 0) or this project's (side 1)."""
        shapes = (pair[side] for end, pair in self.shapes.items() if re.search(f"({end})$", ours))
        axes = {FIRST: value.shape[:1], LAST: value.shape[-1:]}
        return value.reshape([size for n in next(shapes, value.shape) for size in axes.get(n, (n,))])


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


def _msvq_table(state: Mapping[str, Tensor]) -> Table:
    """The names of a tokenizer whose phis are several, or are one."""
    one = any(".qresi." in key for key in state) or sum(".phis." in key for key in state) == 2
    theirs, ours = ("qresi", "phis.0") if one else ("qresi_ls.#", "phis.#")
    names = {
        f"quantize.quant_resi.{theirs}.{leaf}": f"quantizer.{ours}.{leaf}" for leaf in ("weight", "bias")
    }
    names["quantize.embedding.weight"] = "quantizer.codebook.weight"
    same = r"(encoder|decoder|quant_conv|post_quant_conv)\..+"
    return Table("msvq", names, same=same, derived=r"quantize\.ema_vocab_hit_SV")


def read_msvq(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published multi-scale tokenizer.

    Raises:
        UserError: keys that the format doesn't have.
    """
    imported = Imported("msvq", {})
    _msvq_table(state).read(imported, state)
    require_present(imported, ("encoder.conv_in.weight", "quantizer.codebook.weight"))
    return imported


def write_msvq(state: Mapping[str, Tensor], scales: int) -> State:
    """Name a multi-scale tokenizer as its authors do; how often training met each code, nobody counted."""
    codes = len(state["quantizer.codebook.weight"])
    return _msvq_table(state).write(state) | {"quantize.ema_vocab_hit_SV": torch.zeros(scales, codes)}


def transformer_table(format: str) -> Table:
    """The names of a transformer.

    Args:
        format: "next-scale", "masked" or "merged"; of the last, next-scale blocks that the masked branch has copies
            of are called "late_blocks" here, numbered from 0.
    """
    stacks, heads = {"blocks": "blocks"}, {"": ""}
    if format == "merged":
        stacks = {"base_blocks": "blocks", "ns_blocks": "late_blocks", "mask_blocks": "masked.blocks"}
        heads = {"ns_": "", "mask_": "masked."}
    biases = ["word_embed.bias", "word_embed_bias"]
    names = _WHOLE | dict.fromkeys(biases[::-1] if format == "next-scale" else biases, "word_embed.bias")
    for published, ours in stacks.items():
        names |= {f"{published}.#.{k}": f"{ours}.#.{v}" for k, v in _BLOCK.items()}
    for published, ours in heads.items():
        names |= {published + k: ours + v for k, v in _HEAD.items()}
    return Table("transformer", names, _SHAPES, derived=_DERIVED)


def read_transformer(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published VAR or HMAR transformer; keys of a tokenizer inside it (`vae.`) are left out.

    Raises:
        UserError: keys that the format doesn't have.
    """
    lower = len({k.split(".")[1] for k in state if k.startswith("base_blocks.")})
    merged, masked = any(k.startswith("mask_blocks.") for k in state), "mask_embed.weight" in state
    imported = Imported("merged" if merged else "masked" if masked else "next-scale", {})
    transformer_table(imported.format).read(imported, state)
    imported.state = _renumber(imported.state, "late_blocks", "blocks", lower)
    require_present(imported, ("class_embed.weight", "pos_embed", "word_embed.weight", "head.linear.weight"))
    require_present(imported, ("blocks.0.attention.log_scale", "blocks.0.feed_forward.fc1.weight"))
    return imported


def write_transformer(state: State, lengths: Sequence[int], pattern: str) -> State:
    """Name and shape a transformer as its authors do: whole, or one of those that `split` returns.

    Args:
        state: tensors by this project's names.
        lengths: tokens of each scale.
        pattern: "causal" or "diagonal".
    """
    layers = Imported("", state).masked_layers
    format = "merged" if layers else "masked" if "masked.mask_embed" in state else "next-scale"
    lower = block_count(state) - layers
    published = transformer_table(format).write(_renumber(state, "blocks", "late_blocks", -lower))
    level = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [L]
    seen = level[:, None] >= level if pattern == "causal" else level[:, None] == level  # [L, L]
    bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    published |= {"lvl_1L": level[None], "attn_bias_for_masking": bias[None, None]}
    biases = {k: v for k, v in published.items() if k.endswith("attn.q_bias")}
    return published | {k.replace("q_bias", "zero_k_bias"): torch.zeros_like(v) for k, v in biases.items()}


def _renumber(state: State, old: str, new: str, shift: int) -> State:
    """Call block i of the stack `old` block i + shift of `new`, unless that is below 0."""

    def moved(block: re.Match[str]) -> str:
        number = int(block[1]) + shift
        return f"{new}.{number}" if number >= 0 else block[0]

    return {re.sub(rf"^{re.escape(old)}\.(\d+)", moved, key): value for key, value in state.items()}


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
    depth = block_count(next_scale.state)
    if next_scale.format != "next-scale" or block_count(masked.state) != depth:
        raise UserError(
            f"a masked model of {block_count(masked.state)} blocks cannot be merged with a {next_scale.format} "
            f"model of {depth}",
            "pass the next-scale file of the same size with --base",
        )
    if layers > depth:
        raise UserError(f"--masked-layers {layers}: the model has {depth} blocks")
    renamed = _renumber(masked.state, "blocks", "masked.blocks", layers - depth)
    renamed = {re.sub(r"^head\.", "masked.head.", key): value for key, value in renamed.items()}
    own = {key: value for key, value in renamed.items() if key.startswith("masked.")}
    derived = [*next_scale.derived, *masked.derived]
    return Imported("merged", next_scale.state | own, derived, [key for key in renamed if key not in own])


def split(state: State) -> tuple[State, State]:
    """Part a sampling model into the next-scale model and the masked model that `merge` joins."""
    next_scale = {key: value for key, value in state.items() if not key.startswith("masked.")}
    lower = block_count(state) - Imported("", state).masked_layers
    own = {key: value for key, value in state.items() if key not in next_scale}
    own = _renumber(own, "masked.blocks", "blocks", lower)
    return next_scale, next_scale | {re.sub(r"^masked\.head", "head", k): v for k, v in own.items()}


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
