"""The selective scan in C++ for a CPU: scan.cpp, its registration with torch, and what it cannot serve."""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from hybridlab.kernels import native

SOURCE = Path(__file__).with_name("scan.cpp")
CHUNK = 32  # steps between the states that are kept
STATES = 256  # most states per channel
LANES = 16  # most lanes of a vector: kept states are padded to it
FLAGS = (f"-DCHUNK={CHUNK}",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def selective_scan_cpp(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, state=None, offsets=None,
    *, z=None, delta_bias=None, softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same result as the definition, in float32; of [batch, time, d_model, state] only every 32nd step is kept."""
    wide = [None if t is None else t.float() for t in (x, delta, A, B, C, D, state, z, delta_bias)]
    offsets = None if offsets is None else offsets.long()
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wide)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _run if not keep and _plain(wide) else _scan
    y, last, _ = run(*wide, offsets, softplus, keep)
    return y.to(x.dtype), last


def refuses(
    x, delta, A, B, C, D=None, state=None, offsets=None, *, z=None, delta_bias=None, softplus=False
) -> str | None:  # fmt: skip
    """Why not here: another device or dtype, too many states, or nothing to compile with."""
    given = [t for t in (x, delta, A, B, C, D, state, z, delta_bias) if t is not None]
    for tensor in given:
        if tensor.device.type != "cpu":
            return f"tensors are on {tensor.device.type}; it needs cpu"
        if tensor.dtype not in DTYPES:
            return f"dtype={tensor.dtype}; it computes in float32"
    if A.shape[1] > STATES:
        return f"state={A.shape[1]} > {STATES}"
    return _missing()


def _plain(tensors: list[Tensor | None]) -> bool:
    """Whether nothing needs to see the call go through the dispatcher, which costs a decode step most of its time."""
    return (
        not torch.compiler.is_compiling()
        and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return native.missing(SOURCE, *FLAGS)


@cache
def _library() -> ctypes.CDLL:
    found = native.library(SOURCE, *FLAGS)
    pointer = ctypes.c_void_p
    found.scan_forward.argtypes = [pointer] * 6
    found.scan_backward.argtypes = [pointer] * 8
    return found


@torch.library.custom_op("hybridlab::selective_scan_cpp", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, offsets: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y; the last state; the states before every chunk, if they are to be kept. All float32, offsets int64."""
    return _run(x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus, keep)


def _run(x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus, keep) -> tuple[Tensor, Tensor, Tensor]:
    y, last, kept = _empty(x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus, keep)
    kept.zero_()  # its room for more chunks than there are is part of the result
    call = _Call(x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus)
    if y.numel():
        _check(_library().scan_forward(*call.arguments, y.data_ptr(), last.data_ptr(), _at(kept if keep else None)))
    elif state is not None:
        last.copy_(state)
    else:
        last.zero_()
    return y, last, kept


@_scan.register_fake
def _empty(x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus, keep):
    b, t, d = x.shape
    rows = b if offsets is None else offsets.shape[0] - 1
    chunks = b * t // CHUNK + rows
    kept = x.new_empty(chunks if keep else 0, -(-d // LANES) * LANES, A.shape[1])
    return x.new_empty(b, t, d), x.new_empty(rows, d, A.shape[1]), kept


@torch.library.custom_op("hybridlab::selective_scan_cpp_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    d_y: Tensor, d_last: Tensor, kept: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, state: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, offsets: Tensor | None,
    softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D, state, z, delta_bias; empty ones of what was not given."""
    grads = _empty_backward(d_y, d_last, kept, x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus)
    if not x.numel():
        for grad in grads:
            grad.zero_()
        grads[6].copy_(d_last if state is not None else grads[6])
        return grads
    call = _Call(x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus)
    d_y, d_last = _rows(d_y), d_last.contiguous()
    strides = (ctypes.c_int64 * 2)(*d_y.stride()[:2])
    dx, d_delta, dA, dB, dC, dD, d_state, dz, d_bias = grads
    spare = None if D is not None and delta_bias is not None else x.new_empty(x.shape[2])
    order: tuple[Tensor | None, ...] = (dx, d_delta, dB, dC, None if z is None else dz, dA, spare if D is None else dD)
    order += (spare if delta_bias is None else d_bias, None if state is None else d_state)
    out = (ctypes.c_void_p * 9)(*(_at(grad) for grad in order))
    _check(_library().scan_backward(*call.arguments, d_y.data_ptr(), strides, d_last.data_ptr(), kept.data_ptr(), out))
    return grads


@_scan_backward.register_fake
def _empty_backward(d_y, d_last, kept, x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus):
    given = (x, delta, A, B, C, D, state, z, delta_bias)
    return [x.new_empty(0 if tensor is None else tensor.shape) for tensor in given]


class _Call:
    """What both entry points of scan.cpp start with; holds the tensors whose addresses it gives away."""

    def __init__(self, x, delta, A, B, C, D, state, z, delta_bias, offsets, softplus):
        tokens = [None if t is None else _rows(t) for t in (x, delta, B, C, z)]
        rest = [None if t is None else t.contiguous() for t in (A, D, delta_bias, state, offsets)]
        rows = x.shape[0] if offsets is None else len(offsets) - 1
        self.tensors = tokens + rest
        strides = [stride for t in tokens for stride in ((0, 0) if t is None else t.stride()[:2])]
        self.arguments = (
            (ctypes.c_int64 * 6)(rows, *x.shape[1:], A.shape[1], softplus, torch.get_num_threads()),
            (ctypes.c_int64 * 10)(*strides),
            (ctypes.c_void_p * 10)(*(_at(t) for t in self.tensors)),
        )


def _rows(x: Tensor) -> Tensor:
    """x [batch, time, width], the width contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(status: int) -> None:
    if status:
        raise MemoryError("selective_scan: no memory for the scan")


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx, d_y: Tensor, d_last: Tensor, _) -> tuple:
    # Differentiable once: torch refuses to go through the backward op, which has no gradient of its own.
    grads = _scan_backward(d_y, d_last, *ctx.saved_tensors, ctx.softplus)
    given = ctx.saved_tensors[1:-1]
    return *(None if t is None else grad for t, grad in zip(given, grads, strict=True)), None, None, None


_scan.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hybridlab.selective_scan_cpp)
def _flops(x_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    return 6 * math.prod(x_shape) * A_shape[1]


@register_flop_formula(torch.ops.hybridlab.selective_scan_cpp_backward)
def _flops_backward(d_y_shape, d_last_shape, *args, **kwargs) -> int:
    """Recomputed states (4), gradients of B, C, state, inputs, step and A."""
    return 18 * math.prod(d_y_shape) * d_last_shape[2]
