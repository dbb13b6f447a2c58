"""The published formats of MAR, Hi-MAR and their KL-16 tokenizer, read and written as in `published`.

Letters: P phases (1 in MAR, 2 in Hi-MAR), S pivots, N dense tokens, L = S + N, D width, w width of a head, C latent
channels.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hmar_cli.checkpoints.published import (
    FIRST,
    LAST,
    Imported,
    State,
    Table,
    convolution_settings,
    require_present,
)
from hmar_cli.errors import UserError
from hmar_cli.settings import Kl

KL16_SCALE = 0.2325
"""What the published models multiply KL-16's latents by; it is no part of the file."""

_KL = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\..+")
_KL_ATTENTION = re.compile(r"((?:encoder|decoder)\..*attn[\w.]*)\.(qkv|[qkv])\.(weight|bias)")

_WHOLE = {
    "fake_latent": "null_embed",
    "class_emb.weight": "class_embed.weight",
    "mask_token": "mask_token",
    "diffusion_pos_embed_learned": "head_pos_embed",
}
_LAYERS = {  # with weight and bias
    "z_proj": "token_proj",
    "z_proj_ln": "token_norm",
    "decoder_embed": "decoder_embed",
}
_STACK = {  # layers of encoder and decoder
    "norm": "norm",
    "blocks.#.norm1": "blocks.#.norm1",
    "blocks.#.norm2": "blocks.#.norm2",
    "blocks.#.attn.qkv": "blocks.#.attention.qkv",
    "blocks.#.attn.proj": "blocks.#.attention.proj",
    "blocks.#.mlp.fc1": "blocks.#.feed_forward.fc1",
    "blocks.#.mlp.fc2": "blocks.#.feed_forward.fc2",
}
_OUTPUT = {  # layers of both kinds of heads
    "final_layer.linear": "output",
    "final_layer.adaLN_modulation.1": "modulation",
}
_MLP = _OUTPUT | {
    "time_embed.mlp.0": "time_embed.fc1",
    "time_embed.mlp.2": "time_embed.fc2",
    "cond_embed": "condition",
    "input_proj": "input",
    "res_blocks.#.in_ln": "blocks.#.norm",
    "res_blocks.#.mlp.0": "blocks.#.fc1",
    "res_blocks.#.mlp.2": "blocks.#.fc2",
    "res_blocks.#.adaLN_modulation.1": "blocks.#.modulation",
}
_TRANSFORMER = _OUTPUT | {
    "t_embedder.mlp.0": "time_embed.fc1",
    "t_embedder.mlp.2": "time_embed.fc2",
    "c_embedder.proj": "condition",
    "x_embedder.proj": "input",
    "blocks.#.adaLN_modulation.1": "blocks.#.modulation",
    "blocks.#.attn.qkv": "blocks.#.attention.qkv",
    "blocks.#.attn.proj": "blocks.#.attention.proj",
    "blocks.#.mlp.fc1": "blocks.#.feed_forward.fc1",
    "blocks.#.mlp.fc2": "blocks.#.feed_forward.fc2",
}
_DERIVED = r"cond_diffloss\.net\.(c_)?pos_embed"
"""The transformer head's fixed sine table, and one that no output depends on."""


@cache
def masked_table(phases: int) -> Table:
    """The names and shapes of MAR (`phases` 1) or Hi-MAR (2)."""
    names, layers, stack = dict(_WHOLE), dict(_LAYERS), dict(_STACK)
    heads = {"diffloss": ("dense_head", _MLP)}
    if phases == 2:
        heads = {"diffloss": ("pivot_head", _MLP), "cond_diffloss": ("dense_head", _TRANSFORMER)}
        names["cond_tokens"] = "empty_pivots"
        layers |= {"cond_proj": "pivot_proj", "cond_z_proj": "conditional_proj"}
        stack["blocks_ada.1"] = "scale_vector.linear"
    for side in ("encoder", "decoder"):
        names[f"{side}_pos_embed_learned"] = f"{side}.pos_embed"
        layers |= {f"{side}_{published}": f"{side}.{ours}" for published, ours in stack.items()}
        if phases == 2:
            names[f"{side}_task_emb.weight"] = f"{side}.scale_vector.embed.weight"
            for part in ("scale", "shift"):
                names[f"{side}_blocks.#.adaLN_{part}"] = f"{side}.blocks.#.modulation.{part}"
    for place, (head, own) in heads.items():
        layers |= {f"{place}.net.{published}": f"{head}.{ours}" for published, ours in own.items()}
    names |= {f"{k}.{leaf}": f"{v}.{leaf}" for k, v in layers.items() for leaf in ("weight", "bias")}
    shapes = {
        r"coder\.pos_embed|mask_token": ((1, -1, LAST), (phases, -1, LAST)),  # phases apart from positions
        "head_pos_embed|empty_pivots": ((1, -1, LAST), (-1, LAST)),  # [L, D] and [S, C]
        "null_embed": ((1, -1), (-1,)),
        r"modulation\.(scale|shift)": ((FIRST, 1, 1, -1), (FIRST, -1)),  # [P, 4 D]
    }
    if phases == 2:  # a 1x1 convolution [w, C, 1, 1] is a linear layer [w, C]
        shapes[r"dense_head\.(input|condition)\.weight"] = ((FIRST, -1, 1, 1), (FIRST, -1))
    format = "himar" if phases == 2 else "mar"
    return Table(format, names, shapes, derived=_DERIVED, whole=True)


