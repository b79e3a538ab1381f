import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridlab.kernels import native
from hybridlab.kernels.op import Case

SOURCE = Path(__file__).with_name("walk.cpp")
CHUNK, BLOCK, PAD, STRIDE = 32, 16, 16, 1024  # as in walk.cpp: tokens of a chunk, padding, tokens per saved state
SLICES = 4  # of the heads of a group at most: what may run at once, however few rows there are


class Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_long)
        for name in ("rows", "tokens", "groups", "heads", "key", "value", "slices", "decay", "threads")
    ]


def linear_recurrence_cpp(
    q: Tensor, k: Tensor, v: Tensor, log_decay=None, state=None, offsets=None
) -> tuple[Tensor, Tensor]:
    """Same result as the definition, by C++ that keeps a chunk in a core's cache and a state every 1,024 tokens."""
    wide = (None if x is None else x.float().contiguous() for x in (q, k, v, log_decay, state))
    y, last, _ = forward(*wide, None if offsets is None else offsets.long())
    return y.to(v.dtype), last


def refuses(q, k, v, log_decay=None, state=None, offsets=None) -> str | None:
    if log_decay is not None and log_decay.dim() == 4:
        return f"log_decay {list(log_decay.shape)} is per channel"
    if wide := [x.dtype for x in (q, k, v, log_decay, state) if x is not None and x.dtype == torch.float64]:
        return f"{wide[0]}; it computes in float32"
    return native.missing(SOURCE)


def flops(case: Case) -> int:
    """Of the products it forms: chunks padded to 32 tokens and heads to multiples of 16, triangles by blocks of 16."""
    slices = min(SLICES, case["heads"] // case["groups"])
    key, value = (-(-case[name] // PAD) * PAD for name in ("key", "value"))
    chunks = sum(-(-length // CHUNK) for length in case["docs"] or [case["time"]] * case["batch"])
    triangle = CHUNK * (CHUNK + BLOCK) // 2
    shared = case["groups"] * slices * triangle * key
    return 2 * chunks * (shared + case["heads"] * (2 * CHUNK * key * value + triangle * value))


@torch.library.custom_op("hybridlab::linear_recurrence_cpp", mutates_args=(), device_types="cpu")
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, the state after each row, and the states that stand every STRIDE tokens, for the backward."""
    sizes, bounds = _sizes(q, v, log_decay, offsets)
    y, after, marks = _fake(q, k, v, log_decay, state, offsets)
    _run("forward", sizes, bounds, q, k, v, log_decay, state, y, after, marks)
    return y, after, marks


@forward.register_fake
def _fake(q, k, v, log_decay, state, offsets):
    rows, tokens = v.shape[0] if offsets is None else len(offsets) - 1, v.shape[0] * v.shape[1]
    state_shape = (v.shape[2], q.shape[3], v.shape[3])
    # not every saved state is written: how many there are depends on the documents
    return v.new_empty(v.shape), v.new_empty(rows, *state_shape), v.new_zeros(tokens // STRIDE + rows, *state_shape)


@torch.library.custom_op("hybridlab::linear_recurrence_cpp_backward", mutates_args=(), device_types="cpu")
def backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, offsets: Tensor | None, marks: Tensor,
    d_y: Tensor, d_after: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of q, k, v, log_decay (empty without one) and state."""
    sizes, bounds = _sizes(q, v, log_decay, offsets)
    d_q, d_k = torch.empty(2, sizes.slices, *q.shape).unbind()
    d_v, d_start = v.new_empty(v.shape), v.new_empty(d_after.shape)
    d_decay = v.new_zeros(sizes.rows, sizes.heads) if sizes.decay == 1 else v.new_empty(v.shape[:3])
    _run("backward", sizes, bounds, q, k, v, log_decay, marks, d_y, d_after, d_q, d_k, d_v, d_decay, d_start)
    return d_q.sum(0), d_k.sum(0), d_v, d_decay.sum(0) if sizes.decay == 1 else d_decay, d_start


@backward.register_fake
def _(q, k, v, log_decay, offsets, marks, d_y, d_after):
    d_decay = v.new_empty(v.shape[:3]) if log_decay is None else torch.empty_like(log_decay)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_decay, torch.empty_like(d_after)


def _keep(ctx, inputs, output) -> None:
    q, k, v, log_decay, state, offsets = inputs
    ctx.save_for_backward(q, k, v, log_decay, offsets, output[2])
    ctx.starts = state is not None
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, d_y, d_after, _):
    q, k, v, log_decay, offsets, marks = ctx.saved_tensors
    rows = v.shape[0] if offsets is None else len(offsets) - 1
    d_y = torch.zeros_like(v) if d_y is None else d_y.contiguous()
    d_after = v.new_zeros(rows, *marks.shape[1:]) if d_after is None else d_after.contiguous()
    d_q, d_k, d_v, d_decay, d_start = backward(q, k, v, log_decay, offsets, marks, d_y, d_after)
    return d_q, d_k, d_v, None if log_decay is None else d_decay, d_start if ctx.starts else None, None


forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula([torch.ops.hybridlab.linear_recurrence_cpp])
def _count(q, k, v, log_decay, state, offsets, **_) -> int:
    (batch, time, groups, key), (heads, value) = q, v[2:]
    # of documents, shapes tell their number alone: taken as equally long
    docs = None if offsets is None else [-(-time // (offsets[0] - 1))] * (offsets[0] - 1)
    return flops(dict(batch=batch, time=time, groups=groups, heads=heads, key=key, value=value, docs=docs))


def _sizes(q: Tensor, v: Tensor, log_decay: Tensor | None, offsets: Tensor | None) -> tuple[Sizes, Tensor]:
    """And the first token of every row, and of the one past the last, in the rows laid end to end."""
    (batch, time, groups, key), (heads, value) = q.shape, v.shape[2:]
    bounds = torch.arange(batch + 1) * time if offsets is None else offsets
    decay, slices = 0 if log_decay is None else 1 if log_decay.dim() == 1 else 2, min(SLICES, heads // groups)
    rows, threads = len(bounds) - 1, torch.get_num_threads()
    return Sizes(rows, batch * time, groups, heads, key, value, slices, decay, threads), bounds


@cache
def _library() -> ctypes.CDLL:
    found = native.library(SOURCE)
    found.stride.restype = ctypes.c_long
    assert found.stride() == STRIDE
    return found


def _run(name: str, sizes: Sizes, *tensors: Tensor | None) -> None:
    dense = [None if x is None else x.contiguous() for x in tensors]  # what is written already is
    pointers = (ctypes.c_void_p(None if x is None else x.data_ptr()) for x in dense)
    getattr(_library(), name)(ctypes.byref(sizes), *pointers)
