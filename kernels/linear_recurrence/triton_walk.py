"""A walk over the chunks of a sequence, the state in registers: outputs, the states that enter chunks, or both.

forward   S <- e^{g} S + w xᵀ    out = Sᵀ r    (r, w, x) = (q, k, v)
reverse   D <- e^{g} D + w xᵀ    out = Dᵀ r    (r, w, x) = (k, q, dy), D the gradient of the state, out that of v
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.linear_recurrence.triton_plan import Plan, block, launch
from hybridlab.kernels.linear_recurrence.triton_tiles import (
    channel_decays,
    chunk_of,
    decays_between,
    load_channels,
    load_log_decays,
    load_tile,
    sums_of,
)
from hybridlab.kernels.triton_launch import Settings, settings


@triton.jit
def walk_kernel(
    reads, writes, values, g, scores, initial, carried, outs, states, ends, kept, chunks,
    time, n_chunks, per_segment, heads, shared, key, value, value_tiles,
    r_batch, r_time, r_group, w_batch, w_time, w_group, x_batch, x_time, x_head, g_batch, g_time, g_head,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    OUTPUT: tl.constexpr, STATES: tl.constexpr, SEGMENTS: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    INITIAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (state tile, head, batch row x segment): the chunks of one segment, one after another.

    OUTPUT   store outs; a state tile then holds all keys
    STATES   store the state that enters each chunk, [batch, n_chunks, heads, key, value]
    LOCAL    enter the segment with zeros, store what it adds and keeps; else enter with `carried`
    """
    RUN: tl.constexpr = SEGMENTS - 1 if LOCAL else SEGMENTS  # what the last segment adds, nobody asks
    head = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(2) // RUN).to(tl.int64)
    segment = tl.program_id(2) % RUN + (1 if LOCAL and REVERSE else 0)
    k_from = (tl.program_id(0) // value_tiles) * BLOCK_K
    v_from = (tl.program_id(0) % value_tiles) * BLOCK_V
    c, ks, vs = tl.arange(0, CHUNK), k_from + tl.arange(0, BLOCK_K), v_from + tl.arange(0, BLOCK_V)
    reads += row * r_batch + head // shared * r_group
    writes += row * w_batch + head // shared * w_group
    values += row * x_batch + head * x_head
    g += row * g_batch + head * g_head
    outs += (row * time * heads + head) * value
    tile = ks[:, None] * value + vs[None, :]  # [k, v]
    inside = (ks < key)[:, None] & (vs < value)[None, :]
    size = key * value
    place = (row * SEGMENTS + segment) * heads + head

    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    summed = tl.zeros((BLOCK_K,), tl.float32)
    cut = segment * 0
    entering = segment == (SEGMENTS - 1 if REVERSE else 0)
    leaving = segment == (0 if REVERSE else SEGMENTS - 1)
    if SEGMENTS > 1 and not LOCAL:
        state = tl.load(carried + place * size + tile, mask=inside, other=0.0)
    if INITIAL and not PACKED:
        if entering:
            state = tl.load(initial + (row * heads + head) * size + tile, mask=inside, other=0.0)
    start = segment * per_segment
    count = tl.minimum(per_segment, n_chunks - start)
    for step in range(0, count):
        n = start + (count - 1 - step if REVERSE else step)
        begin, length, doc, first, last = chunk_of(chunks, n, time, CHUNK, PACKED)
        edge = (doc * heads + head) * size
        if PACKED:
            enters = last if REVERSE else first
            cut = tl.where(enters, 1, cut)
            if INITIAL:
                other = tl.load(initial + edge + tile, mask=inside & enters, other=0.0)
                state = tl.where(enters, other, state)
            else:
                state = tl.where(enters, 0.0, state)
        live = c < length
        chunk = (row * n_chunks + n) * heads + head
        if STATES:
            tl.store(states + chunk * size + tile, state, mask=inside)
        g_here = g + begin * g_time
        wt = load_tile(writes + begin * w_time, c[None, :], ks[:, None], w_time, live[None, :], key, DOT)  # [k, c]
        x = load_tile(values + begin * x_time, c[:, None], vs[None, :], x_time, live[:, None], value, DOT)  # [c, v]
        if OUTPUT:
            r = load_tile(reads + begin * r_time, c[:, None], ks[None, :], r_time, live[:, None], key, DOT)  # [c, k]
            keep = (c[None, :] >= c[:, None]) if REVERSE else (c[:, None] >= c[None, :])
        if DECAY == 3:
            log_g = load_channels(g_here, c[None, :], ks[:, None], g_time, live[None, :], key)  # [k, c]
            total = tl.sum(log_g, 1)
            kept_here = tl.exp(total)
            weight = channel_decays(g_here, c[None, :], ks[:, None], g_time, length, key, not REVERSE, 1)
            wt = (wt.to(tl.float32) * weight).to(DOT)
            weighted = x
            if OUTPUT:
                at = c[None, :] * CHUNK + c[:, None] if REVERSE else c[:, None] * CHUNK + c[None, :]
                near = tl.load(scores + chunk * CHUNK * CHUNK + at).to(tl.float32)
                weight = channel_decays(g_here, c[:, None], ks[None, :], g_time, length, key, REVERSE, 0)
                far = tl.dot((r.to(tl.float32) * weight).to(DOT), state.to(DOT), input_precision="ieee")
        else:
            log_g = load_log_decays(g_here, c, g_time, live, DECAY)  # [c]
            high, low, since, until, whole = sums_of(log_g)
            total = tl.zeros((BLOCK_K,), tl.float32) + tl.sum(log_g, 0)
            kept_here = tl.zeros((BLOCK_K,), tl.float32) + whole
            weighted = (x.to(tl.float32) * (since if REVERSE else until)[:, None]).to(DOT)
            if OUTPUT:
                near = tl.where(keep, tl.dot(r, wt, input_precision="ieee"), 0.0)
                if DECAY > 0:
                    near *= decays_between(high, low, keep, REVERSE)
                far = tl.dot(r, state.to(DOT), input_precision="ieee") * (until if REVERSE else since)[:, None]
        if OUTPUT:
            y = tl.dot(near.to(DOT), x, acc=far, input_precision="ieee")
            place_y = outs + begin * heads * value + c[:, None] * (heads * value) + vs[None, :]
            tl.store(place_y, y, mask=live[:, None] & (vs < value)[None, :])
        state = tl.dot(wt, weighted, acc=state * kept_here[:, None], input_precision="ieee")
        if LOCAL:
            summed += total
        if PACKED and not LOCAL:
            tl.store(ends + edge + tile, state, mask=inside & (first if REVERSE else last))
    if LOCAL:
        tl.store(carried + place * size + tile, state, mask=inside)
        if v_from == 0:
            # what is kept is never negative: -1 says that nothing gets through from before
            tl.store(kept + place * key + ks, tl.where(cut > 0, -1.0, tl.exp(summed)), mask=ks < key)
    if not PACKED and not LOCAL:
        if leaving:
            tl.store(ends + (row * heads + head) * size + tile, state, mask=inside)


@triton.jit
def carry_kernel(carried, kept, heads, key, value, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of the state, head, batch row): turns what segments add into what enters each of them."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < key * value
    state = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(SEGMENTS):
        place = (row * SEGMENTS + (SEGMENTS - 1 - step if REVERSE else step)) * heads + head
        here = carried + place * key * value + at
        adds = tl.load(here, mask=inside, other=0.0)
        tl.store(here, state, mask=inside)
        keeps = tl.load(kept + place * key + at // value, mask=inside, other=0.0)
        state = tl.where(keeps < 0, adds, adds + keeps * state)


CARRY = 1024  # entries of the state per program that carries it from segment to segment
FILLING = 264  # programs: two for each of the 132 multiprocessors of an H200
CANDIDATES = {
    "walk": [{"num_warps": w, "num_stages": s, "BLOCK_V": v} for w in (4, 8) for s, v in ((1, 64), (2, 64), (3, 32))],
    "states": [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (1, 2, 3)],
}


def walk_default(plan: Plan, output: bool) -> Settings:
    if plan.dot is tl.float32:
        return {"BLOCK_K": 64, "BLOCK_V": 32, "num_warps": 8, "num_stages": 1, "programs": FILLING}
    narrow = {"BLOCK_V": 32 if output and plan.key > 128 else 64, "num_warps": 8 if output and plan.key > 64 else 4}
    # keys of 256 and a decay for each: two stages would take more shared memory than there is
    stages = {"num_stages": 1 if output and plan.key > 128 else 2}
    return narrow | stages | {"BLOCK_K": 64, "programs": FILLING}


def walk(
    plan: Plan,
    reads: Tensor | None,
    writes: Tensor,
    values: Tensor,
    *,
    initial: Tensor | None,
    scores: Tensor | None = None,
    reverse: bool = False,
    states: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs like values, if there are `reads`; states that enter the chunks, if asked for; states at the end.

    reads, writes  [batch, time, groups, key]
    values         [batch, time, heads, value]
    initial        float32 [rows, heads, key, value] where the walk starts; zeros if None
    scores         [batch, n_chunks, heads, chunk, chunk], of a decay per channel
    """
    output = reads is not None
    outs = plan.empty(plan.batch, plan.time, plan.heads, plan.value) if output else values
    entering = plan.empty(plan.batch, plan.n_chunks, plan.heads, plan.key, plan.value) if states else values
    ends = plan.ends(initial)
    chosen = settings(
        "linear_recurrence",
        "walk" if output else "states",
        walk_default(plan, output),
        key=plan.key,
        value=plan.value,
    )
    block_k = block(plan.key) if output else block(plan.key, chosen["BLOCK_K"])
    block_v = block(plan.value, chosen["BLOCK_V"])
    value_tiles = -(-plan.value // block_v)
    tiles = -(-plan.key // block_k) * value_tiles
    segments, per_segment = plan.segments(tiles, chosen["programs"])
    carried = kept = ends
    if segments > 1:
        carried = torch.empty(plan.batch, segments, plan.heads, plan.key, plan.value, device=ends.device)
        kept = torch.empty(plan.batch, segments, plan.heads, plan.key, device=ends.device)
    reads = writes if reads is None else reads
    arguments = (
        *(reads, writes, values, plan.g, values if scores is None else scores, ends if initial is None else initial),
        *(carried, outs, entering, ends, kept, plan.chunks, plan.time, plan.n_chunks, per_segment),
        *(plan.heads, plan.shared, plan.key, plan.value, value_tiles),
        *(*reads.stride()[:3], *writes.stride()[:3], *values.stride()[:3], *plan.g_strides),
        *(plan.chunk, block_k, block_v, plan.kind, reverse),
    )
    rest = dict(SEGMENTS=segments, PACKED=plan.packed, INITIAL=initial is not None, DOT=plan.dot) | launch(chosen)
    if segments > 1:
        grid = tiles, plan.heads, plan.batch * (segments - 1)
        walk_kernel[grid](*arguments, OUTPUT=False, STATES=False, LOCAL=True, **rest)
        grid = triton.cdiv(plan.key * plan.value, CARRY), plan.heads, plan.batch
        carry_kernel[grid](carried, kept, plan.heads, plan.key, plan.value, segments, reverse, CARRY, num_warps=4)
    grid = tiles, plan.heads, plan.batch * segments
    walk_kernel[grid](*arguments, OUTPUT=output, STATES=states, LOCAL=False, **rest)
    return outs, entering, ends
