"""What several implementations need: normalised queries and keys, and tables that are made once.

Letters: B batch, L keys, N queries, H heads, D head size.
"""

import contextlib
import ctypes
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Result = TypeVar("Result", bound=Callable[..., Any])

numbers = itertools.count()

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TABLES = 32
"""Tables of each kind that are kept; a training run needs one, a benchmark a dozen."""


def normalize(q: Tensor, k: Tensor, head_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Divide q [B, N, H, D] and k [B, L, H, D] by their lengths over D, and multiply q by head_scale [H].

    The arithmetic is in float32 or wider; results are rounded to the dtypes that came in. Without a head scale
    both stay as they are.
    """
    if head_scale is None:
        return q, k
    wide = torch.promote_types(q.dtype, torch.float32)
    unit = F.normalize(q.to(wide), dim=-1) * head_scale.to(wide)[:, None]
    return unit.to(q.dtype), F.normalize(k.to(wide), dim=-1).to(k.dtype)


@functools.cache
def triton_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say in one line why Triton's kernels cannot serve tensors; None where they can.

    What is found is kept for the device as it is named; those of tensors have an index.
    """
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton's kernels need a GPU, the tensors are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need a GPU of compute capability 8.0 or newer"
    if dtype not in TRITON_DTYPES:
        return f"Triton's kernels serve bfloat16, float16 and float32, not {dtype}"
    if device.type == "cuda":
        try:  # it compiles a module of its own at first, in which anything can fail
            triton.runtime.driver.active.get_current_device()
        except Exception as error:
            detail = str(error).partition("\n")[0]
            reason = f"Triton cannot start (it needs a C compiler and Python's headers): {detail}"
            warnings.warn(f"{reason}; plain PyTorch takes its place, more slowly", stacklevel=2)
            return reason
    return None


def unserved(x: Tensor, *others: Tensor | None) -> str | None:
    """Say in one line why Triton's kernels without a backward pass cannot serve tensors; None where they can."""
    given = [x, *(t for t in others if t is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "there is no backward pass, and gradients are asked for"
    if any(t.device != x.device for t in given):
        return f"expected tensors on one device, got {', '.join(str(t.device) for t in given)}"
    return next(filter(None, (triton_unavailable(t.device, t.dtype) for t in given)), None)


def fuses(x: Tensor) -> bool:
    """Whether models leave x to those kernels: on a GPU, where no gradients are asked for, not compiled."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return triton_unavailable(x.device, x.dtype) is None


def constant(function: Result) -> Result:
    """Decorate a function of constants that compiled graphs call while they are traced, keeping its result."""
    return torch.compiler.assume_constant_result(function)  # type: ignore[no-any-return]


class Tables:
    """Holds the tables that compiled graphs read, as attributes."""


def table(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of hashable arguments that makes a constant tensor: it is made once.

    A compiled graph gets the same tensor as an input. It is made outside of inference mode, so that a table which
    sampling made can be used in training.
    """

    @functools.lru_cache(maxsize=TABLES)
    def made(*args: object) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args)

    @functools.cache
    def held(*args: object) -> str:
        name = f"{make.__name__}_{next(numbers)}"
        setattr(Tables, name, made(*args))
        return name

    @constant
    def attribute(*args: object) -> str:
        return held(*args)

    @functools.wraps(make)
    def look_up(*args: object) -> Tensor:
        if torch.compiler.is_compiling():
            found: Tensor = getattr(Tables, attribute(*args))
            return found
        return made(*args)

    return look_up


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on a device, outside of the memory of any CUDA graph that this thread warms up or records.

    Such memory belongs to the graph, which may give it to others. Another thread's, on a stream of its own, does not.
    """
    if device.type != "cuda":
        return [x.to(device) for x in tensors]

    def copy() -> list[Tensor]:
        _allow_calls_while_others_record()
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            copies = [x.to(device) for x in tensors]
            torch.cuda.current_stream().synchronize()
        return copies

    with ThreadPoolExecutor(1) as helper:
        return helper.submit(copy).result()


def _allow_calls_while_others_record() -> None:
    """Let this thread allocate and wait, on streams of its own, while another records a CUDA graph.

    By default CUDA forbids it to all threads, in case that the recording depends on them.
    """
    relaxed = ctypes.c_int(2)
    with contextlib.suppress(OSError, AttributeError):  # no driver of NVIDIA's
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(relaxed))


def scale_index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The scale of each token, [L] int64, made on the device without a copy from the host."""
    return torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])
