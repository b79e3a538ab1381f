"""Backward: the same pieces in reverse order of time; states are computed again, tile by tile."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.selective_scan import triton_parts
from hybridlab.kernels.selective_scan.triton_forward import carry, forward
from hybridlab.kernels.selective_scan.triton_parts import (
    entries,
    gates,
    lines,
    over_channels,
    piece_of,
    plus,
    scan,
    scan_back,
    states,
    steps,
)
from hybridlab.kernels.triton_launch import settings

DEFAULT = dict(BN=2, BD=64, num_warps=4, num_stages=1, PROGRAMS=396, LEAST=512)


@triton.jit
def _local(
    delta, A, C, z, bias, d_y, ends, sums, work, pieces, time, length, d, blocks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient that leaves a piece, not the first of its document, at its front when none enters at its end."""
    piece, c = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    start, size, doc, tile, first, last = piece_of(pieces, piece, time, length, BT)
    if (doc < 0) | first:
        return
    n_tiles, t = (size + BT - 1) // BT, tl.arange(0, BT)
    ends += piece.to(tl.int64) * N * d
    total = tl.full([BD], 0.0, tl.float32)
    for k in range(0, n_tiles):
        i = n_tiles - 1 - k
        base, at, live = lines(start, i, size, c, d, BT)
        step, slope = steps(delta, bias, base + at, live, c, d, SOFTPLUS)
        grad = tl.load(d_y + base + at, mask=live, other=0.0).to(tl.float32)
        if z is not None:
            gate, opened = gates(z, base + at, live)
            grad *= gate * opened
        for n0 in range(0, N, BN):
            place, inside, line, exists, rate, write, read = states(
                A, C, C, n0, start + i * BT, i * BT + t < size, c, d, N, BT, BN
            )
            r = tl.load(ends + place, mask=inside & (k > 0), other=0.0)
            g, r = scan_back(tl.exp(step[:, None, :] * rate[None, :, :]), grad[:, None, :] * read, r, BT)
            tl.store(ends + place, r, mask=inside)
        total += tl.reduce(step, 0, plus)
        tl.debug_barrier()  # what was just stored is loaded by the next tile
    tl.store(sums + piece.to(tl.int64) * d + c, total, mask=c < d)


