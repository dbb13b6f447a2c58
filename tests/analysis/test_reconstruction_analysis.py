"""Images of which a part is known: it is kept, the rest is the model's, and numbers are of what the model chose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hmar_cli.analysis import reconstruction as analysis
from hmar_cli.analysis.held_out import HeldOut, Subject, read_held_out
from hmar_cli.analysis.reconstruction import (
    Bench,
    Version,
    half_masked,
    half_masked_figure,
    judge_all,
    known_scales,
    known_scales_figure,
)
from hmar_cli.analysis.scales import draw_masks
from hmar_cli.evaluation.extractors import Extractor, open_extractor
from hmar_cli.report import to_uint8
from hmar_cli.sampling.next_scale import sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import NextScaleSample

Load = Callable[[str], Subject]
SETTINGS = NextScaleSample(cfg=1.0, top_k=50, top_p=0.9)
ALL = slice(0, 7)


class Means(nn.Module):
    """The mean colour of each quarter: features whose distance is easily told."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)


@pytest.fixture
def means(tmp_path: Path) -> Extractor:
    torch.jit.save(torch.jit.script(Means()), tmp_path / "means.pt")
    return open_extractor(f"torchscript:{tmp_path / 'means.pt'}")


@pytest.mark.parametrize("name", ["var", "hmar", "masked"])
def test_known_scales_are_true_and_the_others_are_the_samplers(
    name: str, load: Load, held_out: HeldOut
) -> None:
    subject = load(name)
    refined = replace(SETTINGS, schedule=((1,), (1, 3), (9,), (16,), (36,), (64,)))
    settings = refined if name == "masked" else SETTINGS
    versions = known_scales(subject, held_out, settings, seed=2, precision="fp32")
    assert [version.cells["known_scales"] for version in versions] == list(range(7))
    scales, labels = subject.model.scales, held_out.labels(subject.checkpoint)
    free, _ = sample_next_scale(
        subject.model, subject.codec.quantizer, labels, settings, PhiloxNoise(2, torch.arange(7))
    )
    assert torch.equal(versions[0].fill(ALL)[0], free)
    for known, version in enumerate(versions):
        tokens, mine = version.fill(ALL)
        start = scales.offsets[known] if known < 6 else scales.total
        assert torch.equal(tokens[:, :start], held_out.tokens[:, :start])
        assert torch.equal(mine, (torch.arange(scales.total) >= start).expand(7, -1))
        if known < 6:
            assert not torch.equal(tokens[:, start:], held_out.tokens[:, start:])
    part = versions[3].fill(slice(2, 5))[0]
    assert torch.equal(part, versions[3].fill(ALL)[0][2:5])  # an image is the same in any batch


@pytest.mark.parametrize("name", ["masked", "leak-free"])
def test_masked_prediction_keeps_what_is_not_masked(name: str, load: Load, held_out: HeldOut) -> None:
    subjects = [load("var"), load(name)]
    versions = half_masked(subjects, held_out, share=0.5, seed=3)
    labels = [version.label for version in versions]
    assert labels == [
        "tokenizer",
        "var, next-scale",
        f"{name}, next-scale",
        f"{name}, masked",
        "from another image",
    ]
    scales = subjects[0].model.scales
    masks = draw_masks(scales, range(7), 3, 0.5)
    chosen = torch.cat([masks.new_zeros(7, 1), masks], dim=1)
    for version in versions[3:]:
        tokens, mine = version.fill(ALL)
        assert torch.equal(mine, chosen)
        assert torch.equal(tokens[~chosen], held_out.tokens[~chosen])
    assert torch.equal(versions[4].fill(ALL)[0][chosen], held_out.tokens.roll(-1, 0)[chosen])
    tokens, mine = versions[0].fill(ALL)
    assert torch.equal(tokens, held_out.tokens) and not mine.any()
    tokens, mine = versions[1].fill(ALL)
    with torch.no_grad():
        inputs = subjects[0].codec.quantizer.teacher_inputs(held_out.tokens)
        logits = subjects[0].model(held_out.labels(subjects[0].checkpoint), inputs)
    assert torch.equal(tokens, logits.argmax(dim=-1)) and mine.all()


