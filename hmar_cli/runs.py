"""Training runs: from a recipe and its data to the trainer, and its checkpoints back to disk.

The commands `hmar train` and `hmar finetune-masked` turn their flags into `Options` and call `train` or
`finetune_masked`; everything that a run needs besides the trainer itself is put together here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_cli.builders import (
    Model,
    Tokenizer,
    build_image_network,
    build_model,
    build_objective,
    build_tokenizer,
    load_tokenizer,
    load_weights,
)
from hmar_cli.checkpoints.store import (
    Checkpoint,
    list_steps,
    open_checkpoint,
    remap_class_embedding,
    save_checkpoint,
)
from hmar_cli.console import console
from hmar_cli.data.batches import cache_batches, image_batches
from hmar_cli.data.cache import Cache
from hmar_cli.data.captions import describe
from hmar_cli.data.images import ImageSource, class_places
from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.launch import join_processes
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Side
from hmar_cli.previews import reconstruction_preview, sample_preview
from hmar_cli.recipe import flat, load_recipe, to_dict
from hmar_cli.settings import (
    Classifier,
    ClassifierObjective,
    Kl,
    KlObjective,
    MaskedAr,
    MaskedObjective,
    Msvq,
    MsvqObjective,
    NextScale,
    NextScaleObjective,
    Recipe,
    grid_name,
)
from hmar_cli.tokenizers import kl, msvq
from hmar_cli.tokenizers.blocks import hash_weights
from hmar_cli.training.objective import Objective
from hmar_cli.training.trainer import Batches, Outcome, Preview, Weights, fit, make_plan, rehearse

CHANGEABLE = ("name", "description", "sample.", "optim.", "data.workers", "model.attention")
CHANGEABLE_TRAIN = (
    "log_every",
    "save_every",
    "sample_every",
    "keep",
    "compile",
    "precision",
    "steps",
    "epochs",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is told besides its recipe.

    Attributes:
        data: source of images for a tokenizer or classifier, cache folder for a model; empty for the recipe's, or
            that of the resumed run.
        tokenizer: checkpoint that must be the cache's tokenizer; empty checks nothing.
        out: run folder; empty is runs/ and the recipe's name.
        init: checkpoint whose weights are started from.
        resume: go on from the newest checkpoint in `out`.
        device: "cpu", "cuda" or empty.
        wandb: also report to Weights & Biases.
        dry_run: run one step, of a run to resume the next one, and write nothing; of a model without data, make the
            plan alone.
    """

    data: str = ""
    tokenizer: str = ""
    out: str = ""
    init: str = ""
    resume: bool = False
    device: str = ""
    wandb: bool = False
    dry_run: bool = False

    @property
    def bare(self) -> bool:
        """Whether a dry run is told of nothing that only a cache can be compared with."""
        return self.dry_run and not (self.data or self.tokenizer or self.init or self.resume)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to start; `skipped` images of its data are known to be unusable."""

    recipe: Recipe
    objective: Objective
    batches: Batches
    images: int
    class_names: tuple[str, ...]
    data: str
    skipped: int = 0
    fingerprint: Callable[[Weights], str]
    tokenizer: Path | None = None
    licence: str = ""
    preview: Preview | None = None


def train(recipe: Recipe, options: Options) -> Outcome:
    """Train what the recipe says: a tokenizer or classifier on images, or a model on a cache of tokens.

    Raises:
        UserError: paths that don't exist, data that don't fit the recipe, or what the trainer raises.
    """
    if isinstance(recipe.objective, MaskedObjective):
        raise UserError(
            f"recipe '{recipe.name}' finetunes a trained model",
            f"hmar finetune-masked BASE --recipe {recipe.name} --data CACHE",
        )
    on_images = isinstance(recipe.objective, MsvqObjective | KlObjective | ClassifierObjective)
    if options.bare and not on_images:
        return plan_without_data(recipe, options.device)
    start = starting_point(recipe, options)
    return execute((image_job if on_images else model_job)(recipe, options, start), options, start)


def finetune_masked(base: str, recipe: Recipe, options: Options) -> Outcome:
    """Train a masked branch on a trained next-scale model (HMAR, section D.3).

    Args:
        base: checkpoint or run folder of a next-scale model.
        recipe: one with a masked objective; its model must be the base's.
        options: what else there is to say.

    Raises:
        UserError: as `train`, or a base of another kind, model or tokenizer.
    """
    if not isinstance(recipe.objective, MaskedObjective):
        raise UserError(
            f"recipe '{recipe.name}' does not finetune a masked branch", f"hmar train --recipe {recipe.name}"
        )
    checkpoint = open_checkpoint(base)
    recipe = adopt_base(recipe, checkpoint)
    if options.bare:
        return plan_without_data(recipe, options.device)
    start = starting_point(recipe, options)
    return execute(masked_job(checkpoint, recipe, options, start), options, start)


def plan_without_data(recipe: Recipe, device: str) -> Outcome:
    """What a dry run of a model says before there is a cache; nothing is computed.

    Raises:
        UserError: no such device, or a batch that the processes cannot share.
    """
    with torch.device("meta"):  # weights take neither time nor memory
        model, tokenizer = build_model(recipe), build_tokenizer(recipe.tokenizer)
    place = join_processes(device)
    plan = make_plan(build_objective(recipe, tokenizer, model), recipe, None, place.world, place.device)
    classes = (
        f"; the model is for {recipe.model.num_classes:,} classes" if recipe.model and not recipe.text else ""
    )
    return Outcome(
        checkpoint=None,
        step=0,
        interrupted=0,
        last={},
        plan=plan,
        main=place.rank == 0,
        data=f"none was given (--data CACHE), so no step was run{classes}",
    )


def image_job(recipe: Recipe, options: Options, start: Checkpoint | None) -> Job:
    """Put the training of a tokenizer or a classifier together."""
    if options.tokenizer:
        what = "classifier" if isinstance(recipe.model, Classifier) else "tokenizer"
        raise UserError(
            f"--tokenizer is for models; this recipe trains a {what}", "use --init to start from one"
        )
    source = open_source(options.data or recipe.data.source, size=recipe.data.size)
    recipe = adopt_source(recipe, source)
    torch.manual_seed(recipe.train.seed)
    network = build_image_network(recipe)
    licence = start.licence if start else ""
    if options.init and not start:
        origin = open_checkpoint(options.init)
        if origin.kind != recipe.trains:
            raise UserError(
                f"--init {options.init} holds a {origin.kind}, and the recipe trains a {recipe.trains}",
                "give a checkpoint of that kind, or leave out --init",
            )
        load_weights(network, origin.load(), origin.folder)
        licence = origin.licence

    def batches(first: int, rank: int, world: int, size: int) -> Iterator[dict[str, Tensor]]:
        data = recipe.data
        return image_batches(
            source,
            size=data.size,
            crop=data.crop,
            mirror=data.mirror,
            batch_size=size,
            seed=recipe.train.seed,
            start=first,
            rank=rank,
            world=world,
            workers=data.workers,
        )

    return Job(
        recipe=recipe,
        objective=build_objective(recipe, network),
        batches=batches,
        images=len(source),
        class_names=source.class_names,
        data=source.name,
        fingerprint=lambda weights: weights_fingerprint(recipe, weights),
        licence=licence,
        preview=None if recipe.model else reconstruction_preview(recipe, source),
    )


def model_job(recipe: Recipe, options: Options, start: Checkpoint | None) -> Job:
    """Put a model's training on a cache together."""
    cache, tokenizer = open_cache(options, start)
    recipe = adopt_cache(recipe, cache)
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe)
    licence = start.licence if start else ""
    if options.init and not start:
        origin = open_checkpoint(options.init)
        assert recipe.model is not None
        if origin.kind != recipe.model.kind:
            raise UserError(
                f"--init {origin.folder} holds a {origin.kind}, and the recipe trains a {recipe.model.kind}"
            )
        if origin.tokenizer_hash not in ("", cache.manifest.tokenizer_hash):
            raise other_tokenizer(
                f"--init {origin.folder}", origin.tokenizer_hash, cache.manifest.tokenizer_hash
            )
        check_latent_scale(origin, recipe)
        initialize(model, origin, tuple(cache.manifest.class_names))
        licence = origin.licence
    return cache_job(recipe, cache, tokenizer, model, licence)


