import pytest
import torch

from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales, split_passes
from hmar_cli.sampling.images import logits_by_tensor_cores
from hmar_cli.sampling.next_scale import filter_logits, sample_next_scale
from hmar_cli.sampling.noise import PhiloxNoise
from hmar_cli.settings import NextScaleSample
from hmar_cli.tokenizers.msvq import ScaleQuantizer

SCALES = Scales.of([1, 2, [2, 3], 4])


def make(pattern: str, masked_layers: int = 0) -> tuple[NextScaleTransformer, ScaleQuantizer]:
    torch.manual_seed(0)
    quantizer = ScaleQuantizer(scales=SCALES, z_channels=4, vocab_size=32)
    model = NextScaleTransformer(
        scales=SCALES,
        z_channels=4,
        vocab_size=32,
        num_classes=3,
        depth=2,
        width=32,
        heads=2,
        pattern=pattern,  # type: ignore[arg-type]
        masked_layers=masked_layers,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), quantizer


def draw(pattern: str, images: list[int], settings: NextScaleSample) -> torch.Tensor:
    model, quantizer = make(pattern, masked_layers=1 if settings.schedule else 0)
    labels = torch.tensor(images) % 3
    return sample_next_scale(model, quantizer, labels, settings, PhiloxNoise(5, torch.tensor(images)))[0]


@pytest.mark.parametrize(
    ("pattern", "schedule"),
    [("causal", ()), ("diagonal", ()), ("diagonal", ((1,), (1, 3), (2, 2, 2), (6, 10)))],
)
def test_batch_and_order_change_nothing(pattern: str, schedule: tuple[tuple[int, ...], ...]) -> None:
    settings = NextScaleSample(cfg=1.5, top_k=20, top_p=0.95, schedule=schedule)
    whole = draw(pattern, list(range(8)), settings)
    assert whole.unique(dim=0).shape[0] == 8
    parts = torch.cat([draw(pattern, images, settings) for images in ([0], [1, 2, 3], [4, 5, 6, 7])])
    assert torch.equal(parts, whole)
    order = [5, 0, 7, 2]
    assert torch.equal(draw(pattern, order, settings), whole[order])


def test_one_token_a_pass() -> None:
    """The longest schedule: every token of every scale decided alone."""
    schedule = tuple((1,) * n for n in SCALES.lengths)
    names: list[str] = []
    model, quantizer = make("diagonal", masked_layers=1)
    tokens, f_hat = sample_next_scale(
        model,
        quantizer,
        torch.tensor([0, 1]),
        NextScaleSample(top_k=0, top_p=0.0, schedule=schedule, refine_cfg=1.0),
        PhiloxNoise(0, torch.arange(2)),
        trace=lambda name, tensor: names.append(name),
    )
    assert tokens.shape == (2, SCALES.total) and f_hat.shape == (2, 4, 4, 4)
    assert sum(name.startswith("masked.") for name in names) == sum(n - 1 for n in SCALES.lengths)
    with torch.inference_mode():
        torch.testing.assert_close(f_hat, quantizer.f_hat(tokens))


def test_kept_tokens_stay_and_the_least_confident_go() -> None:
    schedule = ((1,), split_passes(4, 2), split_passes(6, 3), (8, 8))
    seen: dict[str, torch.Tensor] = {}
    model, quantizer = make("diagonal", masked_layers=1)
    noise = PhiloxNoise(0, torch.arange(3))
    sample_next_scale(
        model,
        quantizer,
        torch.arange(3),
        NextScaleSample(top_k=0, top_p=0.0, schedule=schedule),
        noise,
        trace=seen.__setitem__,
    )
    masked, confidence = seen["masked.3.1"], seen["conf.3.1"]
    redrawn = torch.zeros_like(confidence, dtype=torch.bool).scatter(1, masked, True)
    assert (redrawn.sum(1) == 8).all()
    assert (confidence.masked_fill(~redrawn, 0).amax(1) <= confidence.masked_fill(redrawn, 2).amin(1)).all()
    assert torch.equal(seen["tokens.3"][~redrawn], seen["draft.3"][~redrawn])
    later, earlier = seen["masked.2.2"], seen["masked.2.1"]
    assert all(set(b) <= set(a) for a, b in zip(earlier.tolist(), later.tolist(), strict=True))


