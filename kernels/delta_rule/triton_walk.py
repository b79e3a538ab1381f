"""The state from chunk to chunk, forwards and back: one program per document, head and block of values.

The state of a block of values stays in registers from the first chunk to the last. In a chunk that S enters, with the
decays e^G folded into `q_since`, `k_since`, `k_until` (per channel) or applied to rows of the results (per head):

    errors = solve (v - k_since S)      u = β errors      y = q_since S + read u      S ← whole S + k_untilᵀ u
"""

import triton
import triton.language as tl

from hybridlab.kernels.delta_rule.triton_tiles import chunks_of, product, put, span, square, tile


@triton.jit
def _decays(since, until, whole, at, rows, keys, C: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr):
    """Of chunk and head `at`: decays of rows since the start and up to the end [c, 1], and of the state [k, 1]."""
    start = tl.full([1, 1], 1.0, tl.float32)
    end = start
    state = start
    if GATE == 1:
        start = tl.load(since + at * C + rows)[:, None]
        end = tl.load(until + at * C + rows)[:, None]
        state = tl.load(since + at * C + C - 1 + tl.zeros([1, 1], tl.int32))
    if GATE == 2:
        state = tl.load(whole + at * K + keys, mask=keys < K, other=0.0)[:, None]
    return start, end, state


@triton.jit
def walk(
    q_since, k_since, k_until, v, beta, solve, read, since, until, whole, state, y, final, entering, errors,
    spans, begins, time, per_row, heads, groups,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, STATE: tl.constexpr, RECORD: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Outputs and the final state; or with RECORD what the backward needs: entering states and errors.

    y         [tokens, heads, value]
    final     float32 [documents, heads, key, value]
    entering  float32 [chunks, heads, key, value]
    errors    float32 [tokens, heads, value]  (v - what the state has stored under k)
    GATE      0 none, 1 per head, 2 per channel
    """
    program = tl.program_id(0).to(tl.int64)
    values = (program % tl.cdiv(V, BV) * BV + tl.arange(0, BV))[None, :]
    program = program // tl.cdiv(V, BV)
    row, head = program // heads, program % heads
    keys, i = tl.arange(0, BK), tl.arange(0, C)
    state_inside = (keys < K)[:, None] & (values < V)
    pointers = keys[:, None] * V + values
    shared, own = head // (heads // groups) * K, head * V
    s = tl.zeros([BK, BV], tl.float32)
    if STATE:
        s = tl.load(state + program * (K * V) + pointers, mask=state_inside, other=0.0).to(tl.float32)
    first, last = chunks_of(row, begins, per_row, PACKED)
    for chunk in range(first, last):
        start, stop = span(chunk, spans, time, per_row, C, PACKED)
        rows = (start + i)[:, None]
        is_token = rows < stop
        key_inside, value_inside = is_token & (keys < K)[None, :], is_token & (values < V)
        at = chunk * heads + head
        start_decay, end_decay, state_decay = _decays(since, until, whole, at, i, keys, C, K, GATE)
        if RECORD:
            tl.store(entering + at * (K * V) + pointers, s, mask=state_inside)
        k = tile(k_since + shared, rows, keys[None, :], groups * K, key_inside)
        e = tile(v + own, rows, values, heads * V, value_inside) - start_decay * product(k, s, LOW)
        e = product(square(solve, at, C), e, LOW)
        u = e * tl.load(beta + rows * heads + head, mask=is_token, other=0.0).to(tl.float32)
        if RECORD:
            put(errors + own, rows, values, heads * V, value_inside, e)
        else:
            out = start_decay * product(tile(q_since + shared, rows, keys[None, :], groups * K, key_inside), s, LOW)
            out += product(square(read, at, C), u, LOW)
            put(y + own, rows, values, heads * V, value_inside, out)
        if GATE == 2:
            k = tile(k_until + shared, rows, keys[None, :], groups * K, key_inside)
        s = state_decay * s + product(tl.trans(k), end_decay * u, LOW)
    if not RECORD:
        tl.store(final + program * (K * V) + pointers, s, mask=state_inside)


@triton.jit
def walk_back(
    q_since, k_since, k_until, beta, solve, read, since, until, whole, dy, dfinal, dv, writes, dstate, leaving,
    spans, begins, time, per_row, heads, groups,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, ROUND: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The gradient of the state from the last chunk to the first; gradients of v and of the initial state.

    leaving  float32 [chunks, heads, key, value]  gradient of the state after each chunk
    writes   float32 [tokens, heads, value]  gradient of what `solve` is applied to; with ROUND, dv is a copy of it
    """
    program = tl.program_id(0).to(tl.int64)
    values = (program % tl.cdiv(V, BV) * BV + tl.arange(0, BV))[None, :]
    program = program // tl.cdiv(V, BV)
    row, head = program // heads, program % heads
    keys, i = tl.arange(0, BK), tl.arange(0, C)
    state_inside = (keys < K)[:, None] & (values < V)
    pointers = keys[:, None] * V + values
    shared, own = head // (heads // groups) * K, head * V
    ds = tl.load(dfinal + program * (K * V) + pointers, mask=state_inside, other=0.0).to(tl.float32)
    first, last = chunks_of(row, begins, per_row, PACKED)
    for back in range(0, last - first):
        chunk = last - 1 - back
        start, stop = span(chunk, spans, time, per_row, C, PACKED)
        rows = (start + i)[:, None]
        is_token = rows < stop
        key_inside, value_inside = is_token & (keys < K)[None, :], is_token & (values < V)
        at = chunk * heads + head
        start_decay, end_decay, state_decay = _decays(since, until, whole, at, i, keys, C, K, GATE)
        tl.store(leaving + at * (K * V) + pointers, ds, mask=state_inside)
        out = tile(dy + own, rows, values, heads * V, value_inside)
        k = tile(k_until + shared, rows, keys[None, :], groups * K, key_inside)
        du = end_decay * product(k, ds, LOW)
        du += product(tl.trans(square(read, at, C)), out, LOW)
        de = du * tl.load(beta + rows * heads + head, mask=is_token, other=0.0).to(tl.float32)
        de = product(tl.trans(square(solve, at, C)), de, LOW)
        put(writes + own, rows, values, heads * V, value_inside, de)
        if ROUND:
            put(dv + own, rows, values, heads * V, value_inside, de)
        if GATE == 2:
            k = tile(k_since + shared, rows, keys[None, :], groups * K, key_inside)
        q = tile(q_since + shared, rows, keys[None, :], groups * K, key_inside)
        ds = state_decay * ds - product(tl.trans(k), start_decay * de, LOW)
        ds += product(tl.trans(q), start_decay * out, LOW)
    tl.store(dstate + program * (K * V) + pointers, ds, mask=state_inside)