def check_latent_scale(origin: Checkpoint, recipe: Recipe) -> None:
    """Refuse weights that know latents of another scale than the cache's.

    Raises:
        UserError: with both scales.
    """
    old, new = (getattr(each.tokenizer, "latent_scale", 0.0) for each in (origin.recipe, recipe))
    if old and old != new:
        raise UserError(
            f"--init {origin.folder} was trained on latents of scale {old:g}, the cache's have {new:g}",
            "make the cache with that checkpoint's tokenizer: hmar tokenize SOURCE "
            f"--tokenizer {origin.folder} --out CACHE",
        )


def masked_job(base: Checkpoint, recipe: Recipe, options: Options, start: Checkpoint | None) -> Job:
    """Put a masked finetuning together."""
    assert isinstance(recipe.objective, MaskedObjective)
    cache, tokenizer = open_cache(options, start)
    names, known = tuple(cache.manifest.class_names), base.class_names
    if cache.manifest.tokenizer_hash != base.tokenizer_hash:
        raise other_tokenizer(str(base.folder), base.tokenizer_hash, cache.manifest.tokenizer_hash)
    if names != known:
        raise UserError(
            f"the cache has {len(names)} classes ({shorten(names)}), "
            f"{base.folder} was trained on {len(known)} ({shorten(known)})",
            "finetune on the data of the base, or train the base on these classes first (hmar train --init)",
        )
    settings, recipe = recipe.objective, adopt_cache(recipe, cache)
    torch.manual_seed(recipe.train.seed)
    model = build_model(replace(recipe, objective=NextScaleObjective()))
    assert isinstance(model, NextScaleTransformer)
    initialize(model, base, known)
    model.attach_masked_branch(settings.layers, settings.leak_free)
    return cache_job(recipe, cache, tokenizer, model, base.licence)


