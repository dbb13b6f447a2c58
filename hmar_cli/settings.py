"""Settings: the typed sections of a recipe, and what must hold between them.

The type of a setting is its check: a range is part of the annotation, and what must hold between settings is in
`impossible_combinations`. A section that comes in several kinds is a union of dataclasses that carry a `kind`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from hmar_cli.models.scales import Scales, Side, check_schedule

Grid = tuple[int, int]
"""Rows and columns."""
Masking = Literal["truncated-normal", "cosine", "beta"]
CfgSchedule = Literal["linear", "constant"]
Attention = Literal["auto", "measure", "reference", "triton", "sdpa", "flex", "varlen", "masked"]
Weighting = Literal["none", "equal", "linear", "sqrt", "exp-decay", "lognormal"]


@dataclass(frozen=True)
class Within:
    """The range of a number, as part of its annotation."""

    low: float
    high: float = float("inf")
    open: bool = False  # `low` itself is not allowed

    def __contains__(self, number: float) -> bool:
        return (number > self.low if self.open else number >= self.low) and number <= self.high

    def __str__(self) -> str:
        if self.high < float("inf"):
            return f" from {self.low:g} to {self.high:g}"
        return f" above {self.low:g}" if self.open else f" of at least {self.low:g}"


Count = Annotated[int, Within(1)]
Whole = Annotated[int, Within(0)]
Positive = Annotated[float, Within(0, open=True)]
Amount = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]
Decay = Annotated[float, Within(0, 0.9999999)]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where images come from and how they are cut."""

    source: str = "builtin:shapes"  # see `hmar tokenize --help` for the spellings
    size: Side = 256  # pixels of a training image: a side, or [height, width]
    pivot_size: Side | None = None  # pixels of its low-resolution copy, whose tokens are Hi-MAR's pivots
    crop: Literal["adm", "var"] = "adm"  # centre crop of ADM, or resize to 1.125 x and crop as VAR
    crops: Count = 1  # cached crops of each image; the first is central, the others random ("var" only)
    mirror: bool = True  # cache, or train on, mirrored copies too
    captions: Count = 1  # captions of each image that are cached for a text-to-image model
    workers: Whole = 2  # threads that decode images


