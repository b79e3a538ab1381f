"""Gradients of q, k and a decay per head, every chunk for itself, given the states that enter it from either side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.linear_recurrence.triton_plan import Plan, block, launch
from hybridlab.kernels.linear_recurrence.triton_tiles import (
    chunk_of,
    decays_between,
    load_log_decays,
    load_tile,
    sums_of,
)
from hybridlab.kernels.triton_launch import Settings, settings


@triton.jit
def gradients_kernel(
    q, k, v, dy, g, before, after, dq, dk, dg, chunks,
    time, n_chunks, heads, parts, shared, key, value, key_tiles,
    q_batch, q_time, q_group, k_batch, k_time, k_group, v_batch, v_time, v_head, y_batch, y_time, y_head,
    g_batch, g_time, g_head,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Program (chunk x tile of keys, group x part of its heads, batch row): sums over the heads of its part.

    before, after  state that enters the chunk, and gradient of the one that leaves it, [batch, n_chunks, heads, k, v]
    dq, dk         [batch, time, groups x parts, key]
    dg             float32 [tiles of keys, batch, time, heads]
    """
    n, tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    row = tl.program_id(2).to(tl.int64)
    begin, length, doc, first, last = chunk_of(chunks, n, time, CHUNK, PACKED)
    c, ks = tl.arange(0, CHUNK), tile * BLOCK_K + tl.arange(0, BLOCK_K)
    live = c < length
    lower = c[:, None] >= c[None, :]  # [i, j]
    upper = c[:, None] <= c[None, :]  # [j, i]
    here = q + row * q_batch + begin * q_time + group.to(tl.int64) * q_group
    q_tile = load_tile(here, c[:, None], ks[None, :], q_time, live[:, None], key, DOT)  # [c, k]
    here = k + row * k_batch + begin * k_time + group.to(tl.int64) * k_group
    k_tile = load_tile(here, c[:, None], ks[None, :], k_time, live[:, None], key, DOT)  # [c, k]
    if DECAY > 0:
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [i, j]
    sum_q = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    sum_k = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    for nth in range(0, shared // parts):
        head = (group * shared + part * (shared // parts) + nth).to(tl.int64)
        near = tl.zeros((CHUNK, CHUNK), tl.float32)  # dy vᵀ [i, j]
        near_t = tl.zeros((CHUNK, CHUNK), tl.float32)  # v dyᵀ [j, i]
        far_q = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        far_k = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        through = 0.0
        v_head_here = v + row * v_batch + begin * v_time + head * v_head
        y_head_here = dy + row * y_batch + begin * y_time + head * y_head
        state = ((row * n_chunks + n) * heads + head) * key * value
        for v_from in range(0, value, BLOCK_V):
            vs = v_from + tl.arange(0, BLOCK_V)
            v_tile = load_tile(v_head_here, c[:, None], vs[None, :], v_time, live[:, None], value, DOT)  # [c, v]
            y_tile = load_tile(y_head_here, c[:, None], vs[None, :], y_time, live[:, None], value, DOT)  # [c, v]
            inside = (vs < value)[:, None]
            # [v, k]
            before_t = load_tile(
                before + state, ks[None, :], vs[:, None], value, inside & (ks < key)[None, :], value, DOT
            )
            after_t = load_tile(
                after + state, ks[None, :], vs[:, None], value, inside & (ks < key)[None, :], value, DOT
            )
            near = tl.dot(y_tile, tl.trans(v_tile), acc=near, input_precision="ieee")
            near_t = tl.dot(v_tile, tl.trans(y_tile), acc=near_t, input_precision="ieee")
            far_q = tl.dot(y_tile, before_t, acc=far_q, input_precision="ieee")
            far_k = tl.dot(v_tile, after_t, acc=far_k, input_precision="ieee")
            if DECAY > 0:
                through += tl.sum(tl.sum(before_t.to(tl.float32) * after_t.to(tl.float32), 1), 0)
        if DECAY > 0:
            log_g = load_log_decays(g + row * g_batch + begin * g_time + head * g_head, c, g_time, live, DECAY)
            high, low, since, until, whole = sums_of(log_g)
            near = tl.where(lower, near * decays_between(high, low, lower, False), 0.0)
            near_t = tl.where(upper, near_t * decays_between(high, low, upper, True), 0.0)
            far_q *= since[:, None]
            far_k *= until[:, None]
            # a decay at m lies between i and j for i >= m > j; sums of such pairs alone, nothing that cancels
            ending = tl.cumsum(tl.where(c[:, None] > c[None, :], near * scores, 0.0), 0, reverse=True)  # [m, j]
            left = tl.sum(k_tile.to(tl.float32) * far_k, 1)
            pairs = tl.sum(tl.where(c[:, None] > c[None, :], ending + left[None, :], 0.0), 1)
            entered = tl.cumsum(tl.sum(q_tile.to(tl.float32) * far_q, 1), 0, reverse=True)
            at = ((tile * tl.num_programs(2) + row) * time + begin + c) * heads + head
            tl.store(dg + at, pairs + entered + whole * through, mask=live)
        else:
            near = tl.where(lower, near, 0.0)
            near_t = tl.where(upper, near_t, 0.0)
        sum_q += tl.dot(near.to(DOT), k_tile, acc=far_q, input_precision="ieee")
        sum_k += tl.dot(near_t.to(DOT), q_tile, acc=far_k, input_precision="ieee")
    at = ((row * time + begin + c)[:, None] * tl.num_programs(1) + tl.program_id(1)) * key + ks[None, :]
    tl.store(dq + at, sum_q, mask=live[:, None] & (ks < key)[None, :])
    tl.store(dk + at, sum_k, mask=live[:, None] & (ks < key)[None, :])


CANDIDATES = {
    "gradients": [
        {"BLOCK_K": k, "BLOCK_V": v, "num_warps": w, "num_stages": 1}
        for k, v in ((64, 64), (128, 32), (128, 64))
        for w in (4, 8)
    ]
}


def gradients_default(plan: Plan) -> Settings:
    wide = plan.dot is tl.float32
    # one part of a group's heads each, if that is enough programs to fill a GPU twice
    return {"BLOCK_K": 32 if wide else 64, "BLOCK_V": 32, "num_warps": 8, "num_stages": 1, "programs": 264}


def gradients(plan: Plan, dy: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [batch, time, groups, key]; gradient of log decays float32 [batch, time, heads], or of no meaning."""
    chosen = settings("linear_recurrence", "gradients", gradients_default(plan), key=plan.key, value=plan.value)
    block_k, block_v = block(plan.key, chosen["BLOCK_K"]), block(plan.value, chosen["BLOCK_V"])
    key_tiles = -(-plan.key // block_k)
    programs = plan.n_chunks * key_tiles * plan.groups * plan.batch
    fits = [n for n in range(1, plan.shared + 1) if plan.shared % n == 0 and programs * n >= chosen["programs"]]
    parts = min(fits, default=plan.shared)
    shape = plan.batch, plan.time, plan.groups, parts, plan.key
    like = plan.empty() if parts == 1 else plan.v.new_empty((), dtype=torch.float32)
    dq, dk = like.new_empty(shape), like.new_empty(shape)
    dg = plan.v.new_empty(key_tiles, plan.batch, plan.time, plan.heads, dtype=torch.float32)
    gradients_kernel[(plan.n_chunks * key_tiles, plan.groups * parts, plan.batch)](
        *(plan.q, plan.k, plan.v, dy, plan.g, before, after, dq, dk, dg, plan.chunks),
        *(plan.time, plan.n_chunks, plan.heads, parts, plan.shared, plan.key, plan.value, key_tiles),
        *(*plan.q.stride()[:3], *plan.k.stride()[:3], *plan.v.stride()[:3], *dy.stride()[:3], *plan.g_strides),
        *(plan.chunk, block_k, block_v, plan.kind, plan.packed, plan.dot),
        **launch(chosen),
    )
    dq, dk = (x.squeeze(3) if parts == 1 else x.sum(3) for x in (dq, dk))
    return dq, dk, dg.squeeze(0) if key_tiles == 1 else dg.sum(0)
