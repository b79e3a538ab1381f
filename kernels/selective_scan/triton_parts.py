"""What the kernels of the selective scan share: pieces of documents, scans over the steps of a tile, activations.

A tile is [time, state, channel], time in registers: choosing one step costs nothing once compiled, as long as the other
two axes fill all lanes of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.triton_launch import interpreted

TILE = 16  # steps per tile
# the interpreter is fast for these two; a call of tl.sum or tl.max, itself a kernel function, costs it milliseconds
_larger, plus = tl.standard._elementwise_max, tl.standard._sum_combine


@triton.jit
def scan(a, b, h, BT: tl.constexpr):
    """h_t = a_t h_{t-1} + b_t from h [n, d] -> a_t h_{t-1} [t, n, d], the last h.

    To take a step out of a tile, bits are chosen, not values: a NaN of another step stays there.
    """
    t, least = tl.arange(0, BT)[:, None, None], -2147483648
    kept, a, b = a, a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    for j in tl.static_range(BT):
        here = t == j
        decay = tl.reduce(tl.where(here, a, least), 0, _larger).to(tl.float32, bitcast=True)
        past = decay * h
        h = past + tl.reduce(tl.where(here, b, least), 0, _larger).to(tl.float32, bitcast=True)
        kept = tl.where(here, past[None, :, :], kept)
    return kept, h


@triton.jit
def scan_back(a, v, r, BT: tl.constexpr):
    """g_t = v_t + a_{t+1} g_{t+1}, where a g after the last step is r [n, d] -> g [t, n, d], a g at the first step."""
    t, least = tl.arange(0, BT)[:, None, None], -2147483648
    grads, a, v = v, a.to(tl.int32, bitcast=True), v.to(tl.int32, bitcast=True)
    for k in tl.static_range(BT):
        here = t == BT - 1 - k
        g = tl.reduce(tl.where(here, v, least), 0, _larger).to(tl.float32, bitcast=True) + r
        r = tl.reduce(tl.where(here, a, least), 0, _larger).to(tl.float32, bitcast=True) * g
        grads = tl.where(here, g[None, :, :], grads)
    return grads, r


@triton.jit
def over_channels(m, w, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Sums [t, n] of two [t, n, d].

    Neighbours are added first: compiled, that is one transposition through shared memory, where a plain sum takes five
    shuffles for every number.
    """
    for k in tl.static_range(5):
        left, right = tl.split(tl.reshape(m, [BT, BN, BD // (2 * 2**k), 2]))
        m = left + right
        left, right = tl.split(tl.reshape(w, [BT, BN, BD // (2 * 2**k), 2]))
        w = left + right
    return tl.reduce(m, 2, plus), tl.reduce(w, 2, plus)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with all its digits at either end, and its slope.

    With e = exp(-|x|) ≤ 1 it is max(x, 0) + log1p(e), and log1p(e) = 2 atanh(e / (2 + e)), as a series.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = tl.full(x.shape, 1.0 / 17.0, tl.float32)
    for k in tl.static_range(8):
        series = series * q + 1.0 / (15.0 - 2.0 * k)
    return tl.maximum(x, 0.0) + 2.0 * s * series, tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def lines(start, i, size, c, d, BT: tl.constexpr):
    """Tile i of a piece: what to add to a pointer to [token, channel]: a number and offsets [t, d]; and which exist."""
    t = tl.arange(0, BT)
    live = (i * BT + t < size)[:, None] & (c < d)[None, :]
    return (start + i * BT) * d, t[:, None] * d + c[None, :], live


@triton.jit
def steps(delta, bias, at, live, c, d, SOFTPLUS: tl.constexpr):
    """Δ and its slope in delta, [t, d]; Δ is 0 where no token is, so that the state passes."""
    step = tl.load(delta + at, mask=live, other=0.0).to(tl.float32)
    slope = tl.full(step.shape, 1.0, tl.float32)
    if bias is not None:
        step += tl.load(bias + c, mask=c < d, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        step, slope = softplus(step)
    return tl.where(live, step, 0.0), slope


@triton.jit
def gates(z, at, live):
    """z and its sigmoid, [t, d]."""
    gate = tl.load(z + at, mask=live, other=0.0).to(tl.float32)
    return gate, sigmoid(gate)


@triton.jit
def states(A, B, C, n0, line, seen, c, d, N: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """States n0 and on: offsets [n, d] and [t, n], each with which exist; A [n, d]; B and C [t, n, 1].

    line: the first token of the tile; seen [t]: which tokens exist
    """
    n = n0 + tl.arange(0, BN)
    at, inside = n[:, None] * d + c[None, :], (n < N)[:, None] & (c < d)[None, :]
    place, live = line * N + tl.arange(0, BT)[:, None] * N + n[None, :], seen[:, None] & (n < N)[None, :]
    if N % BN == 0:  # masks that do not change with n0 are worth registers
        inside, live = tl.broadcast_to((c < d)[None, :], at.shape), tl.broadcast_to(seen[:, None], place.shape)
    rate = tl.load(A + at, mask=inside, other=0.0)
    write, read = tl.load(B + place, mask=live, other=0.0), tl.load(C + place, mask=live, other=0.0)
    return at, inside, place, live, rate, write[:, :, None], read[:, :, None]


@triton.jit
def entries(n0, c, d, N: tl.constexpr, BN: tl.constexpr):
    """Of a block of [state, channel]: offsets [n, d], and which exist."""
    n = n0 + tl.arange(0, BN)
    return n[:, None] * d + c[None, :], (n < N)[:, None] & (c < d)[None, :]


@triton.jit
def piece_of(pieces, piece, time, length, BT: tl.constexpr):
    """First token, tokens, row of state (-1: no piece), first tile, and whether it begins and ends a document."""
    if pieces is None:
        per_row = tl.cdiv(time, length)
        doc, i = piece // per_row, piece % per_row
        start, tile = doc.to(tl.int64) * time + i * length, doc.to(tl.int64) * tl.cdiv(time, BT) + i * (length // BT)
        return start, tl.minimum(length, time - i * length), doc, tile, i == 0, i == per_row - 1
    else:  # noqa: RET505 — what follows is compiled only then
        at = pieces + piece * 6
        doc, size = tl.load(at + 2).to(tl.int32), tl.load(at + 1).to(tl.int32)
        return tl.load(at), size, doc, tl.load(at + 3), tl.load(at + 4) != 0, tl.load(at + 5) != 0


class Pieces:
    """Rows, or the documents of a row, cut into pieces of `length` tokens (a multiple of TILE).

    A program takes one piece and a block of channels. Every document has at least one piece and one tile, be they
    empty; how many there are at most is known from the shapes, so that nothing waits for the device.

    table  int64 [n, 6] as in `piece_of`, spans int64 [docs, 2] the first piece and the number of pieces; None unless
    documents are packed
    """

    def __init__(self, batch: int, time: int, offsets: Tensor | None, length: int):
        self.time, self.length = time, length
        self.table = self.spans = None
        if offsets is None:
            self.rows, self.n, self.tiles = batch, batch * triton.cdiv(time, length), batch * triton.cdiv(time, TILE)
            return
        self.rows = len(offsets) - 1
        self.n, self.tiles = time // length + self.rows, time // TILE + self.rows
        offsets, docs = offsets.long(), torch.arange(self.n, device=offsets.device)
        lengths = offsets.diff()
        used, tiles = (((lengths + size - 1) // size).clamp(min=1) for size in (length, TILE))
        ends = used.cumsum(0)
        doc = torch.searchsorted(ends, docs, right=True)
        exists, doc = doc < self.rows, doc.clamp(max=self.rows - 1)
        i = docs - (ends - used)[doc]
        start = offsets[doc] + i * length
        size = (offsets[doc + 1] - start).clamp(0, length)
        tile = (tiles.cumsum(0) - tiles)[doc] + i * (length // TILE)
        owner = torch.where(exists, doc, -1)
        self.table = torch.stack([start, size, owner, tile, i == 0, i == used[doc] - 1], 1)
        self.spans = torch.stack([ends - used, used], 1)


def piece_length(batch: int, time: int, packed: bool, blocks: int, programs: int, least: int) -> int:
    """Tokens per piece: all, unless that leaves the device without work. To split costs a second pass of exponentials
    over most pieces, so it begins where three pieces per row are too few."""
    rows = 1 if packed else batch
    parts = programs // max(rows * blocks, 1)
    length = time if parts < 3 else min(time, max(least, triton.cdiv(time, parts)))
    return max(1, triton.cdiv(length, TILE)) * TILE


def to_store(x: Tensor) -> Tensor:
    """Memory for what is like x. The interpreter cuts digits off where it stores bfloat16: there torch rounds later."""
    return torch.empty_like(x, dtype=torch.float32 if interpreted() else x.dtype)


def launch(chosen: dict, n_states: int, n_channels: int) -> tuple[dict, int]:
    """Block sizes no larger than needed, with warps that the block of state and channels fills; blocks of channels."""
    most = 16 if interpreted() else chosen["BN"]  # there time goes by operation, not by size
    block = min(chosen["BD"], max(32, triton.next_power_of_2(n_channels)))
    states = min(max(most, chosen["BN"]), triton.next_power_of_2(n_states))
    warps = max(1, min(chosen["num_warps"], block * states // 32))
    return chosen | dict(BD=block, BN=states, num_warps=warps), triton.cdiv(n_channels, block)