def test_no_guidance_equals_conditional_rows() -> None:
    """cfg 0 skips the unconditional half and must give the conditional logits."""
    model, quantizer = make("causal")
    seen: dict[str, torch.Tensor] = {}
    labels = torch.tensor([0, 2])
    noise = PhiloxNoise(0, torch.arange(2))
    tokens, _ = sample_next_scale(
        model, quantizer, labels, NextScaleSample(top_k=0, top_p=0.0, cfg=0), noise, trace=seen.__setitem__
    )
    logits = torch.cat([seen[f"logits.{k}"] for k in range(len(SCALES))], dim=1)
    expected = model(labels, quantizer.teacher_inputs(tokens))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_refusals() -> None:
    model, quantizer = make("diagonal")
    noise = PhiloxNoise(0, torch.arange(1))
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="masked branch"):
        sample_next_scale(
            model,
            quantizer,
            labels,
            NextScaleSample(top_k=0, top_p=0.0, schedule=((1,), (1, 3), (6,), (16,))),
            noise,
        )
    with pytest.raises(ValueError, match="sum to 4"):
        sample_next_scale(
            model,
            quantizer,
            labels,
            NextScaleSample(top_k=0, top_p=0.0, schedule=((1,), (1, 2), (6,), (16,))),
            noise,
        )
    with torch.no_grad():
        model.head.linear.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_next_scale(model, quantizer, labels, NextScaleSample(top_k=0, top_p=0.0), noise)


def test_whether_logits_are_finite_can_be_noted_in_place_of_an_error() -> None:
    model, quantizer = make("diagonal")
    settings, noise = NextScaleSample(top_k=0, top_p=0.0), PhiloxNoise(0, torch.arange(1))
    for weight, expected in ((0.5, True), (float("nan"), False)):
        with torch.no_grad():
            model.head.linear.weight[0, 0] = weight
        finite = torch.ones((), dtype=torch.bool)
        tokens, _ = sample_next_scale(model, quantizer, torch.tensor([0]), settings, noise, finite=finite)
        assert finite.item() is expected and tokens.shape == (1, SCALES.total)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(2, 8)
    assert torch.equal(filter_logits(logits, 100, 0.0), logits)


@pytest.mark.parametrize(
    ("weights", "top_k", "top_p", "kept"),
    [
        ((1, 1, 1, 1), 0, 0.5, 4),
        ((16, 4, 4, 4, 1, 1), 5, 0.8, 4),  # top-p ends within the ties of 4
        ((8, 2, 2, 2, 1), 2, 0.0, 4),
        ((8, 2, 2, 2, 1), 2, 0.85, 4),  # 2 is a fifth of the top two, a seventh of the four that stay
        ((8, 2, 2, 2, 1), 2, 0.7, 1),
    ],
)
def test_ties_are_never_split(weights: tuple[int, ...], top_k: int, top_p: float, kept: int) -> None:
    """With the k-th entry they have no part in the distribution that top-p acts on."""
    logits = torch.tensor(weights).log()
    expected = logits.masked_fill(torch.arange(len(weights)) >= kept, float("-inf"))
    assert torch.equal(filter_logits(logits, top_k, top_p), expected)
    assert torch.equal(filter_logits(logits.flip(0), top_k, top_p), expected.flip(0))


@pytest.mark.parametrize(
    ("precision", "inside"), [("auto", "highest"), ("fp32", "highest"), ("bf16", "high")]
)
def test_float32_stays_float32_but_under_bf16(precision: str, inside: str) -> None:
    """On a CPU "auto" is float32; afterwards all is as before."""
    with logits_by_tensor_cores(torch.device("cpu"), precision):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"