def cache_job(recipe: Recipe, cache: Cache, tokenizer: Tokenizer, model: Model, licence: str) -> Job:
    """The part that both kinds of training on a cache share."""

    def batches(first: int, rank: int, world: int, size: int) -> Iterator[dict[str, Tensor]]:
        return cache_batches(
            cache,
            batch_size=size,
            seed=recipe.train.seed,
            start=first,
            rank=rank,
            world=world,
            mirror=recipe.data.mirror,
        )

    manifest = cache.manifest
    return Job(
        recipe=recipe,
        objective=build_objective(recipe, tokenizer, model),
        batches=batches,
        images=manifest.count,
        skipped=len(manifest.skipped),
        class_names=tuple(manifest.class_names),
        data=str(cache.path),
        fingerprint=lambda weights: manifest.tokenizer_hash,
        tokenizer=cache.tokenizer_path,
        licence=licence,
        preview=sample_preview(recipe, tokenizer, cache),
    )


def execute(job: Job, options: Options, start: Checkpoint | None) -> Outcome:
    """Run a job."""
    out = run_folder(job.recipe, options)
    if options.resume:
        check_same_run(out, start, job)
    if options.dry_run:
        outcome = rehearse(
            job.objective,
            job.batches,
            recipe=job.recipe,
            images=job.images,
            resume=start,
            device=options.device,
        )
        return replace(outcome, data=data_in_words(job))

    def save(
        folder: Path, step: int, weights: Weights, training: tuple[Mapping[str, Tensor], Mapping[str, Any]]
    ) -> None:
        tensors, counters = training
        save_checkpoint(
            folder,
            recipe=job.recipe,
            weights=weights,
            class_names=job.class_names,
            step=step,
            tokenizer=job.tokenizer,
            tokenizer_hash=job.fingerprint(weights),
            licence=job.licence,
            training=(tensors, {**counters, "data": job.data, "images": job.images}),
        )

    outcome = fit(
        job.objective,
        job.batches,
        recipe=job.recipe,
        images=job.images,
        out=out,
        save=save,
        preview=job.preview,
        resume=start,
        device=options.device,
        wandb=options.wandb,
    )
    return replace(outcome, data=data_in_words(job))


def data_in_words(job: Job) -> str:
    """How many images and classes a job trains on, such as "476 images of 3 classes (cat, frog, ship)"."""
    names, skipped = job.class_names, f", {job.skipped:,} more could not be used" if job.skipped else ""
    classes = f" of {len(names)} classes ({shorten(names)})" if len(names) > 1 else ""
    return f"{job.images:,} images{classes}{skipped}"


# Where a run starts


def run_folder(recipe: Recipe, options: Options) -> Path:
    """The folder of the run."""
    return Path(options.out or f"runs/{recipe.name}")


def starting_point(recipe: Recipe, options: Options) -> Checkpoint | None:
    """Look at the run folder before anything is built: the checkpoint to go on from, or None.

    Raises:
        UserError: a run to resume that isn't there, or a new run in a folder that is in use.
    """
    out = run_folder(recipe, options)
    if not options.resume:
        if not options.dry_run and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"{out} is not empty", f"go on with --resume, or choose another folder with --out {out}-2"
            )
        return None
    if not (out / "recipe.toml").is_file():
        raise UserError(f"no run to resume in {out}", "give the --out of the run, or leave out --resume")
    if not list_steps(out):
        console.print(f"{out} has no checkpoint yet: starting at its first step", soft_wrap=True)
        return None
    checkpoint = open_checkpoint(out)
    console.print(f"resuming {checkpoint.folder}", soft_wrap=True)
    return checkpoint


