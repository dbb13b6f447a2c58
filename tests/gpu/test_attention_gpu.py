"""Attention on a GPU: every implementation against the reference in float64, and in what trains and samples."""

import functools
from collections.abc import Iterator

import pytest
import torch
from hmar_kernels import IMPLEMENTATIONS, choose, measure, scale_attention, unavailable
from judging import Results, bounds_of, compare, inputs, judge, results, strided
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmar_cli.models.layers import Block
from hmar_cli.recipe import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = torch.device("cuda", 0)
PATTERNS = ["causal", "diagonal"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIDES = [(1,), (5,), (1, 1, 1), (1, 2, 3, 4), ((2, 3), (3, 5), (9, 17)), (1, (1, 70), 12)]
PAPER = {256: "hmar-d16", 512: "hmar-d24-512", 1024: "hmar-d16-1024"}
WITHOUT_FLEX = tuple(name for name in IMPLEMENTATIONS if name != "flex")
"""FlexAttention compiles for every shape, which takes long: it has fewer tests."""


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Products of float32 are not rounded to fewer bits, whatever other tests have set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()


def require(name: str, dtype: torch.dtype, pattern: str, size: int = 64) -> None:
    """Skip what an implementation says it cannot do, after it has refused to."""
    reason = unavailable(name, device=DEVICE, dtype=dtype, head_size=size, pattern=pattern)
    if reason is None:
        return
    with pytest.raises(ValueError, match="cannot run here"):
        qkv = torch.zeros(1, 1, 3, 1, size, device=DEVICE, dtype=dtype)
        scale_attention(qkv, (1,), pattern, implementation=name)
    pytest.skip(f"{name}: {reason}")


def on_gpu(sides: tuple, dtype: torch.dtype, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return inputs(sides, dtype=dtype, device=str(DEVICE), **{"size": 64, **shape})


# Numbers


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", WITHOUT_FLEX)
def test_packed(name: str, pattern: str, dtype: torch.dtype, sides: tuple, normalized: bool) -> None:
    require(name, dtype, pattern)
    qkv, grad, scale = on_gpu(sides, dtype)
    judge(name, qkv, grad, scale if normalized else None, sides, pattern)


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        (name, pattern, dtype)
        for name in IMPLEMENTATIONS
        for pattern in PATTERNS
        for dtype in DTYPES
        if name != "flex" or dtype == torch.bfloat16 or pattern == "causal"
    ],
)
def test_parts(name: str, pattern: str, dtype: torch.dtype) -> None:
    """Tensors of their own, by head, with gaps, and repeated over images."""
    require(name, dtype, pattern)
    sides = (1, 2, (5, 7), 12)
    qkv, grad, scale = on_gpu(sides, dtype)
    parts, strided_grad = strided(qkv, grad)
    judge(name, parts, strided_grad, scale, sides, pattern)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_reads_from_any_place_in_memory(dtype: torch.dtype) -> None:
    sides = (1, 2, (5, 7), 12)
    qkv, grad, scale = on_gpu(sides, dtype)
    parts, strided_grad = strided(qkv, grad, offset=3)
    judge("triton", parts, strided_grad, scale, sides, "causal")