def test_numbers_are_of_what_was_chosen(load: Load, held_out: HeldOut, means: Extractor) -> None:
    codec = load("var").codec
    bench = Bench(held_out, codec, means, batch_size=3, shown=4)

    def fill(part: slice) -> tuple[Tensor, Tensor]:
        tokens, mine = (
            held_out.tokens[part].clone(),
            torch.zeros(part.stop - part.start, 130, dtype=torch.bool),
        )
        mine[:, :4] = True
        tokens[:, 0] += 1  # one of four is wrong; what was not chosen counts for nothing
        return tokens % 256, mine

    (true, wrong), shown = judge_all(
        bench,
        [
            Version("true", {"task": "a"}, lambda part: (held_out.tokens[part], torch.zeros(1, 130) > 0)),
            Version("wrong", {"task": "b"}, fill),
        ],
    )
    assert list(true) == list(wrong) == ["task", "accuracy", "psnr", "FID[torchscript:means.pt]-7"]
    assert true["accuracy"] is None and wrong["accuracy"] == 0.75
    pictures = to_uint8(codec.decode_tokens(held_out.tokens))
    assert held_out.images is not None
    error = (pictures.astype(float) - held_out.images).__pow__(2).mean(axis=(1, 2, 3))
    assert true["psnr"] == pytest.approx(float(np.mean(10 * np.log10(255**2 / error))), rel=1e-4)
    assert list(shown) == ["original", "true", "wrong"] and all(len(tiles) == 4 for tiles in shown.values())
    assert np.array_equal(np.stack(shown["true"]), pictures[:4])
    assert np.array_equal(np.stack(shown["original"]), held_out.images[:4])
    assert not np.array_equal(np.stack(shown["wrong"]), pictures[:4])


def test_the_distance_is_from_the_pictures(
    load: Load, held_out: HeldOut, means: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Version("all", {}, lambda part: (held_out.tokens[part], torch.zeros(1, 130) > 0))
    name = "FID[torchscript:means.pt]-7"
    far, _ = Bench(held_out, load("var").codec, means, batch_size=3, shown=1).judge(version)
    monkeypatch.setattr(analysis, "to_uint8", lambda images: held_out.images[: len(images)])
    near, _ = Bench(held_out, load("var").codec, means, batch_size=7, shown=1).judge(version)
    assert near[name] == pytest.approx(0, abs=1e-3) and float(far[name] or 0) > 1
    assert float(near["psnr"] or 0) > 90  # the pictures themselves


def test_without_an_extractor_there_is_no_distance(load: Load, held_out: HeldOut) -> None:
    bench = Bench(held_out, load("var").codec, None, batch_size=4, shown=9)
    rows, shown = judge_all(bench, half_masked([load("masked")], held_out, share=0.5, seed=0))
    assert all(list(row) == ["model", "task", "accuracy", "psnr"] for row in rows)
    assert {len(tiles) for tiles in shown.values()} == {7}
    assert len(half_masked_figure(rows).axes) == 2


def test_one_picture_has_no_other_to_take_tokens_from(load: Load) -> None:
    codec = load("var").codec
    alone = read_held_out("builtin:shapes?count=1", codec, count=1, batch_size=1, pictures=True)
    labels = [each.label for each in half_masked([load("masked")], alone, share=0.5, seed=0)]
    assert labels == ["tokenizer", "masked, next-scale", "masked, masked"]


def test_a_panel_for_each_number(load: Load, held_out: HeldOut, means: Extractor) -> None:
    bench = Bench(held_out, load("hmar").codec, means, batch_size=7, shown=1)
    rows, _ = judge_all(bench, known_scales(load("hmar"), held_out, SETTINGS, seed=0, precision="fp32"))
    figure = known_scales_figure(rows, load("hmar").model.scales)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "PSNR, dB",
        "drawn tokens that are the true ones, %",
        "FID[torchscript:means.pt]-7 from the true images",
    ]
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [7, 6, 7]  # all known: none is drawn
