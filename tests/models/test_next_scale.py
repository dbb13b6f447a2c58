import math

import pytest
import torch
from hmar_kernels import unserved

from hmar_cli.models import layers
from hmar_cli.models.layers import ScaleAttention
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales


def tiny(**changes: object) -> NextScaleTransformer:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "scales": Scales.of([1, 2, 3]),
        "z_channels": 4,
        "vocab_size": 16,
        "num_classes": 5,
        "depth": 3,
        "width": 32,
        "heads": 2,
        "pattern": "diagonal",
    }
    return NextScaleTransformer(**{**settings, **changes}).eval()  # type: ignore[arg-type]


def lively(model: NextScaleTransformer) -> NextScaleTransformer:
    """Draw weights large enough that every path shows in the output."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
@torch.inference_mode()
def test_scale_by_scale_equals_the_whole(pattern: str, shared: bool) -> None:
    """Sampling's calls, with VAR's cache, compute what teacher forcing does."""
    model = lively(tiny(pattern=pattern, shared_adaln=shared))
    labels, inputs = torch.tensor([1, 5]), torch.randn(2, 13, 4)
    whole = model(labels, inputs)
    cache = model.make_cache(2, torch.float32)
    assert (cache is None) == (pattern == "diagonal")
    padded = torch.cat([torch.zeros(2, 1, 4), inputs], dim=1)
    for k in range(3):
        part = model.scales.slice(k)
        logits = model.forward_scale(k, model.condition(labels), padded[:, part] if k else None, cache=cache)
        torch.testing.assert_close(logits, whole[:, part], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_markov_property() -> None:
    """HMAR's scale depends on its own input alone; VAR's later scales feel earlier inputs."""
    labels, inputs = torch.tensor([1]), torch.randn(1, 13, 4)
    changed = inputs.clone()
    changed[:, :4] += 1  # input of the second scale
    for pattern, felt in (("diagonal", False), ("causal", True)):
        model = lively(tiny(pattern=pattern))
        before, after = model(labels, inputs), model(labels, changed)
        assert not torch.equal(before[:, 1:5], after[:, 1:5])
        assert torch.equal(before[:, 5:], after[:, 5:]) != felt


@torch.inference_mode()
def test_masked_branch_starts_as_a_copy_and_ignores_masked_tokens() -> None:
    model = lively(tiny(masked_layers=2))
    labels, inputs = torch.tensor([1]), torch.randn(1, 13, 4)
    own, mask = torch.randn(1, 13, 4), torch.zeros(13, dtype=torch.bool)
    mask[[1, 6]] = True
    changed = own.clone()
    changed[:, mask] += 1
    assert torch.equal(model(labels, inputs, own, mask), model(labels, inputs, changed, mask))
    changed[:, 0] += 1
    assert not torch.equal(model(labels, inputs, own, mask), model(labels, inputs, changed, mask))

    fresh = lively(tiny())
    branch = fresh.attach_masked_branch(2)
    for i, block in enumerate(branch.blocks):
        for name, value in block.state_dict().items():
            assert torch.equal(value, fresh.blocks[1 + i].state_dict()[name])
    branch.mask_embed.zero_()
    nothing = torch.zeros_like(inputs)
    assert torch.equal(
        fresh(labels, inputs), fresh(labels, inputs, nothing, torch.ones(13, dtype=torch.bool))
    )


def test_initialisation() -> None:
    """Standard deviations of the published recipe."""
    model = tiny(depth=4, width=256, heads=4, gamma_init=1e-3)
    std = math.sqrt(1 / (3 * 256))
    block = model.blocks[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.attention.proj.weight.std().item() == pytest.approx(std / math.sqrt(8), rel=0.05)
    assert model.head.linear.weight.std().item() == pytest.approx(std * 0.02, rel=0.05)
    rows = block.adaln.linear.weight.unflatten(0, (6, 256)).std(dim=(1, 2)).tolist()
    assert rows == pytest.approx([std * 1e-3] * 2 + [std * 0.5] * 4, rel=0.05)
    assert block.attention.log_scale.tolist() == pytest.approx([math.log(4)] * 4)


def test_drop_path_rises_to_its_rate() -> None:
    assert [b.drop_path_rate for b in tiny(drop_path_rate=0.2).blocks] == pytest.approx([0, 0.1, 0.2])
    assert tiny().blocks[-1].drop_path_rate == pytest.approx(0.1 * 3 / 24)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="heads divide"):
        tiny(heads=3)
    with pytest.raises(ValueError, match="masked layers"):
        tiny(masked_layers=4)


def implementations(model: NextScaleTransformer) -> set[str]:
    return {module.implementation for module in model.modules() if isinstance(module, ScaleAttention)}


@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_attention_is_settled_before_a_run(pattern: str) -> None:
    """One implementation for all blocks, those of the masked branch too."""
    model = tiny(pattern=pattern, masked_layers=1)
    assert model.select_attention(4, torch.float32)[0] == "sdpa"
    assert implementations(model) == {"auto"}  # wherever the model is moved
    assert tiny(attention="masked").select_attention(4, torch.float32) == ("masked", "asked for by name")
    measured = tiny(attention="measure", pattern=pattern)
    for sampling in (False, True):
        assert measured.select_attention(4, torch.float32, sampling=sampling)[0] == "sdpa"
        assert implementations(measured) == {"sdpa"}


def test_attention_of_another_machine_is_replaced_for_sampling_alone() -> None:
    model = tiny(attention="flex")
    with pytest.raises(ValueError, match=r"'flex' cannot run here: .* CUDA"):
        model.select_attention(4, torch.float32)
    choice = model.select_attention(4, torch.float32, sampling=True)
    assert choice.name == "sdpa" and "'flex' cannot run here" in choice.reason
    assert implementations(model) == {"auto"}
    with torch.inference_mode():
        assert model.forward_scale(0, model.condition(torch.tensor([1])), None).isfinite().all()


@pytest.mark.skipif(
    unserved(torch.zeros(1)) is not None, reason="tests/gpu has this where kernels are compiled"
)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pattern", ["causal", "diagonal"])
def test_kernels_change_nothing_but_the_rounding(
    pattern: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Triton's interpreter makes of them is as near to float32 as PyTorch is under autocast."""
    model = lively(tiny(pattern=pattern))
    labels, inputs = torch.tensor([1, 5]), torch.randn(2, 13, 4)
    padded = torch.cat([torch.zeros(2, 1, 4), inputs], dim=1)
    ran: list[str] = []
    for name in ("gated_sum", "modulated_norm", "unit_heads"):
        kernel = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *given, k=kernel, n=name: ran.append(n) or k(*given))

    def draft(fuse: bool, half: bool) -> torch.Tensor:
        monkeypatch.setattr(layers, "fuses", lambda x: fuse)
        cache = model.make_cache(2, torch.bfloat16 if half else torch.float32)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            condition = model.condition(labels)
            parts = [padded[:, model.scales.slice(k)] if k else None for k in range(3)]
            return torch.cat(
                [model.forward_scale(k, condition, part, cache=cache) for k, part in enumerate(parts)], dim=1
            )

    found = draft(True, half)
    calls = 3 * 3  # of every block at every scale
    assert ran.count("gated_sum") == 2 * calls and ran.count("modulated_norm") == 2 * calls + 3
    assert ran.count("unit_heads") == (2 * calls if pattern == "causal" else 0)
    exact, plain = draft(False, False), draft(False, half)
    if half:
        errors = [float((x - exact).square().mean().sqrt()) for x in (found, plain)]
        assert errors[0] < 1.5 * errors[1]
    else:
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_branches_are_dropped_in_training_whatever_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "fuses", lambda x: True)
    monkeypatch.setattr(layers, "modulated_norm", lambda x, *_: x)
    block = lively(tiny(drop_path_rate=0.9)).blocks[-1].train()
    x = torch.randn(64, 4, 32)
    with torch.no_grad():
        kept = (block(x, torch.randn(64, 32), ((2, 2),)) != x).flatten(1).any(1)
    assert 0 < kept.sum() < 32
