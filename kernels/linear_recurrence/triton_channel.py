"""A decay per key channel: the products of q and k within a chunk, and gradients; every chunk and head for itself.

A chunk is cut into blocks of 16 tokens. Tokens of different blocks meet over the last border between them,
e^{Σ to the border} e^{Σ from the border}: two matmul operands, no exponent positive. Those of one block meet in pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.linear_recurrence.triton_plan import Plan, block, launch
from hybridlab.kernels.linear_recurrence.triton_tiles import channel_decays, chunk_of, load_channels, load_tile
from hybridlab.kernels.triton_launch import Settings, settings


@triton.jit
def load_blocks(g, ks, g_time, length, key, CHUNK: tl.constexpr, AFTER: tl.constexpr):
    """Sums of log decays within blocks: Σ_{m ≤ i}, or Σ_{m > i} if AFTER, in the block of i: [c, k]."""
    i = tl.arange(0, 16)[None, :, None]
    token = tl.arange(0, CHUNK // 16)[:, None, None] * 16 + i + (1 if AFTER else 0)
    live = (token < length) & ((i < 15) | (not AFTER))
    x = load_channels(g, token, ks[None, None, :], g_time, live, key)
    return tl.reshape(tl.cumsum(x, 1, reverse=AFTER), (CHUNK, ks.shape[0]))


@triton.jit
def to_border(after, between, log_g, of, S: tl.constexpr):
    """Σ from after each token to the start of block S, for tokens of blocks before it; `between` is that of S - 1."""
    # blocks before S - 1 have all of it between; S - 1 itself has nothing
    whole = tl.sum(tl.where(of == S - 1, log_g, 0.0), 0)  # [k]
    between = tl.where(of < S - 1, between + whole[None, :], 0.0)
    return between, tl.where(of < S, tl.exp(tl.where(of < S, after + between, 0.0)), 0.0)


@triton.jit
def scores_kernel(
    q, k, g, scores, chunks, time, n_chunks, heads, shared, key,
    q_batch, q_time, q_group, k_batch, k_time, k_group, g_batch, g_time, g_head,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (chunk, head, batch row): Σ_k q_ik k_jk e^{Σ_{j < m ≤ i} g_mk} for i ≥ j, else 0: [c, c]."""
    n, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, length, doc, first, last = chunk_of(chunks, n, time, CHUNK, PACKED)
    c = tl.arange(0, CHUNK)
    live, of = (c < length)[:, None], (c // 16)[:, None]
    q += row * q_batch + begin * q_time + head // shared * q_group
    k += row * k_batch + begin * k_time + head // shared * k_group
    g += row * g_batch + begin * g_time + head * g_head
    m = tl.zeros((CHUNK, CHUNK), tl.float32)
    for k_from in range(0, key, BLOCK_K):
        ks = k_from + tl.arange(0, BLOCK_K)
        q_tile = load_tile(q, c[:, None], ks[None, :], q_time, live, key, tl.float32)  # [c, k]
        k_tile = load_tile(k, c[:, None], ks[None, :], k_time, live, key, tl.float32)  # [c, k]
        log_g = load_channels(g, c[:, None], ks[None, :], g_time, live, key)  # [c, k]
        rows = q_tile * tl.exp(load_blocks(g, ks, g_time, length, key, CHUNK, False))
        after = load_blocks(g, ks, g_time, length, key, CHUNK, True)
        between = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for s in tl.static_range(1, CHUNK // 16):
            between, weight = to_border(after, between, log_g, of, s)
            ours = tl.where(of == s, rows, 0.0).to(DOT)
            m = tl.dot(ours, tl.trans((k_tile * weight).to(DOT)), acc=m, input_precision="ieee")
        between = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for step in range(0, 16):
            j = of * 16 + 15 - step  # [c, 1]: one token of everyone's block, the last first
            met = c[:, None] >= j
            k_one = load_tile(k, j, ks[None, :], k_time, j < length, key, tl.float32)
            one = tl.sum(tl.where(met, q_tile * k_one * tl.exp(between), 0.0), 1)
            m += tl.where(met & (c[None, :] == j), one[:, None], 0.0)
            between += tl.where(met, load_channels(g, j, ks[None, :], g_time, j < length, key), 0.0)
    at = ((row * n_chunks + n) * heads + head) * CHUNK * CHUNK + c[:, None] * CHUNK + c[None, :]
    tl.store(scores + at, m)


@triton.jit
def channel_gradients_kernel(
    q, k, v, dy, g, before, after, dq, dk, dg, chunks,
    time, n_chunks, heads, shared, key, value, key_tiles,
    q_batch, q_time, q_group, k_batch, k_time, k_group, v_batch, v_time, v_head, y_batch, y_time, y_head,
    g_batch, g_time, g_head,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (chunk x tile of keys, head, batch row).

    before, after  state that enters the chunk, and gradient of the one that leaves it, [batch, n_chunks, heads, k, v]
    dq, dk, dg     [batch, time, heads, key]
    """
    n, tile = tl.program_id(0) // key_tiles, tl.program_id(0) % key_tiles
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin, length, doc, first, last = chunk_of(chunks, n, time, CHUNK, PACKED)
    c, ks = tl.arange(0, CHUNK), tile * BLOCK_K + tl.arange(0, BLOCK_K)
    live, of = (c < length)[:, None], (c // 16)[:, None]
    inside = (ks < key)[None, :]
    q += row * q_batch + begin * q_time + head // shared * q_group
    k += row * k_batch + begin * k_time + head // shared * k_group
    v += row * v_batch + begin * v_time + head * v_head
    dy += row * y_batch + begin * y_time + head * y_head
    g += row * g_batch + begin * g_time + head * g_head
    state = ((row * n_chunks + n) * heads + head) * key * value

    near = tl.zeros((CHUNK, CHUNK), tl.float32)  # dy vᵀ [i, j]
    near_t = tl.zeros((CHUNK, CHUNK), tl.float32)  # v dyᵀ [j, i]
    far_q = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    far_k = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    far_k_before = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # of the token before
    through = tl.zeros((BLOCK_K,), tl.float32)
    for v_from in range(0, value, BLOCK_V):
        vs = v_from + tl.arange(0, BLOCK_V)
        v_tile = load_tile(v, c[:, None], vs[None, :], v_time, live, value, DOT)  # [c, v]
        y_tile = load_tile(dy, c[:, None], vs[None, :], y_time, live, value, DOT)  # [c, v]
        v_before = load_tile(v, c[:, None] - 1, vs[None, :], v_time, live & (c[:, None] > 0), value, DOT)
        held = inside & (vs < value)[:, None]
        before_t = load_tile(before + state, ks[None, :], vs[:, None], value, held, value, DOT)  # [v, k]
        after_t = load_tile(after + state, ks[None, :], vs[:, None], value, held, value, DOT)  # [v, k]
        near = tl.dot(y_tile, tl.trans(v_tile), acc=near, input_precision="ieee")
        near_t = tl.dot(v_tile, tl.trans(y_tile), acc=near_t, input_precision="ieee")
        far_q = tl.dot(y_tile, before_t, acc=far_q, input_precision="ieee")
        far_k = tl.dot(v_tile, after_t, acc=far_k, input_precision="ieee")
        far_k_before = tl.dot(v_before, after_t, acc=far_k_before, input_precision="ieee")
        through += tl.sum(before_t.to(tl.float32) * after_t.to(tl.float32), 0)

    q_tile = load_tile(q, c[:, None], ks[None, :], q_time, live, key, tl.float32)  # [c, k]
    k_tile = load_tile(k, c[:, None], ks[None, :], k_time, live, key, tl.float32)  # [c, k]
    log_g = load_channels(g, c[:, None], ks[None, :], g_time, live, key)  # [c, k]
    far_q *= channel_decays(g, c[:, None], ks[None, :], g_time, length, key, False, 0)
    far_k *= channel_decays(g, c[:, None], ks[None, :], g_time, length, key, True, 0)
    # a decay at m lies between j and what leaves the chunk for j < m: the sum up to the token before
    k_before = load_tile(k, c[:, None] - 1, ks[None, :], k_time, live & (c[:, None] > 0), key, tl.float32)
    to_end = tl.exp(tl.cumsum(log_g, 0, reverse=True))
    gradient = tl.cumsum(k_before * far_k_before * to_end, 0)
    gradient += tl.cumsum(q_tile * far_q, 0, reverse=True)
    gradient += (tl.exp(tl.sum(log_g, 0)) * through)[None, :]

    since = tl.exp(load_blocks(g, ks, g_time, length, key, CHUNK, False))
    until = load_blocks(g, ks, g_time, length, key, CHUNK, True)
    rows = (q_tile * since).to(DOT)
    near_q = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    near_k = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    between = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    of_column = (c // 16)[None, :]
    for s in tl.static_range(1, CHUNK // 16):
        between, weight = to_border(until, between, log_g, of, s)
        pairs = tl.where((of == s) & (of_column < s), near, 0.0).to(DOT)
        near_q = tl.dot(pairs, (k_tile * weight).to(DOT), acc=near_q, input_precision="ieee")
        pairs = tl.where((of < s) & (of_column == s), near_t, 0.0).to(DOT)
        near_k += weight * tl.dot(pairs, rows, input_precision="ieee")
    near_q *= since
    to_query = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # Σ_{j < m ≤ i}, for i = this token
    to_key = tl.zeros((CHUNK, BLOCK_K), tl.float32)  # the same, for j = this token
    for step in range(0, 16):
        j = of * 16 + 15 - step  # one token of everyone's block, the last first
        g_one = load_channels(g, j, ks[None, :], g_time, j < length, key)
        k_one = load_tile(k, j, ks[None, :], k_time, j < length, key, tl.float32)
        pair = tl.sum(tl.where(c[None, :] == j, near, 0.0), 1)
        near_q += tl.where(c[:, None] > j, pair[:, None] * k_one * tl.exp(to_query), 0.0)
        to_query += tl.where(c[:, None] >= j, g_one, 0.0)
        i = of * 16 + step  # and the first first
        to_key += tl.where(c[:, None] < i, load_channels(g, i, ks[None, :], g_time, i < length, key), 0.0)
        q_one = load_tile(q, i, ks[None, :], q_time, i < length, key, tl.float32)
        pair = tl.sum(tl.where(c[None, :] == i, near_t, 0.0), 1)
        near_k += tl.where(c[:, None] < i, pair[:, None] * q_one * tl.exp(to_key), 0.0)
    # pairs of one token with itself know no decay; all others end at or after m, less those that begin there
    gradient += tl.cumsum(q_tile * near_q - k_tile * near_k, 0, reverse=True)
    own = tl.sum(tl.where(c[:, None] == c[None, :], near, 0.0), 1)[:, None]
    at = ((row * time + begin + c)[:, None] * heads + head) * key + ks[None, :]
    tl.store(dq + at, near_q + far_q + own * k_tile, mask=live & inside)
    tl.store(dk + at, near_k + far_k + own * q_tile, mask=live & inside)
    tl.store(dg + at, gradient, mask=live & inside)


CANDIDATES = {
    "scores": [{"BLOCK_K": k, "num_warps": w, "num_stages": 1} for k in (32, 64) for w in (2, 4, 8)],
    "channel_gradients": [
        {"BLOCK_K": k, "BLOCK_V": v, "num_warps": w, "num_stages": 1} for k, v in ((32, 64), (64, 32)) for w in (4, 8)
    ],
}


def scores_default(plan: Plan) -> Settings:
    return {"BLOCK_K": 32 if plan.dot is tl.float32 else 64, "num_warps": 4, "num_stages": 1}


def gradients_default(plan: Plan) -> Settings:
    return {"BLOCK_K": 32, "BLOCK_V": 32 if plan.dot is tl.float32 else 64, "num_warps": 8, "num_stages": 1}


def channel_scores(plan: Plan) -> Tensor:
    """Decayed products of q and k, [batch, n_chunks, heads, chunk, chunk]."""
    chosen = settings("linear_recurrence", "scores", scores_default(plan), key=plan.key, value=plan.value)
    scores = plan.empty(plan.batch, plan.n_chunks, plan.heads, plan.chunk, plan.chunk)
    scores_kernel[(plan.n_chunks, plan.heads, plan.batch)](
        *(plan.q, plan.k, plan.g, scores, plan.chunks, plan.time, plan.n_chunks, plan.heads, plan.shared, plan.key),
        *(*plan.q.stride()[:3], *plan.k.stride()[:3], *plan.g_strides),
        *(plan.chunk, block(plan.key, chosen["BLOCK_K"]), plan.packed, plan.dot),
        **launch(chosen),
    )
    return scores


def channel_gradients(plan: Plan, dy: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [batch, time, groups, key]; gradient of log decays [batch, time, heads, key]."""
    chosen = gradients_default(plan)
    chosen = settings("linear_recurrence", "channel_gradients", chosen, key=plan.key, value=plan.value)
    block_k, block_v = block(plan.key, chosen["BLOCK_K"]), block(plan.value, chosen["BLOCK_V"])
    key_tiles = -(-plan.key // block_k)
    like = plan.empty() if plan.shared == 1 else plan.v.new_empty((), dtype=torch.float32)
    shape = plan.batch, plan.time, plan.heads, plan.key
    dq, dk, dg = like.new_empty(shape), like.new_empty(shape), plan.empty(*shape)
    channel_gradients_kernel[(plan.n_chunks * key_tiles, plan.heads, plan.batch)](
        *(plan.q, plan.k, plan.v, dy, plan.g, before, after, dq, dk, dg, plan.chunks),
        *(plan.time, plan.n_chunks, plan.heads, plan.shared, plan.key, plan.value, key_tiles),
        *(*plan.q.stride()[:3], *plan.k.stride()[:3], *plan.v.stride()[:3], *dy.stride()[:3], *plan.g_strides),
        *(plan.chunk, block_k, block_v, plan.packed, plan.dot),
        **launch(chosen),
    )
    if plan.shared > 1:
        dq, dk = (x.unflatten(2, (plan.groups, plan.shared)).sum(3) for x in (dq, dk))
    return dq, dk, dg
