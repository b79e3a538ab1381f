"""linear_recurrence in Triton, as torch sees it: two operators, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridlab.kernels.chunks import how_many
from hybridlab.kernels.linear_recurrence.triton_channel import channel_gradients, channel_scores
from hybridlab.kernels.linear_recurrence.triton_gradients import gradients
from hybridlab.kernels.linear_recurrence.triton_plan import CHANNEL, HEAD, block, chunk_size, plan, rows
from hybridlab.kernels.linear_recurrence.triton_walk import walk

WIDEST = 256


def linear_recurrence_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, state=None, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same result as the definition; see NOTES.md for the kernels behind it."""
    return torch.ops.hybridlab.linear_recurrence_triton(q, k, v, log_decay, state, offsets)


def refuses(q: Tensor, k: Tensor, v: Tensor, log_decay=None, state=None, offsets=None) -> str | None:
    """Why the kernels cannot serve these arguments, or None."""
    given = {x.dtype for x in (q, k, v, log_decay, state) if x is not None}
    if given - {torch.float32, torch.float16, torch.bfloat16}:
        return f"dtypes {sorted(str(d) for d in given)}; the kernels compute in float32"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"key={q.shape[3]}, value={v.shape[3]}; a state of the kernels holds {WIDEST} of each"
    return None


@torch.library.custom_op("hybridlab::linear_recurrence_triton", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not v.numel() or not q.numel():
        return nothing(q, v, state, offsets)
    call = plan(q, k, v, log_decay, offsets)
    scores = channel_scores(call) if call.kind == CHANNEL else None
    y, _, end = walk(call, call.q, call.k, call.v, initial=wide(state), scores=scores)
    return y.to(v.dtype), end


@torch.library.custom_op("hybridlab::linear_recurrence_triton_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    offsets: Tensor | None,
    dy: Tensor,
    dend: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and state; the last two are empty where there is none."""
    like = v.new_empty(0) if log_decay is None else log_decay
    if not v.numel() or not q.numel():
        dstate = v.new_empty(0) if state is None else dend.to(state.dtype, copy=True)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(like), dstate
    call, dy = plan(q, k, v, log_decay, offsets), rows(dy)
    scores = channel_scores(call) if call.kind == CHANNEL else None
    _, before, _ = walk(call, None, call.k, call.v, initial=wide(state), states=True)
    dv, after, dstate = walk(call, call.k, call.q, dy, initial=wide(dend), scores=scores, reverse=True, states=True)
    dq, dk, dg = (channel_gradients if call.kind == CHANNEL else gradients)(call, dy, before, after)
    if call.kind == HEAD:
        dg = dg.sum((0, 1), dtype=torch.float64)
    dg = v.new_empty(0) if log_decay is None else dg.to(like.dtype)
    dstate = v.new_empty(0) if state is None else dstate.to(state.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, dstate


def wide(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


def nothing(q: Tensor, v: Tensor, state: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of no tokens, or no channels: no outputs, and the state as it came."""
    docs = v.shape[0] if offsets is None else len(offsets) - 1
    end = v.new_zeros(docs, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return torch.zeros_like(v), end if state is None else end + state


@forward.register_fake
def _(q, k, v, log_decay, state, offsets):
    docs = v.shape[0] if offsets is None else offsets.shape[0] - 1
    end = v.new_empty(docs, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), end


@backward.register_fake
def _(q, k, v, log_decay, state, offsets, dy, dend):
    dg, dstate = (v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (log_decay, state))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, dstate


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def differentiate(ctx, dy: Tensor, dend: Tensor) -> tuple:
    q, k, v, log_decay, state, offsets = ctx.saved_tensors
    dq, dk, dv, dg, dstate = backward(q, k, v, log_decay, state, offsets, dy, dend)
    return dq, dk, dv, None if log_decay is None else dg, None if state is None else dstate, None


forward.register_autograd(differentiate, setup_context=keep)


def executed(chunks: int, chunk: int, key: int, value: int, channel: bool) -> tuple[int, int]:
    """FLOPs of the matmuls of `chunks` chunks, one head each: forward, and backward."""
    square, state = 2 * chunk * chunk, 2 * chunk * key * value
    across = (chunk // 16 - 1) * square * key  # of blocks within a chunk
    scores = across if channel else -(-value // 64) * square * key  # each tile of values makes its own
    walk = square * value + 2 * state
    own = 2 * across + state if channel else square * key * 3
    return chunks * (scores + walk), chunks * (scores + walk + state + 2 * square * value + 2 * state + own)


def flops(case: dict[str, Any]) -> int:
    """Forward FLOPs that the matmuls execute in bfloat16."""
    size = block(max(case["docs"] or [case["time"]]), 64)
    lengths = case["docs"] or [case["time"]] * case["batch"]
    chunks = sum(-(-n // size) for n in lengths) * case["heads"]
    return executed(chunks, size, case["key"], case["value"], case["decay"] == "channel")[0]


def of_call(q: Tensor, v: Tensor, log_decay: Tensor | None, offsets: Tensor | None) -> tuple[int, int]:
    size = chunk_size(v, q.shape[3], offsets)
    chunks = v.shape[0] * how_many(v.shape[1], offsets, size) * v.shape[2]
    return executed(chunks, size, q.shape[3], v.shape[3], log_decay is not None and log_decay.dim() == 4)


@register_flop_formula(torch.ops.hybridlab.linear_recurrence_triton, get_raw=True)
def _(q, k, v, log_decay, state, offsets, *, out_val=None) -> int:
    return of_call(q, v, log_decay, offsets)[0]


@register_flop_formula(torch.ops.hybridlab.linear_recurrence_triton_backward, get_raw=True)
def _(q, k, v, log_decay, state, offsets, dy, dend, *, out_val=None) -> int:
    return of_call(q, v, log_decay, offsets)[1]
