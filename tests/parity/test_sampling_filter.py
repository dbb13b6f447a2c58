"""Top-k and top-p against what the published sampling function keeps."""

from pathlib import Path

import golden
import pytest
import torch

from hmar_cli.sampling.next_scale import filter_logits


@pytest.mark.parametrize("path", golden.fixtures_of("sampling-filter"), ids=golden.fixture_id)
def test_filter(path: Path) -> None:
    about, tensors = golden.load_fixture(path)
    for top_k, top_p in about["config"]["pairs"]:
        name = f"k{top_k}_p{top_p:g}"
        filtered = filter_logits(tensors["in.logits"], top_k, top_p)
        assert torch.equal(filtered, tensors[f"out.filtered.{name}"]), name
        assert torch.equal(filtered.isfinite().sum(-1), tensors[f"out.kept.{name}"]), name
        torch.testing.assert_close(
            filtered.softmax(-1), tensors[f"out.probs.{name}"], **golden.tolerance(about)
        )


@pytest.mark.parametrize("path", golden.fixtures_of("sampling-filter"), ids=golden.fixture_id)
def test_ties_with_the_kth_are_kept(path: Path) -> None:
    about, tensors = golden.load_fixture(path)
    for top_k in about["config"]["ties_top_k"]:
        filtered = filter_logits(tensors["in.logits_ties"], top_k, 0.0)
        assert torch.equal(filtered, tensors[f"out.filtered_ties.k{top_k}"])
        assert torch.equal(filtered.isfinite().sum(-1), tensors[f"out.kept_ties.k{top_k}"])
