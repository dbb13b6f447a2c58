"""Losses of tokenizer training."""

import pytest
import torch

from hmar_cli.errors import UserError
from hmar_cli.tokenizers.losses import (
    VGG_SLICES,
    Lpips,
    PatchDiscriminator,
    RandomFeatureDistance,
    hinge_discriminator_loss,
    hinge_generator_loss,
    psnr,
)


def images(count=2, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def lpips_state():
    generator = torch.Generator().manual_seed(1)
    state = {}
    for i, layers in enumerate(VGG_SLICES):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, layers[-1][2], 1, 1, generator=generator)
        for place, c_in, c_out in layers:
            weight = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / 9 / c_in) ** 0.5
            state[f"net.slice{i + 1}.{place}.weight"] = weight
            state[f"net.slice{i + 1}.{place}.bias"] = torch.zeros(c_out)
    return state


def test_psnr_of_known_errors():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]))
    assert (
        psnr(a + 1, a + 5)[0] == psnr(a, a)[0] == 10 * torch.log10(torch.tensor(4e10))
    )  # clamped to [-1, 1]


def test_random_features_are_the_same_everywhere_and_in_no_checkpoint():
    torch.manual_seed(1)
    first = RandomFeatureDistance()
    torch.manual_seed(2)
    second = RandomFeatureDistance()
    assert first.state_dict() == {} and list(first.parameters()) == []
    for (_, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(a, b)
    # two numbers of torch's CPU generator, scaled: known values, so that old runs can be continued
    draws = torch.randn(2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws, torch.tensor([1.5409961, -0.2934289]))


@pytest.mark.parametrize("side", [4, 8, 32])
def test_random_feature_distance_orders_pictures(side):
    distance, a = RandomFeatureDistance(), images(side=side)
    assert torch.equal(distance(a, a), torch.zeros(2))
    near, far = distance(a, a + 0.05 * images(side=side, seed=1)), distance(a, images(side=side, seed=2))
    assert (near > 0).all() and (near < far).all()


def test_gradients_reach_the_picture_only():
    distance, a, b = RandomFeatureDistance(), images(), images(seed=1).requires_grad_()
    distance(a.requires_grad_(), b).sum().backward()
    assert a.grad is None and b.grad.abs().sum() > 0


def test_constant_pictures_give_finite_gradients():
    b = torch.zeros(1, 3, 16, 16, requires_grad=True)
    RandomFeatureDistance()(torch.full((1, 3, 16, 16), 0.5), b).sum().backward()
    assert torch.isfinite(b.grad).all()


def test_lpips_from_a_local_file_agrees_with_torch_fidelity(tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from torch_fidelity import sample_similarity_lpips as theirs

    state = lpips_state()
    torch.save(state, tmp_path / "lpips.pth")
    save_file(state, tmp_path / "lpips.safetensors")
    ours, same = Lpips(str(tmp_path / "lpips.pth")), Lpips(str(tmp_path / "lpips.safetensors"))
    lins = {key: value for key, value in state.items() if key.startswith("lin")}
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: lins)
    import torchvision

    blank = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", lambda: blank)
    reference = theirs.SampleSimilarityLPIPS("x")
    reference.net.load_state_dict(
        {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    )
    a, b = images(side=32), images(side=32, seed=1)
    expected = reference((a + 1) * 127.5, (b + 1) * 127.5).flatten()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours(a, b), same(a, b))
    assert all(not parameter.requires_grad for parameter in ours.parameters())


def test_lpips_names_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(UserError, match="no file of LPIPS weights"):
        Lpips(str(tmp_path / "absent.pth"))
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"lin\.0 is missing"):
        Lpips(str(tmp_path / "other.pth"))


def test_lpips_without_network_says_how_to_go_on(monkeypatch):
    from torch_fidelity import sample_similarity_lpips as theirs

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(theirs, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="no route") as caught:
        Lpips()
    assert "random" in caught.value.hint


@pytest.mark.parametrize(("halvings", "side"), [(2, 32), (3, 128)])
def test_discriminator_scores_patches_and_keeps_no_state(halvings, side):
    network = PatchDiscriminator(8, halvings)
    assert network(images(side=side)).shape[:2] == (2, 1)
    assert network(images(side=side)).ndim == 4 and list(network.buffers()) == []
    with torch.autocast("cpu", torch.bfloat16):  # the hinge's means need more than 8 bits
        assert network(images(side=side)).dtype == torch.float32


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert hinge_generator_loss(fake).item() == pytest.approx(0.75)