def check_same_run(out: Path, start: Checkpoint | None, job: Job) -> None:
    """Refuse settings and data that would make a resumed run another one.

    Args:
        out: the run folder, whose recipe counts where there is no checkpoint yet.
        start: the checkpoint to go on from.
        job: what is to be run.

    Raises:
        UserError: listing them.
    """
    recipe = start.recipe if start else load_recipe(str(out.absolute() / "recipe.toml"))
    old, new = flat(to_dict(recipe)), flat(to_dict(job.recipe))
    allowed = (*CHANGEABLE, *(f"train.{name}" for name in CHANGEABLE_TRAIN))
    changed = [
        f"{key}: {old.get(key)} in the run, {new.get(key)} now"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(allowed)
    ]
    if start and (images := start.counters()["images"]) != job.images:
        changed.append(f"data: {images} images in the run, {job.images} now")
    if start and start.class_names != job.class_names:
        changed.append(
            f"data: classes {shorten(start.class_names)} in the run, {shorten(job.class_names)} now"
        )
    if changed:
        raise UserError(
            f"a resumed run must keep its settings; {len(changed)} differ",
            f"leave them out, or start a new run with {'--init and ' if start else ''}another --out",
            changed,
        )


def initialize(model: Model, origin: Checkpoint, class_names: tuple[str, ...]) -> None:
    """Load another checkpoint's weights; classes are found by name, a masked branch stays behind.

    Raises:
        UserError: a tokenizer, or a model of another kind or shape.
    """
    weights = {name: w for name, w in origin.load().items() if not name.startswith("masked.")}
    key = "class_embed.weight"
    fresh = model.state_dict().get(key)
    fits = fresh is not None and key in weights and fresh.shape[1] == weights[key].shape[1]
    what = ""
    if fresh is not None and fits and origin.class_names != class_names:
        places = class_places(class_names, origin.class_names)
        weights[key] = remap_class_embedding(weights[key], fresh.cpu(), places)
        new = tuple(name for name, place in zip(class_names, places, strict=True) if place < 0)
        found, count = len(class_names) - len(new), len(class_names)
        what = f"class embeddings: {found} of {count} classes found by name in {origin.folder}"
        what += f"; new, so starting from random numbers: {shorten(new)}" if new else ""
    load_weights(model, weights, origin.folder)
    if what:
        console.print(what, soft_wrap=True, highlight=False, markup=False)


# What data and base say


def open_cache(options: Options, start: Checkpoint | None) -> tuple[Cache, Tokenizer]:
    """Open the cache and the tokenizer that made it.

    Raises:
        UserError: no cache, or another tokenizer than `options.tokenizer`.
    """
    data = options.data or (start.counters()["data"] if start else "")
    if not data:
        raise UserError(
            "models train on a cache: --data is missing",
            "make one with: hmar tokenize SOURCE --tokenizer CHECKPOINT --out CACHE, then give --data CACHE",
        )
    cache = Cache.open(Path(data))
    tokenizer = load_tokenizer(cache.tokenizer_path)
    made_by, carried = cache.manifest.tokenizer_hash, tokenizer.fingerprint()
    if carried != made_by:
        raise other_tokenizer(str(cache.tokenizer_path), carried, made_by)
    if options.tokenizer:
        given = load_tokenizer(options.tokenizer).fingerprint()
        if given != made_by:
            raise other_tokenizer(f"--tokenizer {options.tokenizer}", given, made_by)
    if start is not None and start.tokenizer_hash != made_by:
        raise other_tokenizer(str(start.folder), start.tokenizer_hash, made_by)
    return cache, tokenizer


def other_tokenizer(what: str, found: str, made_by: str) -> UserError:
    """The error about a cache that another tokenizer made."""
    return UserError(
        f"the cache was made by another tokenizer: {what} has {found}, the cache {made_by}",
        "make a cache with this tokenizer: hmar tokenize SOURCE --tokenizer CHECKPOINT --out CACHE",
    )


def adopt_source(recipe: Recipe, source: ImageSource) -> Recipe:
    """Complete a recipe with what a source of images knows: its name, and a classifier's class count.

    Raises:
        UserError: a classifier, and a source that has not several classes.
    """
    recipe = replace(recipe, data=replace(recipe.data, source=source.name))
    if not isinstance(recipe.model, Classifier):
        return recipe
    classes = len(source.class_names)
    if classes < 2:
        raise UserError(
            f"{source.name} has no labels of several classes to learn",
            "give a folder for each class, or say label=COLUMN after a question mark",
        )
    return replace(recipe, model=replace(recipe.model, num_classes=classes))