@pytest.mark.parametrize("size", [32, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", WITHOUT_FLEX)
def test_head_sizes_of_one_image_and_head(name: str, pattern: str, dtype: torch.dtype, size: int) -> None:
    require(name, dtype, pattern, size)
    sides = (1, 3, 7, 13)
    judge(name, *on_gpu(sides, dtype, batch=1, heads=1, size=size), sides, pattern)


@functools.lru_cache(maxsize=1)
def paper_case(resolution: int, pattern: str, dtype: torch.dtype) -> tuple[tuple, dict]:
    """Inputs at a resolution of the paper, and the bounds."""
    sides = load_recipe(PAPER[resolution]).scales.grids
    shape = {"batch": 1, "heads": 1} if resolution == 1024 else {"batch": 2, "heads": 2}
    given = (*on_gpu(sides, dtype, **shape), sides, pattern, 1.0)
    return given, bounds_of(*given)


@pytest.mark.parametrize(
    ("resolution", "pattern", "dtype", "name"),
    [
        (resolution, pattern, dtype, name)  # in this order, so that bounds are worked out once
        for resolution in PAPER
        for pattern in PATTERNS
        for dtype in DTYPES
        for name in IMPLEMENTATIONS
        if name != "flex" or dtype == torch.bfloat16
    ],
)
def test_resolutions_of_the_paper(resolution: int, pattern: str, dtype: torch.dtype, name: str) -> None:
    require(name, dtype, pattern)
    given, bounds = paper_case(resolution, pattern, dtype)
    compare(name, results(name, *given), bounds)


@pytest.mark.parametrize("size", ["large", "tiny"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WITHOUT_FLEX)
def test_large_and_tiny_numbers(name: str, dtype: torch.dtype, normalized: bool, size: str) -> None:
    """Scores of thousands, where one key has all the weight, and of almost nothing."""
    require(name, dtype, "diagonal")
    sides = (1, 2, 3, 9)
    exponent = {"large": 10, "tiny": -20} if dtype != torch.float16 else {"large": 4, "tiny": -8}
    qkv, grad, scale = on_gpu(sides, dtype)
    given = (qkv * 2.0 ** exponent[size], grad, scale if normalized else None)
    judge(name, *given, sides, "diagonal", 1 / 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WITHOUT_FLEX)
def test_queries_and_keys_of_length_zero(name: str, dtype: torch.dtype) -> None:
    """Nothing is divided by less than 1e-12; such gradients are beyond the numbers of float16."""
    require(name, dtype, "diagonal")
    sides = (1, 2, 3, 9)
    qkv, grad, scale = on_gpu(sides, dtype)
    qkv[0, 2:6, 0] = 0
    qkv[1, 3, 1] = 0
    qkv[1, 14:20] = 0
    judge(name, qkv, grad, scale, sides, "diagonal")


@pytest.mark.parametrize(
    ("name", "pattern", "queries"),
    [
        (name, pattern, queries)
        for name in IMPLEMENTATIONS
        for pattern in PATTERNS
        for queries in (144, 153)
        if name != "flex" or (pattern, queries) == ("causal", 153)
    ],
)
def test_earlier_keys_from_a_cache(name: str, pattern: str, queries: int) -> None:
    require(name, torch.bfloat16, pattern)
    sides = (1, 2, 3, 12)
    qkv, grad, scale = on_gpu(sides, torch.bfloat16)
    q, k, v = qkv.unbind(2)
    judge(name, (q[:, -queries:], k, v), grad[:, -queries:], scale, sides, pattern)


@pytest.mark.parametrize("name", ["triton", "sdpa", "varlen"])
def test_no_memory_is_taken_for_zero(name: str) -> None:
    """New tensors come filled with NaN, and none shows in a result."""
    require(name, torch.bfloat16, "diagonal")
    sides = (1, (1, 5), 3, 9)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        judge(name, *on_gpu(sides, torch.bfloat16), sides, "diagonal")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["triton", "sdpa", "flex", "varlen"])
def test_the_forward_repeats(name: str, pattern: str) -> None:
    require(name, torch.bfloat16, pattern)
    sides = load_recipe(PAPER[512]).scales.grids
    qkv, _, scale = on_gpu(sides, torch.bfloat16, batch=4, heads=8)
    run = functools.partial(scale_attention, qkv, sides, pattern, head_scale=scale, implementation=name)
    first = run()
    assert all(torch.equal(run(), first) for _ in range(5))


def test_triton_repeats_its_gradients() -> None:
    sides = load_recipe(PAPER[256]).scales.grids
    given = (*on_gpu(sides, torch.bfloat16, batch=4, heads=8), sides, "causal", 1.0)
    first, second = results("triton", *given), results("triton", *given)
    assert all(torch.equal(first[key], second[key]) for key in first)


# Sizes


def test_more_than_two_to_the_31_numbers() -> None:
    """The last images get what they get alone: outputs, too, have more numbers than 32 bits can count."""
    images, heads, sides = 2200, 24, load_recipe(PAPER[256]).scales.grids
    needed = 70 * 2**30
    if torch.cuda.mem_get_info(DEVICE)[1] < needed:
        pytest.skip(f"needs a GPU of {needed >> 30} GiB")
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (images, 680, 3, heads, 64)
    qkv = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    assert qkv[:, :, 0].numel() > 2**31
    scale = torch.full((heads,), 4.0, device=DEVICE, requires_grad=True)
    run = functools.partial(scale_attention, sides=sides, pattern="diagonal", implementation="triton")
    out = run(qkv, head_scale=scale)
    (gradient,) = torch.autograd.grad(out, qkv, out.detach())
    for part in (slice(0, 2), slice(images - 2, images)):
        alone = qkv.detach()[part].clone().requires_grad_()
        small = run(alone, head_scale=scale)
        assert torch.equal(out[part], small)
        (expected,) = torch.autograd.grad(small, alone, small.detach())
        assert torch.equal(gradient[part], expected)


def test_more_images_and_heads_than_a_grid_has_rows() -> None:
    """CUDA's second and third grid dimensions end at 65,535."""
    sides = (1, 2)
    qkv, grad, scale = on_gpu(sides, torch.bfloat16, batch=4400, heads=16, size=32)
    judge("triton", qkv, grad, scale, sides, "diagonal")


# In what trains and samples


class Blocks(nn.Module):
    """Two transformer blocks under autocast."""

    def __init__(self, name: str, pattern: str) -> None:
        super().__init__()
        settings = (128, 2, 2.0, 0.0, False, pattern, name)
        self.blocks = nn.ModuleList(Block(*settings) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor, grids: tuple, saving: bool = False) -> Tensor:
        bf16 = self.blocks[0].attention.log_scale.dtype != torch.float64
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            for block in self.blocks:
                given = (x, condition, grids)
                x = checkpoint(block, *given, use_reentrant=False) if saving else block(*given)
        return x


GRIDS = ((1, 1), (2, 2), (3, 5), (8, 8))


def make_blocks(name: str, pattern: str) -> Blocks:
    torch.manual_seed(0)
    blocks = Blocks(name, pattern).to(DEVICE)
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, std=0.1)
    return blocks


def step(blocks: nn.Module, grids: tuple = GRIDS, batch: int = 4, **kwargs: bool) -> list[Tensor]:
    """Output, and gradients of every parameter."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    dtype = next(blocks.parameters()).dtype
    x, condition = (
        torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
        for shape in ((batch, sum(h * w for h, w in grids), 128), (batch, 128))
    )
    blocks.zero_grad()
    out = blocks(x, condition, grids, **kwargs)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in blocks.parameters())]


def error(found: list[Tensor], pattern: str) -> float:
    """The largest error of all tensors, each relative to its own size."""
    exact = step(make_blocks("reference", pattern).double())
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - wanted).norm() / wanted.norm()) for x, wanted in pairs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_blocks_compile_as_one_graph(name: str, pattern: str) -> None:
    """Compiled, they are at most twice as far from float64 as uncompiled."""
    require(name, torch.bfloat16, pattern)
    torch.compiler.reset()
    compiled = torch.compile(make_blocks(name, pattern), fullgraph=True, dynamic=False)
    assert error(step(compiled), pattern) <= 2 * error(step(make_blocks(name, pattern)), pattern)


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_blocks_compile_to_cuda_graphs(name: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(make_blocks(name, "diagonal"), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in step(compiled)]
    assert error(found, "diagonal") <= 2 * error(step(make_blocks(name, "diagonal")), "diagonal")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_cuda_graph_replays_forward_and_backward(name: str, pattern: str) -> None:
    """On new numbers in the same memory; recorded results are as right as others."""
    require(name, torch.bfloat16, pattern)
    sides = (1, 2, 3, 9)
    qkv, grad, scale = on_gpu(sides, torch.bfloat16)
    settings = (sides, pattern, 1.0)
    memory = torch.randn_like(qkv)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            results(name, memory, grad, scale, *settings)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(name, memory, grad, scale, *settings)
    memory.copy_(qkv)
    graph.replay()
    compare(name, recorded, bounds_of(qkv, grad, scale, *settings))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_calls_never_wait_for_the_device(name: str, pattern: str) -> None:
    require(name, torch.bfloat16, pattern)
    sides = (1, 2, 3, 9)
    given = (*on_gpu(sides, torch.bfloat16), sides, pattern, 1.0)
    results(name, *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(name, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["triton", "sdpa", "flex", "varlen"])
def test_activation_checkpointing(name: str, pattern: str) -> None:
    """The second forward is that of the first; Triton's gradients repeat, too."""
    require(name, torch.bfloat16, pattern)
    blocks = make_blocks(name, pattern)
    plain = [x.clone() for x in step(blocks)]
    saving = step(blocks, saving=True)
    assert torch.equal(saving[0], plain[0])
    if name == "triton":
        assert all(torch.equal(a, b) for a, b in zip(saving, plain, strict=True))
    assert error(saving, pattern) <= 2 * error(plain, pattern)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("nccl", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def one_step(wrapped: nn.Module) -> None:
    """Forward, backward and an update."""
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    step(wrapped)
    optimizer.step()


def weights(module: nn.Module) -> Results:
    return {
        name.replace("_fsdp_wrapped_module.", ""): (
            x.full_tensor() if hasattr(x, "full_tensor") else x
        ).clone()
        for name, x in module.state_dict().items()
    }


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp2"])
def test_a_training_step_in_parallel(way: str) -> None:
    """Under DDP and both kinds of FSDP, one process takes the step that it takes without."""
    expected = make_blocks("triton", "diagonal")
    one_step(expected)
    blocks = make_blocks("triton", "diagonal")
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(blocks)
    elif way == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped = FullyShardedDataParallel(blocks, use_orig_params=True, device_id=DEVICE)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in blocks.blocks:
            fully_shard(block)
        wrapped = fully_shard(blocks)
    one_step(wrapped)
    found = weights(wrapped.module if way == "ddp" else wrapped)
    for name, value in weights(expected).items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("alone")
def test_head_scales_in_lower_precision() -> None:
    """FSDP's mixed precision gives the blocks bfloat16 weights; head scales get their gradient all the same."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = fully_shard(
        make_blocks("triton", "diagonal"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    )
    step(blocks)
    for block in blocks.blocks:
        gradient = block.attention.log_scale.grad.full_tensor()
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()


# The choice


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_triton(dtype: torch.dtype) -> None:
    place = {"device": DEVICE, "dtype": dtype, "pattern": "diagonal"}
    assert choose("auto", head_size=64, **place).name == "triton"
    choice = choose("auto", head_size=80, **place)
    assert choice.name == "sdpa" and "80" in choice.reason
    qkv, _, scale = on_gpu((1, 2, 5), dtype)
    found, expected = (
        scale_attention(qkv, (1, 2, 5), "diagonal", head_scale=scale, implementation=name)
        for name in ("auto", "triton")
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("pattern", "backward"), [("diagonal", True), ("causal", False)])
def test_measuring_names_the_fastest(pattern: str, backward: bool) -> None:
    before = torch.cuda.get_rng_state(DEVICE)
    choice = measure(
        load_recipe(PAPER[256]).scales.grids,
        pattern,
        batch=2,
        heads=4,
        head_size=64,
        dtype=torch.bfloat16,
        device=DEVICE,
        queries=0 if backward else 256,
        backward=backward,
    )
    what, _, listed = choice.reason.partition(": ")
    assert what == ("measured forward and backward" if backward else "measured forward")
    times = [(float(text.split()[1]), text.split()[0]) for text in listed.split(", ")]
    assert times == sorted(times, key=lambda pair: pair[0]) and times[0][1] == choice.name
    able = {
        name
        for name in IMPLEMENTATIONS
        if name != "reference"
        and not unavailable(name, device=DEVICE, dtype=torch.bfloat16, head_size=64, pattern=pattern)
    }
    assert {name for _, name in times} == able and "triton" in able
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), before)
