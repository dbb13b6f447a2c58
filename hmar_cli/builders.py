"""Builders: from recipes and checkpoints to modules, which take plain arguments and never see a recipe."""

from pathlib import Path

from torch import Tensor, nn

from hmar_cli.checkpoints.store import Checkpoint, find_checkpoint, open_checkpoint
from hmar_cli.errors import UserError
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales
from hmar_cli.settings import MaskedObjective, Msvq, MsvqObjective, NextScaleObjective, Recipe
from hmar_cli.tokenizers.msvq import MultiScaleVQ
from hmar_cli.training.next_scale import MaskedTraining, NextScaleTraining
from hmar_cli.training.objective import Objective
from hmar_cli.training.tokenizer import MsvqTraining


def build_tokenizer(settings: Msvq) -> MultiScaleVQ:
    """Build an untrained tokenizer."""
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


def build_model(recipe: Recipe) -> NextScaleTransformer:
    """Build an untrained transformer, with a masked branch where the recipe's objective trains one.

    Raises:
        UserError: the recipe has no model.
    """
    model = recipe.model
    if model is None:
        raise UserError(f"recipe '{recipe.name}' trains a tokenizer and has no [model]")
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


def build_objective(
    recipe: Recipe, tokenizer: MultiScaleVQ, model: NextScaleTransformer | None = None
) -> Objective:
    """Build the objective of a recipe around the networks that it trains or reads."""
    settings = recipe.objective
    if isinstance(settings, MsvqObjective):
        return MsvqTraining(
            tokenizer,
            l1=settings.l1,
            l2=settings.l2,
            perceptual=settings.perceptual,
            perceptual_weight=settings.perceptual_weight,
            lpips_weights=settings.lpips_weights,
            adversarial_weight=settings.adversarial_weight,
            adversarial_start=settings.adversarial_start,
            discriminator_channels=settings.discriminator_channels,
            commitment=settings.commitment,
            revive_after=settings.revive_after,
        )
    if model is None:
        raise ValueError("expected a model for an objective that trains one")
    if isinstance(settings, NextScaleObjective):
        return NextScaleTraining(
            model, tokenizer.quantizer, weighting=settings.weighting, label_drop=settings.label_drop
        )
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
    if checkpoint.kind != "msvq":
        if checkpoint.tokenizer is None:
            raise UserError(f"{folder} holds a model without its tokenizer", "pass a tokenizer's checkpoint")
        checkpoint = open_checkpoint(checkpoint.tokenizer)
    return checkpoint


def load_tokenizer(path: str | Path) -> MultiScaleVQ:
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
) -> tuple[NextScaleTransformer, MultiScaleVQ, Checkpoint]:
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
    if checkpoint.kind == "msvq":
        raise UserError(f"{path} holds a tokenizer, not a model", "pass the checkpoint of a model")
    model = build_model(checkpoint.recipe)
    load_weights(model, checkpoint.load(which), checkpoint.folder)
    codec = load_tokenizer(tokenizer or checkpoint.folder)
    if checkpoint.tokenizer_hash not in ("", codec.fingerprint()):
        raise UserError(
            f"the model was trained on tokenizer {checkpoint.tokenizer_hash}, this one is {codec.fingerprint()}",
            "pass the tokenizer that the model was trained on",
        )
    if codec.scales != model.scales:
        raise UserError(f"the model has scales {model.scales.sides()}, the tokenizer {codec.scales.sides()}")
    return model.eval(), codec, checkpoint


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