def adopt_cache(recipe: Recipe, cache: Cache) -> Recipe:
    """Complete a recipe with what the cache knows: class count, image size, and its tokenizer's settings.

    Raises:
        UserError: a cache of another kind, grid, codebook or text than the recipe's.
    """
    manifest, tokenizer = cache.manifest, open_checkpoint(cache.tokenizer_path).recipe.tokenizer
    data = replace(
        recipe.data,
        size=_side(manifest.size),
        pivot_size=_side(manifest.pivot_size) if manifest.pivot_size else None,
    )
    assert recipe.model is not None
    model = replace(recipe.model, num_classes=len(manifest.class_names))
    adopted = replace(recipe, data=data, tokenizer=tokenizer, model=model)
    theirs, ours = _what_cache_holds(adopted, manifest.text), _what_cache_holds(recipe, _text_of(recipe))
    names = ["contents"] if theirs["contents"] != ours["contents"] else ours
    different = [
        f"{name}: {theirs[name]} in the cache, {ours[name]} in the recipe"
        for name in names
        if theirs[name] != ours[name]
    ]
    if different:
        raise UserError(
            f"the cache {cache.path} does not fit recipe '{recipe.name}'",
            f"make one for it: hmar tokenize SOURCE --tokenizer CHECKPOINT --recipe {recipe.name} --out CACHE",
            different,
        )
    return adopted


def _what_cache_holds(recipe: Recipe, text: str) -> dict[str, str]:
    """What model and cache must agree on."""
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, Msvq):
        return {
            "contents": "tokens",
            "scales": str(recipe.scales.sides()),
            "codes": str(tokenizer.vocab_size),
        }
    guided = isinstance(recipe.model, MaskedAr) and recipe.model.pivots != "none"
    pivots = recipe.pivot_grid if guided else None
    return {
        "contents": "latents",
        "tokens": grid_name(recipe.grid),
        "pivots": grid_name(pivots) if pivots else "none",
        "latent channels": str(tokenizer.z_channels),
        **({"text": text} if recipe.text else {}),
    }


def _text_of(recipe: Recipe) -> str:
    return describe(recipe.text) if recipe.text else ""


def _side(size: Sequence[int]) -> Side:
    height, width = size
    return height if height == width else (height, width)


def adopt_base(recipe: Recipe, base: Checkpoint) -> Recipe:
    """Complete a masked recipe with the model and tokenizer of its base.

    Raises:
        UserError: the base is no next-scale model, or not the one that the recipe is for.
    """
    check_base(base)
    assert isinstance(base.recipe.model, NextScale)
    theirs = flat(to_dict(base.recipe.model))
    ours = flat(to_dict(recipe.model)) if recipe.model else theirs
    free = ("num_classes", "attention", "drop_path", "gamma_init")
    other = [
        f"model.{key}: {ours.get(key)} in the recipe, {theirs.get(key)} in {base.folder}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key) and key not in free
    ]
    if other:
        raise UserError(
            f"recipe '{recipe.name}' is for another model than {base.folder}",
            "give the recipe of this model with --recipe, or repeat the base's own --set model.…",
            other,
        )
    model = base.recipe.model
    if isinstance(recipe.model, NextScale):
        model = replace(model, attention=recipe.model.attention)  # how it is computed is this run's own
    return replace(recipe, model=model, tokenizer=base.recipe.tokenizer)


def check_base(base: Checkpoint) -> None:
    """Refuse what masked finetuning cannot start from.

    Raises:
        UserError: a tokenizer, or a VAR.
    """
    if not isinstance(base.recipe.model, NextScale):
        raise UserError(
            f"{base.folder} holds a {base.kind}, not a next-scale model", "give the checkpoint of an HMAR"
        )
    if base.recipe.model.pattern != "diagonal":
        raise UserError(
            f"{base.folder} is a VAR, whose tokens see all earlier scales",
            "masked finetuning needs a base with model.pattern = diagonal, such as recipe hmar-tiny",
        )


def weights_fingerprint(recipe: Recipe, weights: Weights) -> str:
    """Fingerprint of the tokenizer or classifier that readers get: the averaged one where there is one."""
    chosen = weights["ema" if "ema" in weights else "model"]
    if isinstance(recipe.model, Classifier):
        return hash_weights(chosen, b"classifier")
    return (
        kl.fingerprint(chosen)
        if isinstance(recipe.tokenizer, Kl)
        else msvq.fingerprint(recipe.scales, chosen)
    )


def shorten(names: tuple[str, ...]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
