"""Builders: from recipes and checkpoints to modules, which take plain arguments and never see a recipe."""

from dataclasses import fields
from pathlib import Path

from torch import Tensor, nn

from hmar_cli.checkpoints.store import Checkpoint, find_checkpoint, open_checkpoint
from hmar_cli.errors import UserError
from hmar_cli.models.classifier import ImageClassifier
from hmar_cli.models.heads import DiffusionHead, MlpHead, TransformerHead
from hmar_cli.models.masked import MaskedTransformer
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.models.text import JointTextEncoder, tower_size
from hmar_cli.settings import (
    Classifier,
    ClassifierObjective,
    ClipText,
    Grid,
    JointText,
    Kl,
    KlObjective,
    MaskedAr,
    MaskedArObjective,
    MaskedObjective,
    Msvq,
    MsvqObjective,
    NextScale,
    NextScaleObjective,
    Recipe,
)
from hmar_cli.tokenizers.kl import KlAutoencoder
from hmar_cli.tokenizers.msvq import MultiScaleVQ
from hmar_cli.training.classifier import ClassifierTraining
from hmar_cli.training.masked import MaskedArTraining
from hmar_cli.training.next_scale import MaskedTraining, NextScaleTraining
from hmar_cli.training.objective import Objective
from hmar_cli.training.tokenizer import KlTraining, MsvqTraining

Tokenizer = MultiScaleVQ | KlAutoencoder
Model = NextScaleTransformer | MaskedTransformer


def build_tokenizer(settings: Msvq | Kl) -> Tokenizer:
    """Build an untrained tokenizer."""
    if isinstance(settings, Kl):
        return KlAutoencoder(
            channels=settings.channels,
            multipliers=settings.multipliers,
            res_blocks=settings.res_blocks,
            z_channels=settings.z_channels,
            attention=settings.attention,
            latent_scale=settings.latent_scale,
        )
    return MultiScaleVQ(
        channels=settings.channels,
        multipliers=settings.multipliers,
        res_blocks=settings.res_blocks,
        z_channels=settings.z_channels,
        vocab_size=settings.vocab_size,
        scales=Scales.of(settings.scales),
        phi_count=settings.phi_count,
        phi_ratio=settings.phi_ratio,
    )


def build_image_network(recipe: Recipe) -> Tokenizer | ImageClassifier:
    """Build the untrained network that a recipe trains on images: a tokenizer or a classifier."""
    if not isinstance(recipe.model, Classifier):
        return build_tokenizer(recipe.tokenizer)
    return ImageClassifier(
        channels=recipe.model.channels,
        multipliers=recipe.model.multipliers,
        res_blocks=recipe.model.res_blocks,
        num_classes=recipe.model.num_classes,
    )


def build_model(recipe: Recipe) -> Model:
    """Build an untrained model.

    Raises:
        UserError: the recipe has no model that draws images.
    """
    if recipe.model is None:
        raise UserError(f"recipe '{recipe.name}' trains a tokenizer and has no [model]")
    if isinstance(recipe.model, Classifier):
        raise UserError(f"recipe '{recipe.name}' trains a classifier, which draws no images")
    if isinstance(recipe.model, MaskedAr):
        return _masked_model(recipe, recipe.model)
    return _next_scale_model(recipe, recipe.model)


def _next_scale_model(recipe: Recipe, model: NextScale) -> NextScaleTransformer:
    """A VAR or HMAR, with a masked branch where the recipe's objective trains one."""
    assert isinstance(recipe.tokenizer, Msvq)
    masked = recipe.objective if isinstance(recipe.objective, MaskedObjective) else None
    return NextScaleTransformer(
        scales=recipe.scales,
        z_channels=recipe.tokenizer.z_channels,
        vocab_size=recipe.tokenizer.vocab_size,
        num_classes=model.num_classes,
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        pattern=model.pattern,
        mlp_ratio=model.mlp_ratio,
        drop_path_rate=model.drop_path,
        shared_adaln=model.shared_adaln,
        gamma_init=model.gamma_init,
        attention=model.attention,
        masked_layers=masked.layers if masked else 0,
        leak_free=masked.leak_free if masked else False,
    )