@triton.jit
def _backward(
    x, delta, A, B, C, D, z, bias, slots, d_y, carried, leave, dx, d_delta, dA, dB, dC, dD, dz, d_bias,
    pieces, tokens, time, length, d, blocks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block, piece = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c = block * BD + tl.arange(0, BD)
    start, size, doc, tile, first, last = piece_of(pieces, piece.to(tl.int32), time, length, BT)
    if doc < 0:
        return
    area, n_tiles, t = N * d, (size + BT - 1) // BT, tl.arange(0, BT)
    leave += doc.to(tl.int64) * area
    carried, dA = carried + piece * area, dA + piece * area
    if size == 0:
        _pass(carried, leave, c, d, N, BN)
    sum_D, sum_bias = tl.full([BD], 0.0, tl.float32), tl.full([BD], 0.0, tl.float32)
    part = block.to(tl.int64) * tokens * N
    for k in range(0, n_tiles):
        i = n_tiles - 1 - k
        base, at, live = lines(start, i, size, c, d, BT)
        step, slope = steps(delta, bias, base + at, live, c, d, SOFTPLUS)
        u = step * tl.load(x + base + at, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(d_y + base + at, mask=live, other=0.0).to(tl.float32)
        if z is not None:
            gate, opened = gates(z, base + at, live)
            grad *= gate * opened
        d_u, d_exponent, y = _tile(
            A, B, C, step, u, grad, slots + (tile + i) * area, carried, leave, dA, dB + part, dC + part,
            z, start + i * BT, i * BT + t < size, first & (i == 0), c, d, N, BT, BN, BD,
        )  # fmt: skip
        to_D, to_bias = _finish(
            x, delta, D, z, bias, d_y, dx, d_delta, dz, d_u, d_exponent, y, base + at, live, c, d, SOFTPLUS
        )
        sum_D, sum_bias = sum_D + to_D, sum_bias + to_bias
        tl.debug_barrier()  # what was just stored is loaded by the next tile
    if D is not None:
        tl.store(dD + piece * d + c, sum_D, mask=c < d)
    if d_bias is not None:
        tl.store(d_bias + piece * d + c, sum_bias, mask=c < d)


@triton.jit
def _tile(
    A, B, C, step, u, grad, slot, carried, leave, dA, dB, dC, z, line, seen, first, c, d,
    N: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """-> d(Δx), the part of dΔ that comes through the decays, and Σ_n C h if there is a gate; all [t, d]."""
    nothing = tl.full([BT, BN, BD], 0.0, tl.float32)
    d_u, d_exponent, y = nothing, nothing, nothing
    for n0 in range(0, N, BN):
        at, inside, place, live, rate, write, read = states(A, B, C, n0, line, seen, c, d, N, BT, BN)
        a, b = tl.exp(step[:, None, :] * rate[None, :, :]), u[:, None, :] * write
        past, h = scan(a, b, tl.load(slot + at, mask=inside, other=0.0), BT)
        g, r = scan_back(a, grad[:, None, :] * read, tl.load(carried + at, mask=inside, other=0.0), BT)
        h, through = past + b, past * g
        writes, reads = over_channels(u[:, None, :] * g, grad[:, None, :] * h, BT, BN, BD)
        tl.store(dB + place, writes, mask=live)
        tl.store(dC + place, reads, mask=live)
        d_u += g * write
        d_exponent += through * rate[None, :, :]
        if z is not None:
            y += h * read
        before = tl.load(dA + at, mask=inside, other=0.0)
        tl.store(
            dA + at,
            (before.to(tl.float64) + tl.reduce((through * step[:, None, :]).to(tl.float64), 0, plus)).to(tl.float32),
            mask=inside,
        )
        tl.store(carried + at, r, mask=inside)
        tl.store(leave + at, r, mask=inside & first)
    return tl.reduce(d_u, 1, plus), tl.reduce(d_exponent, 1, plus), tl.reduce(y, 1, plus)


@triton.jit
def _finish(x, delta, D, z, bias, d_y, dx, d_delta, dz, d_u, d_exponent, y, at, live, c, d, SOFTPLUS: tl.constexpr):
    """From the sums over states to gradients of x, delta and z; -> what the tile adds to those of D and the bias, [d].

    Loads again what the loop over states would have to hold in registers.
    """
    step, slope = steps(delta, bias, at, live, c, d, SOFTPLUS)
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
    grad = tl.load(d_y + at, mask=live, other=0.0).to(tl.float32)
    skip = tl.full(c.shape, 0.0, tl.float32)
    if D is not None:
        skip = tl.load(D + c, mask=c < d, other=0.0).to(tl.float32)
        y += skip[None, :] * value
    if z is not None:
        gate, opened = gates(z, at, live)
        tl.store(dz + at, grad * y * opened * (1.0 + gate * (1.0 - opened)), mask=live)
        grad *= gate * opened
    d_value, d_step = d_u * step, (d_u * value + d_exponent) * slope
    if D is not None:
        d_value += skip[None, :] * grad
    tl.store(dx + at, d_value, mask=live)
    tl.store(d_delta + at, d_step, mask=live)
    return tl.reduce(value * grad, 0, plus), tl.reduce(tl.where(live, d_step, 0.0), 0, plus)


@triton.jit
def _pass(carried, leave, c, d, N: tl.constexpr, BN: tl.constexpr):
    """The gradient of what an empty document leaves is that of what enters it."""
    for n0 in range(0, N, BN):
        at, inside = entries(n0, c, d, N, BN)
        tl.store(leave + at, tl.load(carried + at, mask=inside, other=0.0), mask=inside)


def backward(
    d_y: Tensor, d_leave: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    enter: Tensor, offsets: Tensor | None, z: Tensor | None, bias: Tensor | None, softplus: bool, slots: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """Gradients by name, to be rounded to the dtypes of their tensors; dA and d_enter [.., n, d].

    As for `forward`; slots as it returns them, or empty; d_leave [docs, n, d] float32
    """
    (batch, time, n_channels), n_states = x.shape, A.shape[0]
    if not slots.numel():
        slots = forward(x, delta, A, B, C, D, enter, offsets, z, bias, softplus, keep=True, want_y=False)[2]
    chosen = dict(settings("selective_scan", "backward", DEFAULT, n=n_states))
    programs, least = chosen.pop("PROGRAMS"), chosen.pop("LEAST")
    chosen, blocks = triton_parts.launch(chosen, n_states, n_channels)
    pieces = triton_parts.Pieces(
        batch, time, offsets, triton_parts.piece_length(batch, time, offsets is not None, blocks, programs, least)
    )
    zeros = lambda *shape: x.new_zeros(shape, dtype=torch.float32)  # noqa: E731
    grid, common = (pieces.n * blocks,), dict(N=n_states, SOFTPLUS=softplus, BT=triton_parts.TILE, **chosen)
    where = (time, pieces.length, n_channels, blocks)
    if pieces.length < time:
        ends, sums = zeros(pieces.n, *A.shape), zeros(pieces.n, n_channels)
        _local[grid](delta, A, C, z, bias, d_y, ends, sums, None, pieces.table, *where, **common)
        carried = carry(pieces, A, d_leave, ends, sums, back=True)
    else:
        carried = d_leave.clone()
    dx, d_delta, dz = (None if v is None else triton_parts.to_store(v) for v in (x, delta, z))
    dA, d_enter = zeros(pieces.n, *A.shape), torch.empty_like(enter)
    dB, dC = (x.new_empty(blocks, batch * time, n_states, dtype=torch.float32) for _ in range(2))
    dD, d_bias = (None if v is None else zeros(pieces.n, n_channels) for v in (D, bias))
    _backward[grid](
        x, delta, A, B, C, D, z, bias, slots, d_y, carried, d_enter, dx, d_delta, dA, dB, dC, dD, dz, d_bias,
        pieces.table, batch * time, *where, **common,
    )  # fmt: skip
    whole: dict[str, Any] = dict(dA=dA, dB=dB, dC=dC, dD=dD, d_bias=d_bias)
    reduced: dict[str, Any] = {name: v if v is None else v.sum(0) for name, v in whole.items()}
    return reduced | dict(dx=dx, d_delta=d_delta, dz=dz, d_enter=d_enter)
