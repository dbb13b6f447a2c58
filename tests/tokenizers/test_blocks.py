"""Convolutional blocks: groups, shapes at odd sizes, and what their initial weights promise."""

import pytest
import torch

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