def read_masked(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published MAR or Hi-MAR; which of them it is, the pivots' tensors tell.

    Raises:
        UserError: keys that the format doesn't have, or not such a file.
    """
    table = masked_table(2 if "cond_tokens" in state else 1)
    imported = Imported(table.format, {})
    table.read(imported, state)
    require_present(imported, ("class_embed.weight", "encoder.pos_embed", "token_proj.weight"))
    return imported


def write_masked(state: Mapping[str, Tensor], positions: Tensor | None) -> State:
    """Name and shape a MAR or Hi-MAR as its authors do.

    Args:
        state: tensors by this project's names.
        positions: fixed positions [N, w] of a transformer head.

    Raises:
        UserError: a model of another build.
    """
    published = masked_table(2 if "empty_pivots" in state else 1).write(state)
    if positions is None:
        return published
    fixed = {"pos_embed": positions[None], "c_pos_embed": torch.zeros_like(positions)[None]}
    return published | {f"cond_diffloss.net.{name}": value for name, value in fixed.items()}


def require_alike(weights: Mapping[str, Imported]) -> None:
    """Refuse averaged weights that are not of the same tensors as the raw ones.

    Raises:
        UserError: one of the two lacks a tensor, or has another shape of it.
    """
    shapes = [{k: v.shape for k, v in each.state.items()} for each in weights.values()]
    differing = sorted({k for each in shapes for k in each if any(each[k] != o.get(k) for o in shapes)})
    if differing:
        raise UserError(
            f"the averaged weights do not fit the raw ones: {len(differing)} tensors differ",
            "download the file again",
            differing[:8],
        )


def read_kl(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published KL autoencoder; its attention's query, key and value are joined into one convolution.

    Whatever is no part of encoder and decoder, such as the discriminator of its training, is left out.

    Raises:
        UserError: not such a file, or attention with a part missing.
    """
    imported = Imported("kl", {})
    apart: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _KL_ATTENTION.fullmatch(key)
        if match and match[2] != "qkv":
            apart.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value.float()
        elif _KL.fullmatch(key):
            imported.state[key] = value.float()
        else:
            imported.unused.append(key)
    for target, parts in apart.items():
        if len(parts) < 3:
            raise UserError(
                f"this is no whole kl file: {target} needs q, k and v, found {', '.join(sorted(parts))}",
                "download the file again",
            )
        imported.state[target] = torch.cat([parts[name] for name in "qkv"])  # [3D] or [3D, D, 1, 1]
    require_present(imported, ("encoder.conv_in.weight", "encoder.down.0.block.0.conv2.weight"))
    require_present(imported, ("quant_conv.weight", "post_quant_conv.weight"))
    return imported


def write_kl(state: Mapping[str, Tensor]) -> State:
    """Name a KL autoencoder as its authors do: each attention's query, key and value are three convolutions."""
    published: State = {}
    for key, value in state.items():
        if match := _KL_ATTENTION.fullmatch(key):
            parts = zip(match[2], value.chunk(3), strict=True)
            published |= {f"{match[1]}.{name}.{match[3]}": part for name, part in parts}
        else:
            published[key] = value
    return published


def kl_settings(imported: Imported) -> Kl:
    """Read the settings of a KL autoencoder off its shapes; one of KL-16's stride and channels gets its scale.

    Args:
        imported: of format "kl".
    """
    state, convolutions = imported.state, convolution_settings(imported.state)
    last = len(convolutions["multipliers"]) - 1
    settings = Kl(
        **convolutions,
        z_channels=state["post_quant_conv.weight"].shape[0],
        attention=f"encoder.down.{last}.attn.0.qkv.weight" in state,
    )
    same = (settings.stride, settings.z_channels) == (Kl().stride, Kl().z_channels)
    return replace(settings, latent_scale=KL16_SCALE) if same else settings
