"""The classifier as a network: shapes, what it sees, its size by formula."""

import pytest
import torch

from hmar_cli.builders import build_image_network
from hmar_cli.models.classifier import GROUP, ImageClassifier, group_norm
from hmar_cli.recipe import load_recipe
from hmar_cli.sizes import model_parameters


def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(channels=8, multipliers=(1, 2), res_blocks=1, num_classes=3).eval()


def test_features_and_logits_of_images_of_any_size() -> None:
    network = classifier()
    for height, width in ((8, 8), (7, 13), (1, 1)):
        images = torch.rand(2, 3, height, width) * 2 - 1
        features = network.features(images)
        assert features.shape == (2, network.width) == (2, 16) and features.dtype == torch.float32
        assert torch.equal(network(images), network.head(features)) and network(images).shape == (2, 3)


def test_an_image_is_judged_by_itself() -> None:
    network, images = classifier(), torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


def test_norms_take_channels_together() -> None:
    groups = {channels: group_norm(channels).num_groups for channels in (3, 16, 24, 64, 50, 256)}
    assert groups == {3: 1, 16: 1, 24: 1, 64: 4, 50: 1, 256: 16}
    bright = torch.ones(1, GROUP, 4, 4)
    bright[:, 0] = 3  # a mean over places tells the channels apart after the norm
    assert group_norm(GROUP)(bright).mean(dim=(2, 3)).std() > 0.5


@pytest.mark.parametrize("name", ["classifier-tiny", "classifier-cifar10", "classifier-tin40"])
def test_the_listed_size_is_the_built_one(name: str) -> None:
    for change in ([], ["model.res_blocks=3"], ["model.multipliers=[2,2,3]"]):
        recipe = load_recipe(name, change)
        with torch.device("meta"):
            built = build_image_network(recipe)
        assert sum(parameter.numel() for parameter in built.parameters()) == model_parameters(recipe)
