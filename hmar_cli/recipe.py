"""Recipes: TOML files read into the typed settings below, every mistake reported at once.

A recipe says everything about one run. Each section is one dataclass; a section that comes in several kinds
(`[objective]`) names its own by `kind`. Settings that a run finds out (class count, cache) are filled in by the
commands, and the resolved recipe is stored with every checkpoint.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hmar_cli.models.scales import Scales, Side

Weighting = Literal["none", "equal", "linear", "sqrt", "exp-decay", "lognormal"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how they are cut."""

    source: str = "builtin:shapes"  # see `hmar tokenize --help` for the spellings
    size: Side = 256  # pixels of a training image: a side, or [height, width]
    crop: Literal["adm", "var"] = "adm"  # centre crop of ADM, or resize to 1.125 x and crop as VAR
    crops: int = 1  # cached crops of each image; the first is central, the others random ("var" only)
    mirror: bool = True  # cache, or train on, mirrored copies too
    workers: int = 2  # processes that decode images


@dataclass(frozen=True, kw_only=True)
class Msvq:
    """The multi-scale VQ tokenizer (VAR section 3.2; HMAR supplement E)."""

    kind: ClassVar[str] = "msvq"
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # each level after the first halves the resolution
    res_blocks: int = 2  # residual blocks of a level
    z_channels: int = 32
    vocab_size: int = 4096
    scales: tuple[Side, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    phi_count: int = 4  # partially shared residual convolutions
    phi_ratio: float = 0.5  # share of the convolution in a phi's output

    @property
    def stride(self) -> int:
        """Pixels per token side at the last scale."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class NextScale:
    """The VAR or HMAR transformer."""

    kind: ClassVar[str] = "next-scale"
    pattern: Literal["causal", "diagonal"] = "diagonal"  # VAR sees all earlier scales, HMAR its own alone
    depth: int = 16
    width: int = 1024
    heads: int = 16
    mlp_ratio: float = 4.0
    drop_path: float | None = None  # at the last block, rising linearly from 0; by default 0.1 depth / 24
    shared_adaln: bool = False  # one modulation layer for all blocks, as VAR-d36 has
    gamma_init: float = 1e-5  # factor on the initial modulation gates
    num_classes: int = 1000  # replaced by the count that the data has
    attention: str = "auto"  # an implementation of hmar_kernels


@dataclass(frozen=True, kw_only=True)
class MsvqObjective:
    """Training the multi-scale VQ tokenizer: reconstruction, perceptual, adversarial and commitment terms."""

    kind: ClassVar[str] = "msvq"
    l1: float = 0.0
    l2: float = 1.0
    perceptual: Literal["none", "random", "lpips"] = "random"  # features of a fixed random network, or LPIPS
    perceptual_weight: float = 1.0
    lpips_weights: str = ""  # file with LPIPS weights; empty downloads them
    adversarial_weight: float = 0.0
    adversarial_start: float = 0.5  # share of training after which the adversarial term acts
    discriminator_channels: int = 64
    commitment: float = 0.25
    revive_after: int = 200  # steps after which an unused code is replaced by a feature; 0 never


@dataclass(frozen=True, kw_only=True)
class NextScaleObjective:
    """Next-scale cross-entropy, weighted per scale (HMAR supplement C.2, Table 4)."""

    kind: ClassVar[str] = "next-scale"
    weighting: Weighting = "lognormal"
    label_drop: float = 0.1


@dataclass(frozen=True, kw_only=True)
class MaskedObjective:
    """Masked finetuning of the last blocks (HMAR supplement D.3)."""

    kind: ClassVar[str] = "masked"
    layers: int = 8  # blocks that are copied and trained
    leak_free: bool = False  # mask tokens before they are upsampled, not after
    label_drop: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its learning rate and its weight decay."""

    base_lr: float = 1e-4  # at batch 256; the peak is base_lr * batch / 256
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # a half cosine leads there; by default constant
    clip: float = 2.0  # gradient norm; 0 never clips
    schedule: str = "lin0"  # lin0, lin, lin00, lin<share>, cos, exp, constant
    warmup: float = 0.02  # share of all steps
    start_ratio: float = 0.005  # of the peak, at the first step
    end_ratio: float = 0.1  # of the peak, at the last step


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run: its length, its batch, what it keeps and shows."""

    batch_size: int = 768  # images per optimizer step, over all processes
    accumulate: int = 1  # micro-batches per optimizer step
    epochs: float = 200
    steps: int = 0  # optimizer steps; 0 follows from epochs
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 on a GPU and fp32 on a CPU
    compile: bool = False  # torch.compile
    ema: float = 0.0  # decay of the averaged weights, warmed up; 0 keeps none
    log_every: int = 50  # steps
    save_every: int = 5000
    sample_every: int = 5000
    keep: int = 2  # checkpoints


@dataclass(frozen=True, kw_only=True)
class Sample:
    """How images are drawn."""

    cfg: float = 1.5  # guidance at the last scale, growing linearly from 0 at the first
    top_k: int = 900  # 0 keeps all
    top_p: float = 0.96  # 0 keeps all
    refine_cfg: float = 0.0  # guidance of the refinement passes
    schedule: tuple[tuple[int, ...], ...] = ()  # tokens kept by each pass of each scale; empty: no refinement
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run needs to know."""

    name: str = ""
    description: str = ""
    data: Data = field(default_factory=Data)
    tokenizer: Msvq = field(default_factory=Msvq)
    model: NextScale | None = None  # absent where the tokenizer itself is trained
    objective: MsvqObjective | NextScaleObjective | MaskedObjective = field(default_factory=NextScaleObjective)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)

    @property
    def scales(self) -> Scales:
        """The scales of tokenizer and model."""
        return Scales.of(self.tokenizer.scales)
