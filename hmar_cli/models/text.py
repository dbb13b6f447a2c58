"""Captions as conditions: a frozen CLIP text tower, or a text transformer that is trained with the model.

Both are open_clip's own text transformer and give one vector for every token of a caption, after the final norm
and without pooling (Hi-MAR section 4.1: the sequence takes the place of the class tokens).

Letters: B captions, T tokens of a caption (its context length), W width of the text transformer.
"""

import functools
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 49408
"""Tokens that open_clip's bundled tokenizer knows; ids fit into 16 bits."""
FILE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}
"""Only OpenAI's own files have them; their models use the quick form of GELU."""


def tokenize(captions: Sequence[str], context_length: int) -> Tensor:
    """Turn captions into ids with open_clip's bundled tokenizer: start, words, end, zeros.

    Args:
        captions: n texts; what does not fit is cut off before the end token.
        context_length: T.

    Returns:
        [n, T] int64, below `VOCABULARY`.
    """
    if not captions:
        return torch.zeros(0, context_length, dtype=torch.int64)
    return _simple_tokenizer()(list(captions), context_length=context_length)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)
def _simple_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class JointTextEncoder(nn.Module):
    """open_clip's text transformer with fresh weights, to be trained with the image model.

    Every token sees the whole caption. There is no projection and no pooling, so every parameter is used.

    Args:
        width: W.
        depth: blocks.
        heads: attention heads.
        context_length: T.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, *, width: int, depth: int, heads: int, context_length: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that {heads} heads divide, got {width}")
        from open_clip.transformer import TextTransformer

        self.width, self.context_length = width, context_length
        self.tower = TextTransformer(
            context_length=context_length,
            vocab_size=VOCABULARY,
            width=width,
            heads=heads,
            layers=depth,
            no_causal_mask=True,
            output_tokens=True,
        )
        self.tower.text_projection = None

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids [B, T] int64 as [B, T, W]."""
        return _hidden_states(self.tower, ids, self.context_length)


class ClipTextEncoder(nn.Module):
    """A frozen CLIP text tower (Radford et al. 2021) of open_clip; see `from_pretrained`.

    Args:
        tower: open_clip's text transformer.
        tokenizer: from captions to ids [n, T].
    """

    def __init__(self, tower: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        tower.output_tokens = True  # type: ignore[assignment]  # open_clip's switch for unpooled output
        tower.text_projection = None  # type: ignore[assignment]
        self.tower = tower
        self.width = int(tower.width)  # type: ignore[arg-type]
        self.context_length = int(tower.context_length)  # type: ignore[arg-type]
        self._tokenizer = tokenizer
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, tower: str, weights: str) -> "ClipTextEncoder":
        """Load a tower; only its text part is built.

        Args:
            tower: a name of open_clip, such as "ViT-L-14".
            weights: a tag of open_clip, whose file it downloads, or a local file: a state dict of the whole model
                or of its text part, in open_clip's or OpenAI's names, as .safetensors or written by
                `torch.save`. Files of OpenAI use the quick form of GELU; where other names hide that a file is
                theirs, choose the tower "…-quickgelu".

        Raises:
            ValueError: an unknown tower or tag (the choices are in the message), a tower whose text part is not
                open_clip's own, or a file that holds other weights or more than tensors.
            FileNotFoundError: no such file.
            ConnectionError: a tag's file cannot be downloaded.
        """
        import open_clip

        config = tower_config(tower)
        path, quick_gelu = Path(weights).expanduser(), bool(config.get("quick_gelu", False))
        if path.is_file():
            state = read_state(path)
            quick_gelu |= bool(state.keys() & OPENAI_KEYS)
        elif path.suffix in FILE_SUFFIXES or "/" in weights:
            raise FileNotFoundError(f"no such file: {weights}")
        else:
            known = open_clip.list_pretrained_tags_by_model(tower)
            tag = open_clip.get_pretrained_cfg(tower, weights)
            if not tag:
                raise ValueError(
                    f"expected one of the weights of {tower}, {', '.join(known)}, got {weights!r}"
                )
            quick_gelu |= bool(tag.get("quick_gelu", False))
            state = read_state(download(tag, f"{tower} {weights}"))
        text = _build_tower(config, quick_gelu)
        _load_text(text, state, str(path) if path.is_file() else f"{tower} {weights}")
        return cls(text, tokenizer_of(tower))

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Turn n captions into ids [n, T] int64; what does not fit is cut off before the end token."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        return self._tokenizer(list(captions))

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids [B, T] int64 as [B, T, W]: what the last block says, after the final norm."""
        return _hidden_states(self.tower, ids, self.context_length)


def tower_size(tower: str) -> tuple[int, int]:
    """Context length T and width W of a tower of open_clip, without loading it.

    Raises:
        ValueError: an unknown tower, or one whose text part is not open_clip's own.
    """
    text = tower_config(tower)["text_cfg"]
    return int(text.get("context_length", 77)), int(text.get("width", 512))


def _hidden_states(tower: nn.Module, ids: Tensor, context_length: int) -> Tensor:
    if ids.ndim != 2 or ids.shape[1] != context_length:
        raise ValueError(f"expected ids [B, {context_length}], got {tuple(ids.shape)}")
    _, tokens = tower(ids)  # [B, T] -> pooled, [B, T, W]
    if getattr(tower, "cls_emb", None) is not None:  # CoCa's towers norm what they pool alone
        tokens = tower.ln_final(tokens)  # type: ignore[operator]
    return tokens  # type: ignore[no-any-return]


def tower_config(tower: str) -> Mapping[str, Any]:
    """What open_clip knows of a tower.

    Raises:
        ValueError: an unknown tower, or one whose text part is not open_clip's own.
    """
    import difflib

    import open_clip

    config = open_clip.get_model_config(tower)
    if config is None:
        names = open_clip.list_models()
        near = difflib.get_close_matches(tower, names, 5, 0.5) or ["ViT-B-32", "ViT-L-14"]
        raise ValueError(f"expected a tower of open_clip such as {', '.join(near)}, got {tower!r}")
    if "hf_model_name" in config["text_cfg"]:
        raise ValueError(
            f"expected a tower with open_clip's own text transformer, got {tower!r}, which has not"
        )
    return config  # type: ignore[no-any-return]


def download(tag: Mapping[str, Any], name: str) -> Path:
    """The file of a tag's weights, which open_clip downloads once.

    Raises:
        ConnectionError: it cannot be downloaded; the message says where it is published.
    """
    import open_clip

    hub = str(tag.get("hf_hub", "")).strip("/")
    place = f"https://huggingface.co/{hub}" if hub else str(tag.get("url", ""))
    log = logging.getLogger("huggingface_hub")  # which tells of every try
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of {name} cannot be downloaded{' from ' * bool(place)}{place}: {_first_line(error)}"
        ) from error
    finally:
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    """The first line of what an exception says; its kind, where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _build_tower(config: Mapping[str, Any], quick_gelu: bool) -> nn.Module:
    from open_clip.model import _build_text_tower

    text = dict(config["text_cfg"])
    return _build_text_tower(config["embed_dim"], text, quick_gelu=quick_gelu)  # type: ignore[no-any-return]


