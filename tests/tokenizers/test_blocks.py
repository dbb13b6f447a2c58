"""Convolutional blocks: groups, shapes at odd sizes, and what their initial weights promise."""

import copy

import pytest
import torch
from hmar_kernels import unserved

from hmar_cli.tokenizers import blocks
from hmar_cli.tokenizers.blocks import AttentionBlock, Decoder, Encoder, ResBlock, group_norm, initialize


@pytest.mark.parametrize(
    ("channels", "groups"), [(160, 32), (32, 32), (96, 32), (48, 4), (24, 2), (20, 1), (8, 2), (3, 1)]
)
def test_groups(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups and norm.eps == 1e-6


def test_attention_mixes_positions_and_only_those_of_its_image():
    torch.manual_seed(0)
    block, x = AttentionBlock(8), torch.randn(2, 8, 3, 5)
    changed = x.clone()
    changed[0, :, 0, 0] += 1
    a, b = block(x), block(changed)
    assert a.shape == x.shape and torch.equal(a[1], b[1])
    assert not torch.allclose(a[0, :, 2, 4], b[0, :, 2, 4])


def test_initial_residual_branches_are_zero():
    torch.manual_seed(0)
    block, attention, x = ResBlock(8, 8), AttentionBlock(8), torch.randn(2, 8, 4, 4)
    assert not torch.equal(block(x), x)
    initialize(block, attention)
    assert torch.equal(block(x), x) and torch.equal(attention(x), x)


def test_initial_weights_keep_the_variance():
    torch.manual_seed(0)
    shape = {"channels": 24, "multipliers": (1, 1, 2, 2), "res_blocks": 2}
    encoder, decoder = Encoder(**shape, out_channels=16), Decoder(**shape, in_channels=16)
    initialize(encoder, decoder)
    with torch.no_grad():
        features = encoder(torch.randn(4, 3, 48, 32))
        pictures = decoder(torch.randn(4, 16, 6, 4))
    assert features.shape == (4, 16, 6, 4) and pictures.shape == (4, 3, 48, 32)
    assert 0.3 < features.std() < 1.2 and 0.3 < pictures.std() < 1.2


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """With weights and biases that all matter."""
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return module


@pytest.mark.skipif(bool(unserved(torch.zeros(1, 1, 1, 1))), reason="tests/gpu has it where Triton compiles")
@pytest.mark.parametrize("what", ["block", "wider block", "attention", "encoder", "decoder"])
def test_kernels_change_nothing_but_the_rounding(what, monkeypatch):
    """What Triton's interpreter makes of them is as near to float64 as PyTorch is in float32."""
    torch.manual_seed(0)
    shape = {"channels": 8, "multipliers": (1, 2), "res_blocks": 1}
    module, x = {
        "block": (ResBlock(24, 24), torch.randn(2, 24, 5, 7)),
        "wider block": (ResBlock(8, 12), torch.randn(2, 8, 5, 7)),
        "attention": (AttentionBlock(16), torch.randn(2, 16, 3, 5)),
        "encoder": (Encoder(**shape, out_channels=4), torch.randn(2, 3, 8, 12)),
        "decoder": (Decoder(**shape, in_channels=4), torch.randn(2, 4, 4, 6)),
    }[what]
    module = randomized(module)
    with torch.no_grad():
        exact, plain = copy.deepcopy(module).double()(x.double()), module(x)
        monkeypatch.setattr(blocks, "fuses", lambda x: True)
        monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda norm, x: pytest.fail(f"{norm} ran"))
        found = module(x)
    assert found.dtype == plain.dtype
    assert found.is_contiguous() or what not in ("encoder", "decoder")
    errors = [float((y - exact).square().mean().sqrt()) for y in (found, plain)]
    assert errors[0] < 2 * errors[1] and errors[1] < 1e-5 * float(exact.abs().max())
