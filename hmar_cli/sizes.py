"""Parameter counts of models by closed formula, without building them (and without PyTorch)."""

import math

from hmar_cli.settings import (
    Classifier,
    ClipText,
    JointText,
    MaskedAr,
    MaskedObjective,
    Msvq,
    NextScale,
    Recipe,
)

VOCABULARY = 49408  # of open_clip's text transformer
TOWERS = {"ViT-B-32": (77, 512), "ViT-B-16": (77, 512), "ViT-L-14": (77, 768)}
"""Context length and width of the usual CLIP text towers."""


def model_parameters(recipe: Recipe) -> int | None:
    """Trainable parameters of a recipe's model; None if it has none, or has a text tower that is not in `TOWERS`.

    A masked HMAR counts as the merged model: the shared blocks, and two copies of the finetuned ones. A text
    encoder that is trained along counts, a frozen one does not.
    """
    if isinstance(recipe.model, NextScale):
        return _next_scale(recipe, recipe.model)
    if isinstance(recipe.model, MaskedAr):
        return _masked_ar(recipe, recipe.model)
    return _classifier(recipe.model) if recipe.model else None


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block(width: int, hidden: int) -> int:
    """Attention and feed-forward of a transformer block, without norms."""
    return _linear(width, 3 * width) + _linear(width, width) + _linear(width, hidden) + _linear(hidden, width)


def _classifier(model: Classifier) -> int:
    channels = [model.channels * multiplier for multiplier in model.multipliers]
    total, inputs = 3 * 9 * model.channels, model.channels
    for level, width in enumerate(channels):
        for block in range(model.res_blocks):
            total += 2 * inputs + 9 * inputs * width + 2 * width + 9 * width * width
            total += inputs * width if inputs != width or (level and not block) else 0
            inputs = width
    return total + 2 * inputs + _linear(inputs, model.num_classes)


def _next_scale(recipe: Recipe, model: NextScale) -> int:
    tokenizer, scales = recipe.tokenizer, recipe.scales
    assert isinstance(tokenizer, Msvq)
    width, hidden, vocabulary = model.width, round(model.width * model.mlp_ratio), tokenizer.vocab_size
    modulation = _linear(width, 6 * width)
    block = _block(width, hidden) - width + model.heads  # keys have no bias, heads a temperature
    block += 6 * width if model.shared_adaln else modulation
    head = _linear(width, 2 * width) + _linear(width, vocabulary)  # modulated norm, then logits
    embeddings = (model.num_classes + 1 + scales.lengths[0] + scales.total + len(scales)) * width
    total = embeddings + _linear(tokenizer.z_channels, width) + model.depth * block + head
    if model.shared_adaln:
        total += modulation
    if isinstance(recipe.objective, MaskedObjective):
        total += recipe.objective.layers * block + head + width  # and the mask embedding
    return total


def _masked_ar(recipe: Recipe, model: MaskedAr) -> int | None:
    width, channels = model.width, recipe.tokenizer.z_channels
    condition = _condition(recipe, model)
    if condition is None:
        return None
    conditions, context = condition
    grid = recipe.pivot_grid if model.pivots != "none" else None
    pivots, phases = (0, 1) if grid is None else (math.prod(grid), 2)
    places = pivots + math.prod(recipe.grid)
    total = conditions + width  # and what stands for no condition
    total += (
        _linear(channels, width) + 2 * width + _linear(width, width)
    )  # tokens, their norm, decoder's input
    total += (
        phases * places if pivots else 1
    ) * width + places * width  # mask tokens, positions for the heads
    for depth in (model.encoder_depth, model.decoder_depth):
        total += _stack(model, depth, phases, context + places)
    if pivots:
        total += _linear(channels, width) + pivots * channels  # pivots, and empty ones
        total += _linear(width, width) if model.pivots == "conditional" else 0
        total += _head(model.pivot_head, model.pivot_head_depth, model.pivot_head_width, width, channels)
    return total + _head(model.dense_head, model.dense_head_depth, model.dense_head_width, width, channels)


def _condition(recipe: Recipe, model: MaskedAr) -> tuple[int, int] | None:
    """Parameters of the condition's embedding, and context tokens in front; None of an unknown tower."""
    if isinstance(recipe.text, JointText):
        text = recipe.text
        layers = text.depth * (_block(text.width, 4 * text.width) + 4 * text.width)
        tower = (VOCABULARY + text.context_length + 2) * text.width + layers
        return tower + _linear(text.width, model.width), text.context_length
    if isinstance(recipe.text, ClipText):
        if recipe.text.tower not in TOWERS:
            return None
        context, width = TOWERS[recipe.text.tower]
        return _linear(width, model.width), context
    return model.num_classes * model.width, model.buffer_size


def _stack(model: MaskedAr, depth: int, phases: int, places: int) -> int:
    """Encoder or decoder: positions, blocks, norm, scale vector."""
    width = model.width
    block = _block(width, round(width * model.mlp_ratio)) + 4 * width  # two norms
    vector = 0
    if model.scale_vector == "table":
        block += 2 * phases * 4 * width
        vector = phases * width + _linear(width, 4 * width)
    elif model.scale_vector == "sinusoidal":
        block += 2 * 6 * width
        vector = _linear(2 * (width // 2), width) + _linear(width, 6 * width)
    return phases * places * width + depth * block + 2 * width + vector


def _head(kind: str, depth: int, width: int, condition: int, channels: int) -> int:
    """A diffusion head: embeddings of time, condition and token, blocks, a modulated output."""
    total = _linear(256, width) + _linear(width, width) + _linear(condition, width) + _linear(channels, width)
    total += _linear(width, 2 * width)
    if kind == "mlp":
        block = 2 * width + 2 * _linear(width, width) + _linear(width, 3 * width)
        return total + depth * block + _linear(width, 2 * channels)
    block = _block(width, 4 * width) + _linear(width, 6 * width)
    return total + depth * block + _linear(width, channels)
