"""Triton: tiles of time by channels. Every pass recomputes what it needs from the inputs; nothing else is stored."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridlab.kernels.triton_launch import interpreted, settings

WIDEST = 8  # taps: all are unrolled
DEFAULT = {
    "forward": {"TIME": 32, "CHANNELS": 64, "num_warps": 4},
    "backward": {"TIME": 16, "CHANNELS": 64, "num_warps": 4},
}
CANDIDATES = {
    name: [{"TIME": t, "CHANNELS": d, "num_warps": w} for t, d, w in tiles]
    for name, tiles in {
        "forward": [(32, 64, 4), (16, 64, 2), (16, 128, 4), (32, 128, 4), (64, 64, 4), (32, 128, 8), (64, 32, 4)],
        "backward": [(16, 64, 4), (32, 64, 4), (16, 128, 4), (32, 64, 8), (16, 128, 8), (64, 32, 4), (64, 64, 8)],
    }.items()
}
EDGE = 64  # channels per program of the kernels that touch states only


def refuses(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; it computes in float32 from float32, bfloat16 or float16"
    if weight.shape[1] > WIDEST:
        return f"width={weight.shape[1]}; it unrolls at most {WIDEST} taps"
    return None


def causal_conv_triton(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False):
    """Same result as the definition; refuses what `refuses` names. Differentiable once."""
    return _conv(x, weight, bias, None if state is None else state.float(), offsets, silu)


@triton.jit
def _tokens(offsets, docs, t, b, time):
    """Of tokens t [t] of batch row b: their row of the state, and where their document begins and ends."""
    if offsets is None:
        row, start, end = tl.zeros_like(t) + b, tl.zeros_like(t), tl.zeros_like(t) + time
    else:
        row = tl.load(docs + t, mask=t < time, other=0)
        start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    return row, start, end


@triton.jit
def _document(offsets, time):
    """Of this program's document: its number, where it begins and ends, and where its batch row begins."""
    doc = tl.program_id(0)
    if offsets is None:
        start, end, first = doc * 0, doc * 0 + time, doc.to(tl.int64) * time
    else:
        start, end, first = tl.load(offsets + doc), tl.load(offsets + doc + 1), doc.to(tl.int64) * 0
    return doc, start, end, first


@triton.jit
def _window(x, state, tile, at, row, start, end, d, n_d, WIDTH: tl.constexpr, MORE: tl.constexpr):
    """Inputs from w - 1 places before `at` to MORE places behind it, oldest first: a tuple of tiles [t, d].

    They are seen from one document: what it holds, before that its state, elsewhere 0. `tile` is where x_at stands.
    """
    seen = ()
    for i in tl.static_range(WIDTH + MORE):
        place = at + (i - (WIDTH - 1))
        here = (place >= start) & (place < end)
        mask = here[:, None] & (d < n_d)[None, :]
        # [t, d]
        value = tl.load(x + tile + (i - (WIDTH - 1)) * n_d, mask=mask, other=0.0).to(tl.float32)
        if state is not None:
            line = place - start + (WIDTH - 1)
            before = (line >= 0) & (place < start)
            mask = before[:, None] & (d < n_d)[None, :]
            line = row.to(tl.int64) * (WIDTH - 1) + line
            # [t, d]
            past = tl.load(state + line[:, None] * n_d + d[None, :], mask=mask, other=0.0)
            value = tl.where(before[:, None], past, value)
        seen = seen + (value,)  # type: ignore[assignment]
    return seen


