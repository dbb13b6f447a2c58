"""Attention is that of the layers themselves; sums over it are right where the answer is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hmar_cli.analysis import attention as analysis
from hmar_cli.analysis.attention import (
    Patterns,
    attention_by_distance,
    attention_rows,
    attention_weights,
    measure_attention,
    positions,
    relative_reach,
    scale_pairs,
    watch_inputs,
)
from hmar_cli.analysis.held_out import HeldOut, Subject
from hmar_cli.analysis.scales import predict
from hmar_cli.models.layers import ScaleAttention
from hmar_cli.models.scales import Scales

Load = Callable[[str], Subject]
SCALES = Scales.of([1, 2, 3])


def layer_and_input(pattern: str) -> tuple[ScaleAttention, Tensor]:
    torch.manual_seed(0)
    layer = ScaleAttention(16, 2, pattern, "reference")  # type: ignore[arg-type]
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.requires_grad_(False), torch.randn(3, SCALES.total, 16)


def place(patterns: Patterns, k: int) -> slice:
    return patterns.scales.slice(k)


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_weights_are_those_by_which_the_layer_mixes_values(pattern: str) -> None:
    layer, x = layer_and_input(pattern)
    patterns = Patterns(SCALES, pattern == "causal", 1, 2, torch.device("cpu"))
    values = (x @ layer.qkv.weight[32:].T + layer.v_bias).unflatten(-1, (2, 8))  # [B, L, H, D]
    mixed = []
    for k in range(3):
        weights = attention_weights(layer, x, SCALES.slice(k), patterns.keys(k))  # [B, H, q, m]
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
        mixed.append(torch.einsum("bhqm,bmhd->bqhd", weights, values[:, patterns.keys(k)]).flatten(2))
    wanted = layer(x, SCALES.grids)
    torch.testing.assert_close(layer.proj(torch.cat(mixed, dim=1)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_a_layer_that_looks_everywhere_alike_is_even(pattern: str) -> None:
    layer, x = layer_and_input(pattern)
    layer.qkv.weight[:32] = 0  # no query or key tells one token from another
    layer.q_bias.zero_()
    patterns = Patterns(SCALES, pattern == "causal", 1, 2, torch.device("cpu"))
    patterns.add(0, layer, x)
    patterns.images = 3
    for row in (*attention_rows("even", patterns), *scale_pairs("even", patterns)):
        assert row["share"] == pytest.approx(row["even_share"], rel=1e-5)
        assert row["distance"] == pytest.approx(row["even_distance"], rel=1e-5)
    assert relative_reach(patterns).tolist() == [pytest.approx([1.0, 1.0], rel=1e-5)]
    distances, means = attention_by_distance(patterns, 2)
    assert distances == [0, 1, 2, 3] and means == pytest.approx([1.0] * 4, rel=1e-5)
    causal = {(2, 1): 1 / 5, (2, 2): 4 / 5, (3, 1): 1 / 14, (3, 2): 4 / 14, (3, 3): 9 / 14}
    shares = {(row["query_scale"], row["key_scale"]): row["share"] for row in scale_pairs("even", patterns)}
    wanted = causal if pattern == "causal" else {(2, 2): 1.0, (3, 3): 1.0}
    assert shares == pytest.approx({(1, 1): 1.0, **wanted}, rel=1e-5)


def test_a_layer_that_looks_at_its_own_place_goes_no_distance() -> None:
    patterns = Patterns(SCALES, False, 1, 1, torch.device("cpu"))
    for k, n in enumerate(SCALES.lengths):
        patterns._add_queries(0, k, SCALES.slice(k), 2 * torch.eye(n)[None])  # of two images
    patterns.images = 2
    assert [row["distance"] for row in scale_pairs("own", patterns)] == [0, 0, 0]
    assert relative_reach(patterns).item() == 0
    assert attention_by_distance(patterns, 2) == ([0, 1, 2, 3], [9, 0, 0, 0])


def test_distances_are_in_sides_of_the_image() -> None:
    far = Patterns(Scales.of([1, (2, 4)]), True, 1, 1, torch.device("cpu")).far
    assert positions(Scales.of([(1, 2)])).tolist() == [[0.5, 0.25], [0.5, 0.75]]
    assert far[0, 1] == pytest.approx((0.25**2 + 0.375**2) ** 0.5)  # from the middle to the first of 2 x 4
    assert far[1, 4] == pytest.approx(0.75) and far[1, 5] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["var", "hmar"])
def test_a_model_is_watched_in_parts_of_any_size(
    name: str, load: Load, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load(name)
    whole = measure_attention(subject, held_out, batch_size=7)
    monkeypatch.setattr(analysis, "CHUNK", 1)  # a query at a time
    parts = measure_attention(subject, held_out, batch_size=3)
    assert whole.images == parts.images == 7
    for key in ("mass", "reach", "matrix"):
        torch.testing.assert_close(getattr(parts, key), getattr(whole, key), rtol=1e-4, atol=1e-5)
    totals = whole.mass.sum(dim=3) / 7
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=1e-5, atol=1e-5)
    seen = whole.matrix.sum(dim=1) / 7
    torch.testing.assert_close(seen, torch.ones_like(seen), rtol=1e-4, atol=1e-4)
    rows = attention_rows(name, whole)
    assert len(rows) == 2 * 2 * (21 if name == "var" else 6)
    heads = [row["share"] for row in rows if (row["query_scale"], row["key_scale"]) == (6, 6)]
    mean = scale_pairs(name, whole)[-1]["share"]
    assert sum(float(h or 0) for h in heads) / 4 == pytest.approx(mean, rel=1e-9)


def test_layers_are_left_as_they_were(load: Load, held_out: HeldOut) -> None:
    subject, calls = load("masked"), []
    labels = held_out.labels(subject.checkpoint)
    with torch.no_grad():
        with watch_inputs(subject.model, lambda block, layer, x: calls.append((block, x.shape))):
            predict(subject, held_out.tokens, labels, None)
        predict(subject, held_out.tokens, labels, None)
    assert calls == [(0, (7, 130, 64)), (1, (7, 130, 64))]
