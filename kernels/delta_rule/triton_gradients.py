"""Gradients of q, k, β and the gate: one program per chunk, head and block of keys, all independent.

With E = errors, S and S' the states before and after a chunk, and dE the gradient of what `solve` is applied to:

    read      dY Eᵀ β_j          k_i · k_j    -dE Eᵀ β_j
    q e^G     dY Sᵀ              k e^G        -dE Sᵀ            k e^{G_c - G}    β E dS'ᵀ

β_j scales column j of all of E, so its gradient is the sum of what it scales, each times its own gradient.
A product that needs the transpose of another product is written with the other operand transposed instead: Triton from
3.4 on miscompiles `dot(trans(<result of a dot>), x)` for Hopper.
"""

import triton
import triton.language as tl

from hybridlab.kernels.delta_rule.triton_tiles import (
    at_least,
    decay_between,
    halves,
    meeting,
    product,
    product_of_inputs,
    put,
    span,
    tile,
)


@triton.jit
def _place(heads, spans, time, per_row, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    block = program % tl.cdiv(K, BK)
    at = program // tl.cdiv(K, BK)
    start, stop = span(at // heads, spans, time, per_row, C, PACKED)
    return at, at % heads, block, start, stop


@triton.jit
def _meet_values(
    dy, writes, errors, entering, leaving, own, at, rows, keys, stop, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Sums over all values: dY Eᵀ, -dE Eᵀ [c, c]; dY Sᵀ, -dE Sᵀ, E dS'ᵀ [c, k]; S · dS' [k]"""
    read = tl.zeros([C, C], tl.float32)
    write = tl.zeros([C, C], tl.float32)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    left = tl.zeros([C, BK], tl.float32)
    kept = tl.zeros([BK], tl.float32)
    for block in range(0, V, BV):
        values = block + tl.arange(0, BV)[None, :]
        inside = (rows < stop) & (values < V)
        state_inside = (keys < K)[:, None] & (values < V)
        pointers = at * (K * V) + keys[:, None] * V + values
        out = tile(dy + own * V, rows, values, heads * V, inside)
        e = tile(errors + own * V, rows, values, heads * V, inside)
        de = -tile(writes + own * V, rows, values, heads * V, inside)
        s = tl.load(entering + pointers, mask=state_inside, other=0.0).to(tl.float32)
        ds = tl.load(leaving + pointers, mask=state_inside, other=0.0).to(tl.float32)
        et, st = tl.trans(e), tl.trans(s)
        read += product(out, et, LOW)
        write += product(de, et, LOW)
        dq += product(out, st, LOW)
        dk += product(de, st, LOW)
        left += product(e, tl.trans(ds), LOW)
        kept += tl.sum(s * ds, axis=1)
    return read, write, dq, dk, left, kept


@triton.jit
def gradients(
    q, k, beta, log_decay, dy, writes, errors, entering, leaving, dq, dk, dbeta, dlog_decay,
    spans, time, per_row, tokens, heads, groups,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Gate none or per head.

    dq, dk             [tokens, heads, key]: of every head, even where heads share q and k
    dbeta, dlog_decay  float32 [blocks of keys, tokens, heads], to be summed over the blocks
    """
    at, head, block, start, stop = _place(heads, spans, time, per_row, K, BK, C, PACKED)
    if start >= stop:
        return
    i = tl.arange(0, C)
    tokens_at, keys = start + i, block * BK + tl.arange(0, BK)
    rows, columns = tokens_at[:, None], keys[None, :]
    is_token = tokens_at < stop
    inside = is_token[:, None] & (columns < K)
    read, write, dq_since, dk_since, left, kept = _meet_values(
        dy, writes, errors, entering, leaving, head, at, rows, keys, stop, heads, K, V, BK, BV, C, LOW
    )
    group = head // (heads // groups) * K
    tile_q = tile(q + group, rows, columns, groups * K, inside)
    tile_k = tile(k + group, rows, columns, groups * K, inside)
    qt, kt = tl.trans(tile_q), tl.trans(tile_k)
    weight = tl.load(beta + tokens_at * heads + head, mask=is_token, other=0.0).to(tl.float32)
    read = tl.where(i[:, None] >= i[None, :], read, 0.0)
    write = tl.where(i[:, None] > i[None, :], write, 0.0)
    if GATED:
        g = tl.load(log_decay + tokens_at * heads + head, mask=is_token, other=0.0).to(tl.float32)
        decay, since, until = decay_between(g, C)
        read *= decay
        write *= decay
        dq_since *= since[:, None]
        dk_since *= since[:, None]
        left *= until[:, None]
    # what every pair adds to the gradients of β_j and of the decays between j and i, but for β_j
    pairs = read * product_of_inputs(tile_q, kt, LOW) + write * product_of_inputs(tile_k, kt, LOW)
    own = tl.sum(tile_k * left, axis=1)
    beta_at = dbeta + (block * tokens + tokens_at) * heads + head
    tl.store(beta_at, tl.sum(pairs, axis=0) + own, mask=is_token)
    read *= weight[None, :]
    write *= weight[None, :]
    left *= weight[:, None]
    put(dq + head * K, rows, columns, heads * K, inside, dq_since + product(read, tile_k, LOW))
    back = product(qt, read, LOW) + product(kt, write, LOW)  # [k, c]
    put(dk + head * K, rows, columns, heads * K, inside, dk_since + left + product(write, tile_k, LOW) + tl.trans(back))
    if GATED:
        # a pair counts for every token m with j < m ≤ i: sums over i ≥ m of all its row adds less all its column adds,
        # in float64, so that what cancels does
        pairs = tl.where(i[:, None] > i[None, :], pairs * weight[None, :], 0.0).to(tl.float64)
        ends = tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        ends += tl.sum(tile_q * dq_since + tile_k * dk_since, axis=1).to(tl.float64)
        begins = (own * weight).to(tl.float64)
        kept_whole = tl.sum(tl.where(i == C - 1, since, 0.0), axis=0) * tl.sum(kept, axis=0)
        dg = tl.sum(ends, axis=0) - tl.cumsum(ends, 0) + ends + tl.cumsum(begins, 0) - begins + kept_whole
        tl.store(dlog_decay + (block * tokens + tokens_at) * heads + head, dg.to(tl.float32), mask=is_token)


@triton.jit
def _spread(dx, odd, S: tl.constexpr, C: tl.constexpr):
    """Gradients of sums over rows, to the rows: in odd blocks of S rows a sum runs from the block's start to its row,
    that row included; in even ones from the row, left out, to the block's end."""
    BK: tl.constexpr = dx.shape[1]
    x = tl.reshape(dx, [C // S, S, BK])
    sums = tl.cumsum(x, axis=1) - x
    whole = tl.broadcast_to(tl.sum(x, axis=1)[:, None, :], [C // S, S, BK])
    return tl.where(odd, tl.reshape(whole - sums, [C, BK]), tl.reshape(sums, [C, BK]))


@triton.jit
def _meet_back(q, k, since, rest, read, write, weight, S: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr):
    """One level of `decayed`, backwards: what it adds to the gradients of q, k, g [c, k] and β [c]."""
    odd = ((tl.arange(0, C) // S) % 2 == 1)[:, None]
    decay = tl.exp(tl.where(odd, since, rest))
    q, k = q * decay, k * decay
    qt, kt = tl.trans(q), tl.trans(k)
    read = tl.where(meeting(S, C), read, 0.0)
    write = tl.where(meeting(S, C), write, 0.0)
    dbeta = tl.sum(read * product(q, kt, LOW) + write * product(k, kt, LOW), axis=0)
    read *= weight[None, :]
    write *= weight[None, :]
    dq = product(read, k, LOW)
    dk = product(write, k, LOW) + tl.trans(product(qt, read, LOW) + product(kt, write, LOW))
    return dq * decay, dk * decay, _spread(q * dq + k * dk, odd, S, C), dbeta


@triton.jit
def _levels_back(q, k, g, read, write, weight, C: tl.constexpr, LOW: tl.constexpr):
    """`decayed`, backwards: gradients of q, k, g [c, k] and β [c], and its sums since the start and to the end."""
    i = tl.arange(0, C)
    same = tl.sum(tl.where(i[:, None] == i[None, :], read, 0.0), axis=1)
    dbeta = same * tl.sum(q * k, axis=1)
    dq, dk, dg = (same * weight)[:, None] * k, (same * weight)[:, None] * q, tl.zeros_like(g)
    since, rest = g, tl.zeros_like(g)
    for level in tl.static_range(0, 7):
        if (1 << level) < C:
            dq_here, dk_here, dg_here, dbeta_here = _meet_back(
                q, k, since, rest, read, write, weight, 1 << level, C, LOW
            )
            dq += dq_here
            dk += dk_here
            dg += dg_here
            dbeta += dbeta_here
            odd = ((i >> level) % 2 == 1)[:, None]
            low, high = halves(g, 1 << level, C)
            since += tl.where(odd, low, 0.0)
            rest += tl.where(odd, 0.0, high)
    return dq, dk, dg, dbeta, since, rest


@triton.jit
def gradients_channel(
    q, k, beta, log_decay, dy, writes, errors, entering, leaving, dq, dk, dbeta, dlog_decay,
    spans, time, per_row, tokens, heads, groups,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Gate per key channel: as `gradients`, but dlog_decay [tokens, heads, key]."""
    at, head, block, start, stop = _place(heads, spans, time, per_row, K, BK, C, PACKED)
    if start >= stop:
        return
    i = tl.arange(0, C)
    tokens_at, keys = start + i, block * BK + tl.arange(0, BK)
    rows, columns = tokens_at[:, None], keys[None, :]
    is_token = tokens_at < stop
    inside = is_token[:, None] & (columns < K)
    read, write, dq_since, dk_since, left, kept = _meet_values(
        dy, writes, errors, entering, leaving, head, at, rows, keys, stop, heads, K, V, BK, BV, C, LOW
    )
    group = head // (heads // groups) * K
    tile_q = tile(q + group, rows, columns, groups * K, inside)
    tile_k = tile(k + group, rows, columns, groups * K, inside)
    g = at_least(tile(log_decay + head * K, rows, columns, heads * K, inside))
    weight = tl.load(beta + tokens_at * heads + head, mask=is_token, other=0.0).to(tl.float32)
    dq_here, dk_here, dg, dbeta_here, since, rest = _levels_back(tile_q, tile_k, g, read, write, weight, C, LOW)
    since = tl.exp(since)
    dq_since *= since
    dk_since *= since
    left *= tl.exp(rest)
    dbeta_here += tl.sum(tile_k * left, axis=1)
    tl.store(dbeta + (block * tokens + tokens_at) * heads + head, dbeta_here, mask=is_token)
    left *= weight[:, None]
    put(dq + head * K, rows, columns, heads * K, inside, dq_here + dq_since)
    put(dk + head * K, rows, columns, heads * K, inside, dk_here + dk_since + left)
    dg += _spread(tile_q * dq_since + tile_k * dk_since, (i >= 0)[:, None], C, C)
    dg += _spread(tile_k * left, (i < 0)[:, None], C, C)
    dg += (tl.sum(tl.where((i == C - 1)[:, None], since, 0.0), axis=0) * kept)[None, :]
    put(dlog_decay + head * K, rows, columns, heads * K, inside, dg)