@triton.jit
def _taps(weight, d, n_d, WIDTH: tl.constexpr):
    """The columns of the weight: a tuple of [d]."""
    taps = ()
    for i in tl.static_range(WIDTH):
        # [d]
        taps = taps + (tl.load(weight + d * WIDTH + i, mask=d < n_d, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return taps


@triton.jit
def _sum(seen, taps, bias, d, n_d, WIDTH: tl.constexpr, LATER: tl.constexpr):
    """bias + Σ_i weight[:, i] x_{t - w + 1 + i}  [t, d], LATER places behind those the window was made for."""
    total = tl.zeros_like(seen[0])
    if bias is not None:
        # [d]
        total += tl.load(bias + d, mask=d < n_d, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(WIDTH):
        total += taps[i][None, :] * seen[LATER + i]
    return total


@triton.jit
def _gradients(
    d_y, d_last, seen, taps, bias, tile, at, row, start, end, d, n_d, WIDTH: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """Gradients [t, d] of the input at places `at`, in their document or in its state, and of the sum there.

    An input reaches w outputs, and stays in the last state when less than w - 1 others follow.
    """
    line = at - end + (WIDTH - 1)
    mask = ((line >= 0) & (at < end))[:, None] & (d < n_d)[None, :]
    line = row.to(tl.int64) * (WIDTH - 1) + line
    # [t, d]
    d_x = tl.load(d_last + line[:, None] * n_d + d[None, :], mask=mask, other=0.0)
    d_sum = tl.zeros_like(d_x)
    for i in tl.static_range(WIDTH):
        place = at + (WIDTH - 1 - i)  # the output at `at` comes last and stays
        here = (place >= start) & (place < end)
        mask = here[:, None] & (d < n_d)[None, :]
        # [t, d]
        d_sum = tl.load(d_y + tile + (WIDTH - 1 - i) * n_d, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            total = _sum(seen, taps, bias, d, n_d, WIDTH, WIDTH - 1 - i)
            gate = tl.sigmoid(total)
            d_sum = tl.where(here[:, None], d_sum * (gate * (1.0 + total * (1.0 - gate))), 0.0)
        d_x += taps[i][None, :] * d_sum
    return d_x, d_sum


@triton.jit
def _forward(
    x, weight, bias, state, offsets, docs, y, time, n_d, n_tiles,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: y at one tile of time by channels."""
    b, block = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    t, d = block * TIME + tl.arange(0, TIME), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tile = (b.to(tl.int64) * time + t)[:, None] * n_d + d[None, :]
    row, start, end = _tokens(offsets, docs, t, b, time)
    seen = _window(x, state, tile, t, row, start, end, d, n_d, WIDTH, 0)
    total = _sum(seen, _taps(weight, d, n_d, WIDTH), bias, d, n_d, WIDTH, 0)
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + tile, total, mask=(t < time)[:, None] & (d < n_d)[None, :])


@triton.jit
def _last(x, state, offsets, last, time, n_d, WIDTH: tl.constexpr, PAST: tl.constexpr, CHANNELS: tl.constexpr):
    """One program: the last inputs of one document; PAST rows, of which w - 1 are stored."""
    doc, start, end, first = _document(offsets, time)
    j, d = tl.arange(0, PAST), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at, row = end - (WIDTH - 1) + j, tl.zeros_like(j) + doc
    tile = (first + at)[:, None] * n_d + d[None, :]
    seen = _window(x, state, tile, at, row, start, end, d, n_d, WIDTH, 0)
    line = doc.to(tl.int64) * (WIDTH - 1) + j
    mask = (j < WIDTH - 1)[:, None] & (d < n_d)[None, :]
    tl.store(last + line[:, None] * n_d + d[None, :], seen[WIDTH - 1], mask=mask)


@triton.jit
def _backward(
    d_y, d_last, x, weight, bias, state, offsets, docs, d_x, parts, time, n_d, n_tiles,
    WIDTH: tl.constexpr, SILU: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: d_x at one tile, and what the tile adds to the gradients of the taps and the bias."""
    b, block = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    t, d = block * TIME + tl.arange(0, TIME), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tile = (b.to(tl.int64) * time + t)[:, None] * n_d + d[None, :]
    row, start, end = _tokens(offsets, docs, t, b, time)
    seen = _window(x, state, tile, t, row, start, end, d, n_d, WIDTH, WIDTH - 1 if SILU else 0)
    taps = _taps(weight, d, n_d, WIDTH)
    grad, d_sum = _gradients(d_y, d_last, seen, taps, bias, tile, t, row, start, end, d, n_d, WIDTH, SILU)
    tl.store(d_x + tile, grad, mask=(t < time)[:, None] & (d < n_d)[None, :])
    live = (t < time)[:, None]
    part = parts + tl.program_id(0).to(tl.int64) * (WIDTH + 1) * n_d + d
    for i in tl.static_range(WIDTH):
        tl.store(part + i * n_d, tl.sum(tl.where(live, d_sum * seen[i], 0.0), 0), mask=d < n_d)
    tl.store(part + WIDTH * n_d, tl.sum(tl.where(live, d_sum, 0.0), 0), mask=d < n_d)


@triton.jit
def _d_state(
    d_y, d_last, x, weight, bias, state, offsets, d_state, time, n_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, PAST: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of the state of one document."""
    doc, start, end, first = _document(offsets, time)
    j, d = tl.arange(0, PAST), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    at, row = start - (WIDTH - 1) + j, tl.zeros_like(j) + doc
    tile = (first + at)[:, None] * n_d + d[None, :]
    seen = _window(x, state, tile, at, row, start, end, d, n_d, WIDTH, WIDTH - 1 if SILU else 0)
    taps = _taps(weight, d, n_d, WIDTH)
    grad, _ = _gradients(d_y, d_last, seen, taps, bias, tile, at, row, start, end, d, n_d, WIDTH, SILU)
    line = doc.to(tl.int64) * (WIDTH - 1) + j
    mask = (j < WIDTH - 1)[:, None] & (d < n_d)[None, :]
    tl.store(d_state + line[:, None] * n_d + d[None, :], grad, mask=mask)


def _documents(x: Tensor, offsets: Tensor | None) -> Tensor | None:
    """The document of every token, int32 [time]; the host does not wait for the device."""
    if offsets is None:
        return None
    token = torch.arange(x.shape[1], device=x.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True, out_int32=True)


def _stored(x: Tensor) -> torch.dtype:
    """What kernels store: the interpreter cuts float32 off to bfloat16, so there it is left to torch to round."""
    return torch.float32 if interpreted() else x.dtype


def _rows(x: Tensor, offsets: Tensor | None) -> int:
    return x.shape[0] if offsets is None else len(offsets) - 1


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


@torch.library.custom_op("hybridlab::causal_conv_triton", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, offsets: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    (batch, time, n_d), width, rows = x.shape, weight.shape[1], _rows(x, offsets)
    x, weight, bias, state, offsets = _contiguous(x, weight, bias, state, offsets)
    y, last = x.new_empty(x.shape, dtype=_stored(x)), x.new_empty(rows, width - 1, n_d, dtype=torch.float32)
    chosen = settings("causal_conv", "forward", DEFAULT["forward"], width=width)
    n_tiles = triton.cdiv(time, chosen["TIME"])
    if y.numel():
        grid = (batch * n_tiles, triton.cdiv(n_d, chosen["CHANNELS"]))
        docs = _documents(x, offsets)
        _forward[grid](x, weight, bias, state, offsets, docs, y, time, n_d, n_tiles, WIDTH=width, SILU=silu, **chosen)
    if last.numel():
        sizes = dict(WIDTH=width, PAST=triton.next_power_of_2(width - 1), CHANNELS=EDGE, num_warps=1)
        _last[(rows, triton.cdiv(n_d, EDGE))](x, state, offsets, last, time, n_d, **sizes)
    return y.to(x.dtype), last


@_conv.register_fake
def _(x, weight, bias, state, offsets, silu):
    last = x.new_empty(_rows(x, offsets), weight.shape[1] - 1, x.shape[2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), last


@torch.library.custom_op("hybridlab::causal_conv_triton_backward", mutates_args=())
def _conv_backward(
    d_y: Tensor, d_last: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> d_x, d_weight, d_bias (empty without a bias), d_state (empty without a state)"""
    (batch, time, n_d), width, rows = x.shape, weight.shape[1], _rows(x, offsets)
    d_y, d_last, x, weight, bias, state, offsets = _contiguous(d_y, d_last, x, weight, bias, state, offsets)
    chosen = settings("causal_conv", "backward", DEFAULT["backward"], width=width)
    n_tiles = triton.cdiv(time, chosen["TIME"])
    d_x, d_state = x.new_empty(x.shape, dtype=_stored(x)), x.new_empty(0) if state is None else torch.empty_like(state)
    parts = x.new_empty(batch * n_tiles, width + 1, n_d, dtype=torch.float32)
    inputs = (d_y, d_last, x, weight, bias, state, offsets)
    if x.numel():
        grid = (batch * n_tiles, triton.cdiv(n_d, chosen["CHANNELS"]))
        docs = _documents(x, offsets)
        _backward[grid](*inputs, docs, d_x, parts, time, n_d, n_tiles, WIDTH=width, SILU=silu, **chosen)
    if d_state.numel():
        sizes = dict(WIDTH=width, SILU=silu, PAST=triton.next_power_of_2(width - 1), CHANNELS=EDGE, num_warps=1)
        _d_state[(rows, triton.cdiv(n_d, EDGE))](*inputs, d_state, time, n_d, **sizes)
    total = parts.sum(0, dtype=torch.float64)  # float32 loses more here than in the tiles
    d_weight = total[:width].mT.to(weight.dtype).contiguous()
    d_bias = x.new_empty(0) if bias is None else total[width].to(bias.dtype, copy=True)
    return d_x.to(x.dtype), d_weight, d_bias, d_state


@_conv_backward.register_fake
def _(d_y, d_last, x, weight, bias, state, offsets, silu):
    alike = [v.new_empty(v.shape) for v in (x, weight)]
    absent = x.new_empty(0)
    return *alike, *(absent.clone() if v is None else v.new_empty(v.shape) for v in (bias, state))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_y: Tensor, d_last: Tensor):
    x, weight, bias, state, offsets = ctx.saved_tensors
    d_x, d_weight, d_bias, d_state = _conv_backward(d_y, d_last, x, weight, bias, state, offsets, ctx.silu)
    return d_x, d_weight, None if bias is None else d_bias, None if state is None else d_state, None, None


_conv.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.hybridlab.causal_conv_triton)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    batch, time, n_d = x_shape
    return 2 * batch * time * n_d * weight_shape[1]


@register_flop_formula(torch.ops.hybridlab.causal_conv_triton_backward)
def _backward_flops(d_y_shape, d_last_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(x_shape, weight_shape)