def tokenizer_of(tower: str) -> Callable[[list[str]], Tensor]:
    """What turns n captions into a tower's ids [n, T].

    Raises:
        ValueError: it needs a package that is not there.
    """
    import open_clip

    try:
        return open_clip.get_tokenizer(tower)  # type: ignore[no-any-return]
    except ImportError as error:  # some towers have a tokenizer of the package transformers
        raise ValueError(f"the tokenizer of {tower} cannot be had: {error}") from error


def read_state(path: Path, skip: str = "visual.") -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors.

    Args:
        path: a file that `torch.save` wrote, or .safetensors.
        skip: of a .safetensors file, the beginning of the names that are not read; empty for none.

    Raises:
        ValueError: another file.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path, skip)
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as file:
            if any(name.endswith("/constants.pkl") for name in file.namelist()):
                raise ValueError(
                    f"expected a state dict, got a TorchScript program in {path}; if you trust it, save "
                    "torch.jit.load(FILE).state_dict() with torch.save"
                )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"expected tensors alone in {path}: {_first_line(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"expected a state dict in {path}, got {type(state).__name__}")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _read_safetensors(path: Path, skip: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not (skip and name.startswith(skip))]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"expected a .safetensors file, got {path}: {error}") from error


def _load_text(tower: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the text part of a model's weights; each of them must have its place and fit."""
    prefix = "text." if "text.positional_embedding" in state else ""
    unused = {"attn_mask", "text_projection", "text_projection.weight", "text_projection.bias"}
    wanted = {name: value for name, value in tower.state_dict().items() if name not in unused}
    parts = {name.split(".")[0] for name in wanted}
    found = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in parts
    }
    for name in sorted(wanted.keys() ^ found.keys()):
        raise ValueError(f"{origin}: {'no' if name in wanted else 'an unknown'} text weight {name}")
    for name, value in wanted.items():
        if not isinstance(found[name], Tensor) or found[name].shape != value.shape:
            shape = tuple(getattr(found[name], "shape", ()))
            raise ValueError(f"{origin}: expected {name} of {tuple(value.shape)}, got {shape}")
    tower.load_state_dict(found, strict=False)