def _masked_model(recipe: Recipe, model: MaskedAr) -> MaskedTransformer:
    """A MAR or Hi-MAR, with the text encoder that is trained along."""
    text, width, context = None, 0, model.buffer_size
    if isinstance(recipe.text, JointText):
        text = JointTextEncoder(
            width=recipe.text.width,
            depth=recipe.text.depth,
            heads=recipe.text.heads,
            context_length=recipe.text.context_length,
        )
        width, context = text.width, text.context_length
    elif isinstance(recipe.text, ClipText):
        try:
            context, width = tower_size(recipe.text.tower)
        except ValueError as error:
            raise UserError(f"text.tower: {error}", "`hmar recipes show` prints the recipe's") from error
    return MaskedTransformer(
        pivot_head=_head(recipe, model, "pivot", recipe.pivot_grid) if model.pivots != "none" else None,
        dense_head=_head(recipe, model, "dense", recipe.grid),
        grid=recipe.grid,
        pivot_grid=recipe.pivot_grid,
        channels=recipe.tokenizer.z_channels,
        pivots=model.pivots,
        num_classes=model.num_classes,
        text_width=width,
        text=text,
        context_length=context,
        encoder_depth=model.encoder_depth,
        decoder_depth=model.decoder_depth,
        width=model.width,
        heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        dropout=model.dropout,
        scale_vector=model.scale_vector,
    )


def _head(recipe: Recipe, model: MaskedAr, phase: str, grid: Grid | None) -> DiffusionHead:
    """The diffusion head of a phase, "pivot" or "dense"."""
    kind, depth, width, heads = (
        getattr(model, f"{phase}_head{part}") for part in ("", "_depth", "_width", "_heads")
    )
    channels = recipe.tokenizer.z_channels
    if kind == "mlp":
        return MlpHead(channels=channels, cond_width=model.width, depth=depth, width=width)
    assert grid is not None
    return TransformerHead(
        channels=channels, cond_width=model.width, depth=depth, width=width, heads=heads, grid=grid
    )


def build_objective(
    recipe: Recipe, tokenizer: Tokenizer | ImageClassifier, model: Model | None = None
) -> Objective:
    """Build the objective of a recipe around the networks that it trains or reads.

    Args:
        recipe: the recipe.
        tokenizer: the tokenizer (trained, or read by the model), or the classifier that is trained.
        model: the model that is trained.
    """
    settings = recipe.objective
    chosen = {each.name: getattr(settings, each.name) for each in fields(settings)}
    if isinstance(settings, MsvqObjective):
        assert isinstance(tokenizer, MultiScaleVQ)
        return MsvqTraining(tokenizer, settings)
    if isinstance(settings, KlObjective):
        assert isinstance(tokenizer, KlAutoencoder)
        return KlTraining(tokenizer, settings)
    if isinstance(settings, MaskedArObjective):
        assert isinstance(model, MaskedTransformer) and isinstance(tokenizer, KlAutoencoder)
        return MaskedArTraining(model, settings, tokenizer.latent_scale)
    if isinstance(settings, ClassifierObjective):
        assert isinstance(tokenizer, ImageClassifier)
        return ClassifierTraining(tokenizer, **chosen)
    assert isinstance(model, NextScaleTransformer) and isinstance(tokenizer, MultiScaleVQ)
    if isinstance(settings, NextScaleObjective):
        return NextScaleTraining(model, tokenizer.quantizer, **chosen)
    return MaskedTraining(model, tokenizer.quantizer, label_drop=settings.label_drop)


