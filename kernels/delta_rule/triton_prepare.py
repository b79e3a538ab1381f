"""What every chunk needs before its state is known: one program per chunk and head, all independent."""

import triton
import triton.language as tl

from hybridlab.kernels.delta_rule.triton_tiles import (
    at_least,
    decay_between,
    halves,
    inverse,
    meeting,
    product,
    product_of_inputs,
    put,
    put_square,
    span,
    tile,
)


@triton.jit
def prepare(
    q, k, beta, log_decay, solve, read, since, until, spans, time, per_row, heads, groups,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Gate none or per head: the system that gives the errors of a chunk, and what its tokens read of each other.

    solve  float32 [chunks, heads, c, c]  (I + strictly lower(k_i · k_j e^{G_i - G_j} β_j))⁻¹
    read   float32 [chunks, heads, c, c]  q_i · k_j e^{G_i - G_j} for i ≥ j
    since, until  float32 [chunks, heads, c]  e^{G_i} and e^{G_c - G_i}, with a gate
    """
    program = tl.program_id(0).to(tl.int64)
    chunk, head = program // heads, program % heads
    start, stop = span(chunk, spans, time, per_row, C, PACKED)
    if start >= stop:
        return
    i = tl.arange(0, C)
    rows = start + i[:, None]
    group = head // (heads // groups) * K
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BK):
        columns = block + tl.arange(0, BK)[None, :]
        inside = (rows < stop) & (columns < K)
        tile_q = tile(q + group, rows, columns, groups * K, inside)
        tile_k = tile(k + group, rows, columns, groups * K, inside)
        kt = tl.trans(tile_k)
        qk += product_of_inputs(tile_q, kt, LOW)
        kk += product_of_inputs(tile_k, kt, LOW)
    if GATED:
        g = tl.load(log_decay + (start + i) * heads + head, mask=start + i < stop, other=0.0).to(tl.float32)
        decay, since_start, to_end = decay_between(g, C)
        kk *= decay
        qk *= decay
        tl.store(since + program * C + i, since_start)
        tl.store(until + program * C + i, to_end)
    weight = tl.load(beta + (start + i) * heads + head, mask=start + i < stop, other=0.0).to(tl.float32)
    x = inverse(tl.where(i[:, None] > i[None, :], kk * weight[None, :], 0.0), C)
    put_square(solve, program, x, C)
    put_square(read, program, tl.where(i[:, None] >= i[None, :], qk, 0.0), C)


@triton.jit
def _meet(qk, kk, q, k, since, rest, S: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr):
    """Products between the rows of odd and the even blocks of S rows, each over the decay up to their border."""
    odd = ((tl.arange(0, C) // S) % 2 == 1)[:, None]
    decay = tl.exp(tl.where(odd, since, rest))
    kt = tl.trans(k * decay)
    qk = tl.where(meeting(S, C), product(q * decay, kt, LOW), qk)
    kk = tl.where(meeting(S, C), product(k * decay, kt, LOW), kk)
    return qk, kk


@triton.jit
def decayed(q, k, g, C: tl.constexpr, LOW: tl.constexpr):
    """Σ_k q_ik k_jk e^{G_ik - G_jk} and the same of k with k, for i ≥ j [c, c]; sums of g since the start and to the
    end of the chunk [c, k]. Blocks double in size, so that no exponent is positive: see `decayed_products`."""
    i = tl.arange(0, C)
    qk = tl.where(i[:, None] == i[None, :], tl.sum(q * k, axis=1)[:, None], 0.0)
    kk = tl.zeros([C, C], tl.float32)
    since, rest = g, tl.zeros_like(g)
    for level in tl.static_range(0, 7):
        if (1 << level) < C:
            qk, kk = _meet(qk, kk, q, k, since, rest, 1 << level, C, LOW)
            odd = ((i >> level) % 2 == 1)[:, None]
            low, high = halves(g, 1 << level, C)
            since += tl.where(odd, low, 0.0)
            rest += tl.where(odd, 0.0, high)
    return qk, kk, since, rest


@triton.jit
def prepare_channel(
    q, k, beta, log_decay, solve, read, q_since, k_since, k_until, whole, spans, time, per_row, heads, groups,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Gate per key channel: as `prepare`, and q and k scaled by the decay since the chunk's start and up to its end.

    q_since, k_since, k_until  float32 [tokens, heads, key]  q e^G, k e^G and k e^{G_c - G}
    whole                      float32 [chunks, heads, key]  e^{G_c}
    """
    program = tl.program_id(0).to(tl.int64)
    chunk, head = program // heads, program % heads
    start, stop = span(chunk, spans, time, per_row, C, PACKED)
    if start >= stop:
        return
    i = tl.arange(0, C)
    rows = start + i[:, None]
    group, own = head // (heads // groups) * K, head * K
    kk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    for block in range(0, K, BK):
        columns = block + tl.arange(0, BK)[None, :]
        inside = (rows < stop) & (columns < K)
        tile_q = tile(q + group, rows, columns, groups * K, inside)
        tile_k = tile(k + group, rows, columns, groups * K, inside)
        g = at_least(tile(log_decay + own, rows, columns, heads * K, inside))
        qk_here, kk_here, start_sum, end_sum = decayed(tile_q, tile_k, g, C, LOW)
        qk += qk_here
        kk += kk_here
        decay = tl.exp(start_sum)
        put(q_since + own, rows, columns, heads * K, inside, tile_q * decay)
        put(k_since + own, rows, columns, heads * K, inside, tile_k * decay)
        put(k_until + own, rows, columns, heads * K, inside, tile_k * tl.exp(end_sum))
        last = tl.sum(tl.where((i == C - 1)[:, None], decay, 0.0), axis=0)
        tl.store(whole + program * K + columns, last[None, :], mask=columns < K)
    weight = tl.load(beta + (start + i) * heads + head, mask=start + i < stop, other=0.0).to(tl.float32)
    x = inverse(tl.where(i[:, None] > i[None, :], kk * weight[None, :], 0.0), C)
    put_square(solve, program, x, C)
    put_square(read, program, tl.where(i[:, None] >= i[None, :], qk, 0.0), C)
