"""Attention within what trains and samples: compiled graphs, activation checkpointing, tables kept over modes."""

import pytest
import torch
from hmar_kernels import scale_attention, unavailable
from hmar_kernels.common import TABLES, table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hmar_cli.models.layers import Block
from hmar_cli.models.next_scale import NextScaleTransformer
from hmar_cli.models.scales import Scales

CPU = torch.device("cpu")
GRIDS = ((1, 1), (2, 2), (2, 3))
PATTERNS = ["causal", "diagonal"]


@pytest.fixture(params=("reference", "triton", "sdpa", "masked"))
def name(request: pytest.FixtureRequest) -> str:
    """An implementation that runs on a CPU; each starts with nothing compiled before."""
    implementation: str = request.param
    reason = unavailable(implementation, device=CPU, dtype=torch.float32, head_size=32, pattern="causal")
    if reason:  # on a GPU machine Triton compiles, and tests/gpu has its tests
        pytest.skip(f"{implementation}: {reason}")
    torch.compiler.reset()
    return implementation


class Blocks(torch.nn.Module):
    """Two transformer blocks, since graphs with several calls differ from those with one."""

    def __init__(self, implementation: str, pattern: str) -> None:
        super().__init__()
        settings = (64, 2, 2.0, 0.0, False, pattern, implementation)
        self.blocks = torch.nn.ModuleList(Block(*settings) for _ in range(2))  # type: ignore[arg-type]

    def forward(self, x: Tensor, condition: Tensor, grids: tuple) -> Tensor:
        for block in self.blocks:
            x = block(x, condition, grids)
        return x


def make_blocks(implementation: str, pattern: str) -> Blocks:
    torch.manual_seed(0)
    blocks = Blocks(implementation, pattern)
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return blocks


def step(block: torch.nn.Module, batch: int, grids: tuple, saving: bool = False) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter."""
    generator, dtype = torch.Generator().manual_seed(1), next(block.parameters()).dtype
    total = sum(h * w for h, w in grids)
    x = torch.randn(batch, total, 64, generator=generator).to(dtype).requires_grad_()
    condition = torch.randn(batch, 64, generator=generator).to(dtype)
    block.zero_grad()
    given = (x, condition, grids)
    out = checkpoint(block, *given, use_reentrant=False) if saving else block(*given)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in block.parameters())]


def assert_as_right(
    compiled: torch.nn.Module, blocks: Blocks, pattern: str, batch: int, grids: tuple
) -> None:
    """Compiled blocks are at most twice as far from the result in float64 as the blocks themselves.

    What counts is the largest error of all tensors, each relative to its own size.
    """
    exact = step(make_blocks("reference", pattern).double(), batch, grids)
    found, plain = (
        max(float((x - wanted).norm() / wanted.norm()) for x, wanted in zip(tensors, exact, strict=True))
        for tensors in (step(compiled, batch, grids), step(blocks, batch, grids))
    )
    assert found <= 2 * plain


@pytest.mark.parametrize("pattern", PATTERNS)
def test_blocks_compile_as_one_graph(name: str, pattern: str) -> None:
    """Also for another batch and for other scales, which sampling changes from call to call."""
    block = make_blocks(name, pattern)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch, grids in ((2, GRIDS), (3, GRIDS), (3, GRIDS[:2]), (3, GRIDS[1:])):
        assert_as_right(compiled, block, pattern, batch, grids)
    with torch.inference_mode():
        x, condition = torch.randn(2, 11, 64), torch.randn(2, 64)
        torch.testing.assert_close(compiled(x, condition, GRIDS), block(x, condition, GRIDS))


@pytest.mark.parametrize("name", ["triton", "sdpa"], indirect=True)
def test_blocks_compile_to_machine_code(name: str) -> None:
    block = make_blocks(name, "diagonal")
    compiled = torch.compile(block, fullgraph=True)
    assert_as_right(compiled, block, "diagonal", 2, GRIDS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_activation_checkpointing_changes_nothing(name: str, pattern: str) -> None:
    block = make_blocks(name, pattern)
    for found, wanted in zip(step(block, 2, GRIDS, saving=True), step(block, 2, GRIDS), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_operator_keeps_its_promises(packed: bool, normalized: bool) -> None:
    """What PyTorch asks of an operator: its schema, its shapes without data, its gradients in traced graphs."""
    reason = unavailable("triton", device=CPU, dtype=torch.float32, head_size=32, pattern="causal")
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 2, 32)
    parts = [x.contiguous().requires_grad_() for x in qkv.unbind(2)]
    parts = [qkv.requires_grad_(), None, None] if packed else parts
    scale = torch.tensor([2.0, 3.0], requires_grad=True) if normalized else None
    operator = torch.ops.hmar.scale_attention.default
    outcome = torch.library.opcheck(operator, (*parts, [1, 4], True, 0.5, scale))
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampling_does_not_spoil_training(name: str, pattern: str) -> None:
    """Tables made in inference mode serve a training step."""
    sides = (1, (1, 3), 2)
    qkv = torch.randn(1, 8, 3, 1, 32)
    with torch.inference_mode():
        expected = scale_attention(qkv, sides, pattern, implementation=name)
    leaf = qkv.requires_grad_()
    out = scale_attention(leaf, sides, pattern, implementation=name)
    out.sum().backward()
    assert torch.equal(out, expected.clone()) and leaf.grad is not None and leaf.grad.any()


def test_tables_are_made_once() -> None:
    made = []

    @table
    def ones(n: int, device: torch.device) -> Tensor:
        made.append(n)
        return torch.ones(n, device=device)

    with torch.inference_mode():
        first = ones(3, CPU)
    assert ones(3, CPU) is first and not first.is_inference() and made == [3]

    def double(x: Tensor) -> Tensor:
        return x * ones(x.shape[0], x.device)

    torch.compiler.reset()
    assert torch.equal(
        torch.compile(double, fullgraph=True, backend="aot_eager")(torch.full((3,), 2.0)),
        torch.full((3,), 2.0),
    )
    assert made == [3]
    for n in range(4, TABLES + 4):
        ones(n, CPU)
    assert ones(3, CPU) is not first


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.inference_mode()
def test_a_model_draws_the_same_with_every_implementation(name: str, pattern: str) -> None:
    """At once and scale by scale, where VAR's keys come from its cache."""
    logits = []
    for implementation in ("reference", name):
        torch.manual_seed(0)
        model = NextScaleTransformer(
            scales=Scales.of([1, [1, 2], 2]),
            z_channels=4,
            vocab_size=16,
            num_classes=5,
            depth=2,
            width=64,
            heads=2,
            pattern=pattern,  # type: ignore[arg-type]
            attention=implementation,
        ).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        labels, inputs = torch.tensor([1, 5]), torch.randn(2, 6, 4)
        cache = model.make_cache(2, torch.float32)
        padded = torch.cat([torch.zeros(2, 1, 4), inputs], dim=1)
        parts = [
            model.forward_scale(
                k, model.condition(labels), padded[:, model.scales.slice(k)] if k else None, cache=cache
            )
            for k in range(3)
        ]
        logits.append([model(labels, inputs), torch.cat(parts, dim=1)])
    for expected, found in zip(*logits, strict=True):
        torch.testing.assert_close(found, expected)