@dataclass(frozen=True, kw_only=True)
class Msvq:
    """The multi-scale VQ tokenizer (VAR section 3.2; HMAR supplement E)."""

    kind: ClassVar[str] = "msvq"
    channels: Count = 160
    multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)  # each level after the first halves the resolution
    res_blocks: Count = 2  # residual blocks of a level
    z_channels: Count = 32
    vocab_size: Annotated[int, Within(2, 65536)] = 4096
    scales: tuple[Side, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    phi_count: Count = 4  # partially shared residual convolutions
    phi_ratio: Share = 0.5  # share of the convolution in a phi's output

    @property
    def stride(self) -> int:
        """Pixels per token side at the last scale."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class Kl:
    """The KL autoencoder (MAR's KL-16; latent diffusion, Rombach et al. 2022)."""

    kind: ClassVar[str] = "kl"
    channels: Count = 128
    multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)  # each level after the first halves the resolution
    res_blocks: Count = 2  # residual blocks of a level
    z_channels: Count = 16  # channels of a latent token
    attention: bool = True  # in the encoder's last level; the middle always has it
    latent_scale: Amount = (
        0.0  # latents are multiplied by it; 0 is not known yet: `hmar tokenize` measures it
    )

    @property
    def stride(self) -> int:
        """Pixels per token side."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class NextScale:
    """The VAR or HMAR transformer."""

    kind: ClassVar[str] = "next-scale"
    pattern: Literal["causal", "diagonal"] = "diagonal"  # VAR sees all earlier scales, HMAR its own alone
    depth: Count = 16
    width: Count = 1024
    heads: Count = 16
    mlp_ratio: Positive = 4.0
    drop_path: Share | None = None  # at the last block, rising linearly from 0; by default 0.1 depth / 24
    shared_adaln: bool = False  # one modulation layer for all blocks, as VAR-d36 has
    gamma_init: Amount = 1e-5  # factor on the initial modulation gates
    num_classes: Count = 1000  # replaced by the count that the data has
    attention: Attention = (
        "auto"  # implementation of hmar_kernels; "measure" times what can run and takes the fastest
    )


@dataclass(frozen=True, kw_only=True)
class MaskedAr:
    """The MAR or Hi-MAR transformer with its diffusion heads (Hi-MAR sections 3.1 to 3.3, Table 1)."""

    kind: ClassVar[str] = "masked-ar"
    pivots: Literal["none", "visual", "conditional"] = "conditional"  # what phase 2 gets; "none" is MAR
    encoder_depth: Count = 12
    decoder_depth: Count = 12
    width: Count = 768
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    dropout: Share = 0.1  # of attention's output and of the feed-forward's
    scale_vector: Literal["none", "table", "sinusoidal"] = "table"  # "table" as released, the other eq. 2
    buffer_size: Count = 64  # class tokens in front; a text model has its text tokens instead
    pivot_head: Literal["mlp", "transformer"] = "mlp"
    pivot_head_depth: Count = 6
    pivot_head_width: Count = 1024
    pivot_head_heads: Count = 8  # of a transformer head
    dense_head: Literal["mlp", "transformer"] = "transformer"
    dense_head_depth: Count = 6
    dense_head_width: Count = 512
    dense_head_heads: Count = 8
    num_classes: Count = 1000  # replaced by the count that the data has


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A residual network that names what an image shows; its features measure generated images."""

    kind: ClassVar[str] = "classifier"
    channels: Count = 64
    multipliers: tuple[Count, ...] = (1, 2, 4)  # each level after the first halves the resolution
    res_blocks: Count = 2  # residual blocks of a level
    num_classes: Count = 1000  # replaced by the count that the data has


@dataclass(frozen=True, kw_only=True)
class ClipText:
    """A frozen CLIP text tower of open_clip; `hmar tokenize` caches what it says of the captions."""

    kind: ClassVar[str] = "clip"
    tower: str = "ViT-L-14"  # a name of open_clip
    weights: str = "openai"  # a tag of open_clip (downloaded), or a local file: safetensors or a state dict


@dataclass(frozen=True, kw_only=True)
class JointText:
    """open_clip's text transformer, untrained and trained with the model; needs no download."""

    kind: ClassVar[str] = "joint"
    width: Count = 256
    depth: Count = 4
    heads: Count = 4
    context_length: Count = 32  # tokens of a caption


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What training any tokenizer weighs: reconstruction, perceptual and adversarial terms."""

    l1: Amount = 0.0  # of the mean absolute error
    l2: Amount = 1.0  # of the mean squared error
    perceptual: Literal["none", "random", "lpips"] = "random"  # features of a fixed random network, or LPIPS
    perceptual_weight: Amount = 1.0
    lpips_weights: str = ""  # file with LPIPS weights; empty downloads them
    adversarial_weight: Amount = 0.0  # of the generator's hinge term; 0 trains no discriminator
    adversarial_start: Share = 0.5  # share of training after which the adversarial term acts
    discriminator_channels: Count = 64


@dataclass(frozen=True, kw_only=True)
class MsvqObjective(Reconstruction):
    """Training the multi-scale VQ tokenizer."""

    kind: ClassVar[str] = "msvq"
    commitment: Amount = 0.25  # of the encoder's part of the quantization loss
    revive_after: Whole = 200  # steps after which an unused code is replaced by a feature; 0 never


@dataclass(frozen=True, kw_only=True)
class KlObjective(Reconstruction):
    """Training the KL autoencoder."""

    kind: ClassVar[str] = "kl"
    l1: Amount = 1.0
    l2: Amount = 0.0
    kl_weight: Amount = 1e-6  # of the divergence from a standard normal, per number of the image


@dataclass(frozen=True, kw_only=True)
class NextScaleObjective:
    """Next-scale cross-entropy, weighted per scale (HMAR supplement C.2, Table 4)."""

    kind: ClassVar[str] = "next-scale"
    weighting: Weighting = "lognormal"
    label_drop: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class MaskedObjective:
    """Masked finetuning of the last blocks (HMAR supplement D.3)."""

    kind: ClassVar[str] = "masked"
    layers: Count = 8  # blocks that are copied and trained
    leak_free: bool = False  # mask tokens before they are upsampled, not after
    label_drop: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class MaskedArObjective:
    """Masked autoregression: diffusion losses of one or two phases (Hi-MAR sections 3.1, 3.2 and 4.2)."""

    kind: ClassVar[str] = "masked-ar"
    pivot_masking: Masking = "truncated-normal"  # law of the share of masked tokens in phase 1
    dense_masking: Masking = "cosine"  # in phase 2, or of MAR
    repeats: Count = 4  # noise levels that each token is learned at in one step
    variational: bool = (
        True  # train the variance of MLP heads too, as released; the paper's eq. 1 has it not, and
    )
    # "ddpm" then draws with the geometric mean of the posterior's variance and beta
    pivot_weight: Amount = 0.4  # of the phase's loss; released: 2 * 64 / 320
    dense_weight: Amount = 0.6  # released: 0.75 * 256 / 320
    pivot_keep: Share = 0.25  # share of images whose pivots guide phase 2 in training, in the end
    pivot_keep_warmup: Share = 0.125  # share of training over which that share grows from 0
    label_drop: Share = 0.1  # labels or captions that are dropped, for guidance


@dataclass(frozen=True, kw_only=True)
class ClassifierObjective:
    """Training a classifier on images: cross-entropy, images mirrored by `data.mirror` and shifted."""

    kind: ClassVar[str] = "classifier"
    label_smoothing: Share = 0.1
    shift: Annotated[float, Within(0, 0.5)] = 0.125  # of its side, by which an image moves at most


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its learning rate and its weight decay."""

    base_lr: Positive = 1e-4  # at batch 256; the peak is base_lr * batch / 256
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Amount = 0.05
    weight_decay_end: Amount | None = None  # a half cosine leads there; by default constant
    clip: Amount = 2.0  # gradient norm; 0 never clips
    schedule: str = "lin0"  # lin0, lin, lin00, lin<share>, cos, exp, constant
    warmup: Share = 0.02  # share of all steps
    warmup_steps: Whole = 0  # steps instead of a share
    start_ratio: Amount = 0.005  # of the peak, at the first step
    end_ratio: Amount = 0.1  # of the peak, at the last step


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run: its length, its batch, what it keeps and shows."""

    batch_size: Count = 768  # images per optimizer step, over all processes
    accumulate: Count = 1  # micro-batches per optimizer step
    epochs: Positive = 200
    steps: Whole = 0  # optimizer steps; 0 follows from epochs
    seed: Whole = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 on a GPU and fp32 on a CPU
    compile: bool = False  # torch.compile
    graphs: bool = False  # CUDA graphs of whole steps: quicker for small models, on one GPU
    ema: Decay = 0.0  # of the averaged weights, warmed up; 0 keeps none
    log_every: Count = 50  # steps
    save_every: Count = 5000
    sample_every: Count = 5000
    keep: Count = 2  # checkpoints


@dataclass(frozen=True, kw_only=True)
class NextScaleSample:
    """How images are drawn from a VAR or HMAR."""

    kind: ClassVar[str] = "next-scale"
    cfg: Amount = 1.5  # guidance at the last scale, growing linearly from 0 at the first
    top_k: Whole = 900  # 0 keeps all
    top_p: Share = 0.96  # 0 keeps all
    refine_cfg: Amount = 0.0  # guidance of the refinement passes
    schedule: tuple[tuple[Count, ...], ...] = ()  # tokens kept by each pass of each scale; empty refines none
    batch_size: Count = 64


@dataclass(frozen=True, kw_only=True)
class MaskedArSample:
    """How images are drawn from a MAR or Hi-MAR."""

    kind: ClassVar[str] = "masked-ar"
    steps: Count = 4  # of phase 2 (dense tokens), or of MAR
    pivot_steps: Count = 32  # of phase 1
    cfg: Amount = 2.5  # guidance of phase 2, or of MAR; 1 is none
    pivot_cfg: Amount = 2.7  # guidance of phase 1
    cfg_schedule: CfgSchedule = "linear"  # linear grows with the share of known tokens
    pivot_cfg_schedule: CfgSchedule = "linear"
    impose_known: bool = (
        True  # show a transformer head the known tokens, noised, as released; not in the paper
    )
    temperature: Amount = 1.0  # of the noise in "ddpm"
    head_sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm"
    head_steps: Annotated[int, Within(1, 1000)] = 250  # diffusion steps of the dense head
    pivot_head_steps: Annotated[int, Within(1, 1000)] = 100
    batch_size: Count = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run needs to know."""

    name: str = ""
    description: str = ""
    data: Data = field(default_factory=Data)
    tokenizer: Msvq | Kl = field(default_factory=Msvq)  # a classifier has none
    model: NextScale | MaskedAr | Classifier | None = None  # absent where the tokenizer itself is trained
    text: ClipText | JointText | None = None  # captions are the condition, where there is one
    objective: (
        MsvqObjective
        | KlObjective
        | NextScaleObjective
        | MaskedObjective
        | MaskedArObjective
        | ClassifierObjective
    ) = field(default_factory=NextScaleObjective)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    sample: NextScaleSample | MaskedArSample = field(default_factory=NextScaleSample)

    @property
    def trains(self) -> str:
        """The kind of what is trained, and so of its checkpoints."""
        return self.model.kind if self.model else self.tokenizer.kind

    @property
    def scales(self) -> Scales:
        """The scales of a multi-scale tokenizer and its model."""
        assert isinstance(self.tokenizer, Msvq)
        return Scales.of(self.tokenizer.scales)

    @property
    def grid(self) -> Grid:
        """Rows and columns of an image's tokens (of the last scale)."""
        return tokens_of(self.data.size, self.tokenizer.stride)

    @property
    def pivot_grid(self) -> Grid | None:
        """Rows and columns of the pivots; None where the recipe has none."""
        size = self.data.pivot_size
        return None if size is None else tokens_of(size, self.tokenizer.stride)


def pair(side: Side) -> Grid:
    """A side as rows and columns."""
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def tokens_of(size: Side, stride: int) -> Grid:
    """The grid of tokens that covers an image of `size` pixels."""
    height, width = pair(size)
    return height // stride, width // stride


# What must hold between settings


FAMILIES = {
    # kind of the objective: kinds of tokenizer (None reads images), model (None trains the tokenizer) and sampling
    "msvq": ("msvq", None, None),
    "kl": ("kl", None, None),
    "next-scale": ("msvq", "next-scale", "next-scale"),
    "masked": ("msvq", "next-scale", "next-scale"),
    "masked-ar": ("kl", "masked-ar", "masked-ar"),
    "classifier": (None, "classifier", None),
}


def impossible_combinations(recipe: Recipe) -> list[str]:
    """All contradictions between the settings of a recipe, one line each."""
    problems = [*_family_problems(recipe), *_run_problems(recipe)]
    if isinstance(recipe.model, Classifier) or isinstance(recipe.objective, ClassifierObjective):
        return [*problems, *_classifier_problems(recipe)]
    if isinstance(recipe.tokenizer, Msvq):
        try:
            problems.extend(_scale_problems(recipe, recipe.scales))
        except ValueError as error:
            return [f"tokenizer.scales: {error}"]
    else:
        problems.extend(_grid_problems(recipe))
    if isinstance(recipe.model, NextScale):
        problems.extend(_next_scale_problems(recipe, recipe.model))
    if isinstance(recipe.model, MaskedAr):
        problems.extend(_masked_ar_problems(recipe, recipe.model))
    return problems


def _family_problems(recipe: Recipe) -> Iterator[str]:
    kind = recipe.objective.kind
    tokenizer, model, sample = FAMILIES[kind]
    found = recipe.model.kind if recipe.model else None
    if model is None and found is not None:
        yield f'objective.kind: "{kind}" trains the tokenizer, so there is no [model]'
    elif model is not None and found is None:
        yield f'objective.kind: "{kind}" trains a [model], and there is none'
    elif model != found:
        yield f'objective.kind: "{kind}" trains a model of kind "{model}", and model.kind is "{found}"'
    elif tokenizer not in (None, recipe.tokenizer.kind):
        yield f'tokenizer.kind: "{kind}" needs the kind "{tokenizer}", got "{recipe.tokenizer.kind}"'
    elif sample is not None and recipe.sample.kind != sample:
        yield f'sample.kind: a model of kind "{model}" needs "{sample}", got "{recipe.sample.kind}"'


def _classifier_problems(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe.model, Classifier) and not recipe.model.multipliers:
        yield "model.multipliers: expected one or more levels, got none"
    if recipe.tokenizer != Msvq():  # the default stands for none
        yield "[tokenizer]: a classifier reads images and has no tokenizer"
    if recipe.text is not None:
        yield '[text]: only models of kind "masked-ar" take captions'


def grid_name(sides: Sequence[int]) -> str:
    """Sides as text, "16x16"."""
    return "x".join(str(side) for side in sides)


def _scale_problems(recipe: Recipe, scales: Scales) -> Iterator[str]:
    tokenizer, pixels = recipe.tokenizer, pair(recipe.data.size)
    if not tokenizer.multipliers:
        yield "tokenizer.multipliers: expected one or more levels, got none"
        return
    covered = tuple(side * tokenizer.stride for side in scales.grid)
    if covered != pixels:
        yield (
            f"tokenizer.scales: the last, {grid_name(scales.grid)}, times the stride {tokenizer.stride} of "
            f"tokenizer.multipliers is {grid_name(covered)} pixels, but data.size is {grid_name(pixels)}"
        )
    if isinstance(recipe.sample, NextScaleSample) and recipe.sample.schedule:
        try:
            check_schedule(recipe.sample.schedule, scales)
        except ValueError as error:
            yield f"sample.schedule: {error}"


def _grid_problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.tokenizer.multipliers:
        yield "tokenizer.multipliers: expected one or more levels, got none"
        return
    stride = recipe.tokenizer.stride
    for name, size in (("size", recipe.data.size), ("pivot_size", recipe.data.pivot_size)):
        if size is not None and any(side < stride or side % stride for side in pair(size)):
            yield f"data.{name}: {grid_name(pair(size))} pixels are not whole tokens of {stride} pixels"
    if recipe.data.pivot_size is not None:
        small, whole = pair(recipe.data.pivot_size), pair(recipe.data.size)
        if small[0] > whole[0] or small[1] > whole[1]:
            yield f"data.pivot_size: {grid_name(small)} pixels are more than data.size, {grid_name(whole)}"


def _next_scale_problems(recipe: Recipe, model: NextScale) -> Iterator[str]:
    yield from _head_problems("model.width", model.width, "model.heads", model.heads)
    if recipe.text is not None:
        yield '[text]: only models of kind "masked-ar" take captions'
    if isinstance(recipe.objective, MaskedObjective):
        layers, depth = recipe.objective.layers, model.depth
        if layers > depth:
            yield f"objective.layers: {layers} blocks to finetune, but model.depth is {depth}"
        if model.pattern != "diagonal":
            yield 'objective.kind: "masked" finetunes HMAR, model.pattern = "diagonal"'


def _masked_ar_problems(recipe: Recipe, model: MaskedAr) -> Iterator[str]:
    yield from _head_problems("model.width", model.width, "model.heads", model.heads)
    if isinstance(recipe.text, JointText):
        yield from _head_problems("text.width", recipe.text.width, "text.heads", recipe.text.heads)
    for head in ("pivot_head", "dense_head"):
        if getattr(model, head) == "transformer":
            width, heads = (f"model.{head}_{name}" for name in ("width", "heads"))
            sizes = getattr(model, f"{head}_width"), getattr(model, f"{head}_heads")
            yield from _head_problems(width, sizes[0], heads, sizes[1])
            if sizes[0] % 4:
                yield f"{width}: {sizes[0]} is not divisible by 4, as its positions need"
    if model.pivots != "none" and recipe.data.pivot_size is None:
        yield 'data.pivot_size: pivots need it (or model.pivots = "none", which is MAR)'
    sample = recipe.sample
    if not isinstance(sample, MaskedArSample) or list(_grid_problems(recipe)):
        return
    grids = {"steps": recipe.grid, "pivot_steps": recipe.pivot_grid if model.pivots != "none" else None}
    for name, grid in grids.items():
        if grid is not None and getattr(sample, name) > grid[0] * grid[1]:
            yield f"sample.{name}: {getattr(sample, name)} steps for {grid_name(grid)} tokens; at most one a token"
    if sample.head_sampler != "ddpm" and sample.temperature != 1.0:
        yield f'sample.temperature: it scales the noise of "ddpm"; "{sample.head_sampler}" adds none'


def _head_problems(width: str, channels: int, heads: str, count: int) -> Iterator[str]:
    if channels % count:
        yield f"{width}: {channels} is not divisible by {heads} = {count}"
    elif channels // count % 8 or channels // count > 256:
        yield (
            f"{heads}: {channels // count} channels a head; attention kernels need a multiple of 8, at most 256"
        )


def _run_problems(recipe: Recipe) -> Iterator[str]:
    data, optim, train = recipe.data, recipe.optim, recipe.train
    if data.crops > 1 and data.crop != "var":
        yield f'data.crops: {data.crops} crops of an image need data.crop = "var"; the centre crop has one'
    if train.batch_size % train.accumulate:
        yield f"train.batch_size: {train.batch_size} is not divisible by train.accumulate, {train.accumulate}"
    if not re.fullmatch(r"lin0|lin|lin00|lin0\.\d*[1-9]\d*|cos|exp|constant", optim.schedule):
        yield (
            f"optim.schedule: expected lin, lin0, lin00, lin<share> such as lin0.2, cos, exp or constant, "
            f'got "{optim.schedule}"'
        )
    if optim.schedule == "exp" and optim.end_ratio == 0:
        yield "optim.end_ratio: an exponential schedule never reaches 0"
    if max(optim.betas) >= 1:
        yield f"optim.betas: expected numbers below 1, got {list(optim.betas)}"