def find_tokenizer(path: str | Path) -> Checkpoint:
    """Open a tokenizer's checkpoint: in its own folder or run folder, a cache, or a model's checkpoint.

    Raises:
        UserError: nothing of the sort lies there.
    """
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        folder = folder / "tokenizer"
    checkpoint = open_checkpoint(find_checkpoint(folder))
    if checkpoint.kind not in ("msvq", "kl"):
        if checkpoint.tokenizer is None:
            raise UserError(f"{folder} holds a model without its tokenizer", "pass a tokenizer's checkpoint")
        checkpoint = open_checkpoint(checkpoint.tokenizer)
    return checkpoint


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from its checkpoint or run folder, or the one carried by a cache or a model's checkpoint.

    Returns:
        The tokenizer on the CPU, in evaluation mode.

    Raises:
        UserError: nothing of the sort lies there, or its weights don't fit.
    """
    checkpoint = find_tokenizer(path)
    tokenizer = build_tokenizer(checkpoint.recipe.tokenizer)
    load_weights(tokenizer, checkpoint.load(), checkpoint.folder)
    return tokenizer.eval()


def load_model(
    path: str | Path, which: str = "", tokenizer: str | Path | None = None
) -> tuple[Model, Tokenizer, Checkpoint]:
    """Load a model and its tokenizer.

    Args:
        path: a checkpoint or run folder.
        which: weights "model" or "ema"; "" for "ema" where it exists.
        tokenizer: where the tokenizer lies; None for the one that the checkpoint carries.

    Returns:
        Model and tokenizer on the CPU, in evaluation mode, and the checkpoint.

    Raises:
        UserError: nothing of the sort lies there, or its weights don't fit.
    """
    checkpoint = open_checkpoint(find_checkpoint(Path(path)))
    if checkpoint.kind in ("msvq", "kl", "classifier"):
        what = "classifier" if checkpoint.kind == "classifier" else "tokenizer"
        raise UserError(f"{path} holds a {what}, not a model", "pass the checkpoint of a model")
    model = build_model(checkpoint.recipe)
    load_weights(model, checkpoint.load(which), checkpoint.folder)
    codec = load_tokenizer(tokenizer or checkpoint.folder)
    if checkpoint.tokenizer_hash not in ("", codec.fingerprint()):
        raise UserError(
            f"the model was trained on tokenizer {checkpoint.tokenizer_hash}, this one is {codec.fingerprint()}",
            "pass the tokenizer that the model was trained on",
        )
    if isinstance(codec, KlAutoencoder):
        assert isinstance(checkpoint.recipe.tokenizer, Kl)
        codec.latent_scale = checkpoint.recipe.tokenizer.latent_scale or codec.latent_scale
        if not codec.latent_scale:
            raise UserError(
                f"nobody measured the latent scale of {tokenizer or checkpoint.folder}",
                "pass the tokenizer of the cache that the model was trained on: --tokenizer CACHE",
            )
    _require_fit(model, codec)
    return model.eval(), codec, checkpoint


def load_classifier(path: str | Path) -> tuple[ImageClassifier, Checkpoint]:
    """Load a classifier, on the CPU and in evaluation mode, and its checkpoint.

    Raises:
        UserError: nothing of the sort lies there, or its weights don't fit.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.kind != "classifier":
        raise UserError(
            f"{checkpoint.folder} holds a {checkpoint.kind}, not a classifier",
            "train one: hmar train --recipe classifier-cifar10 --data SOURCE",
        )
    network = build_image_network(checkpoint.recipe)
    assert isinstance(network, ImageClassifier)
    load_weights(network, checkpoint.load(), checkpoint.folder)
    return network.eval(), checkpoint


def _require_fit(model: Model, tokenizer: Tokenizer) -> None:
    """Compare what a model writes with what a tokenizer reads.

    Raises:
        UserError: another kind, other scales, or other channels.
    """
    if isinstance(model, NextScaleTransformer) and isinstance(tokenizer, MultiScaleVQ):
        ours, theirs = f"scales {model.scales.sides()}", f"scales {tokenizer.scales.sides()}"
    elif isinstance(model, MaskedTransformer) and isinstance(tokenizer, KlAutoencoder):
        ours, theirs = f"{model.channels} latent channels", f"{tokenizer.z_channels} latent channels"
    else:
        ours, theirs = type(model).__name__, type(tokenizer).__name__
    if ours != theirs:
        raise UserError(f"model and tokenizer don't fit: the one has {ours}, the other {theirs}")


def load_weights(module: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        UserError: missing, unexpected or misshapen entries.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first, *details = str(error).strip().splitlines()
        raise UserError(
            f"the weights in {origin} don't fit their recipe: {first}", details=details[:5]
        ) from error
