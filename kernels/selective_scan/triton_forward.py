"""Forward: a program takes one piece of a document and a block of channels, tile by tile in order of time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.selective_scan import triton_parts
from hybridlab.kernels.selective_scan.triton_parts import entries, gates, lines, piece_of, plus, scan, states, steps
from hybridlab.kernels.triton_launch import settings

DEFAULT = dict(BN=4, BD=32, num_warps=4, num_stages=1, PROGRAMS=528, LEAST=512)
SMALL = dict(BN=16, BD=32, num_warps=1)  # of the pass that only carries states


@triton.jit
def _forward(
    x, delta, A, B, C, D, z, bias, enter, slots, leave, sums, y, pieces, time, length, d, blocks,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """With sums: only the state that a piece, not the last of its document, leaves when it starts from zero."""
    piece, c = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    start, size, doc, tile, first, last = piece_of(pieces, piece, time, length, BT)
    if doc < 0:
        return
    out, go = doc, last
    if sums is not None:
        if last:
            return
        out, go = piece, True
    area, slot = N * d, tile if KEEP else piece.to(tl.int64)
    leave += out.to(tl.int64) * area
    _begin(enter, slots + slot * area, leave, piece.to(tl.int64) * area, go & (size == 0), c, d, N, BN, BD)
    n_tiles, t = (size + BT - 1) // BT, tl.arange(0, BT)
    total = tl.full([BD], 0.0, tl.float32)
    for i in range(0, n_tiles):
        base, at, live = lines(start, i, size, c, d, BT)
        step, slope = steps(delta, bias, base + at, live, c, d, SOFTPLUS)
        value = tl.load(x + base + at, mask=live, other=0.0).to(tl.float32)
        here = slots + slot * area
        slot += 1 if KEEP else 0
        acc = _tile(A, B, C, step, step * value, here, slots + slot * area, leave, start + i * BT, i * BT + t < size,
                    i + 1 < n_tiles, go, c, d, N, BT, BN, BD)  # fmt: skip
        total += tl.reduce(step, 0, plus)
        if y is not None:
            if D is not None:
                acc += tl.load(D + c, mask=c < d, other=0.0).to(tl.float32)[None, :] * value
            if z is not None:
                gate, opened = gates(z, base + at, live)
                acc *= gate * opened
            tl.store(y + base + at, acc, mask=live)
        tl.debug_barrier()  # the state just stored is loaded by the next tile
    if sums is not None:
        tl.store(sums + piece.to(tl.int64) * d + c, total, mask=c < d)


@triton.jit
def _begin(enter, slot, leave, at_piece, empty, c, d, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Put the state that enters a piece where its first tile looks; what enters an empty document leaves it."""
    for n0 in range(0, N, BN):
        at, inside = entries(n0, c, d, N, BN)
        h = tl.zeros([BN, BD], tl.float32)
        if enter is not None:
            h = tl.load(enter + at_piece + at, mask=inside, other=0.0)
        tl.store(slot + at, h, mask=inside)
        tl.store(leave + at, h, mask=inside & empty)
    tl.debug_barrier()


@triton.jit
def _tile(
    A, B, C, step, u, here, after, leave, line, seen, more, go, c, d,
    N: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Σ_n C h of one tile, [t, d]; states go from `here` to `after`, or to `leave` at the end of the piece."""
    acc = tl.full([BT, BN, BD], 0.0, tl.float32)
    for n0 in range(0, N, BN):
        at, inside, place, live, rate, write, read = states(A, B, C, n0, line, seen, c, d, N, BT, BN)
        a, b = tl.exp(step[:, None, :] * rate[None, :, :]), u[:, None, :] * write
        past, h = scan(a, b, tl.load(here + at, mask=inside, other=0.0), BT)
        acc += (past + b) * read
        tl.store(after + at, h, mask=inside & more)
        tl.store(leave + at, h, mask=inside & go & (not more))
    return tl.reduce(acc, 1, plus)


@triton.jit
def _carry(
    A, enter, ends, sums, out, spans, per_row, d, blocks,
    N: tl.constexpr, BACK: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What enters every piece of a document, from what enters the document and what each piece adds to it."""
    doc, c = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    first, count = doc * per_row, per_row
    if spans is not None:
        first, count = tl.load(spans + doc * 2).to(tl.int32), tl.load(spans + doc * 2 + 1).to(tl.int32)
    for n0 in range(0, N, BN):
        at, inside = entries(n0, c, d, N, BN)
        rate = tl.load(A + at, mask=inside, other=0.0)
        h = tl.load(enter + doc.to(tl.int64) * N * d + at, mask=inside, other=0.0)
        for k in range(0, count):
            piece = (first + (count - 1 - k if BACK else k)).to(tl.int64)
            tl.store(out + piece * N * d + at, h, mask=inside)
            more = k + 1 < count
            total = tl.load(sums + piece * d + c, mask=(c < d) & more, other=0.0)
            h = tl.exp(rate * total[None, :]) * h + tl.load(ends + piece * N * d + at, mask=inside & more, other=0.0)


def carry(pieces: triton_parts.Pieces, A: Tensor, enter: Tensor, ends: Tensor, sums: Tensor, back: bool) -> Tensor:
    """enter [docs, n, d], ends [pieces, n, d], sums [pieces, d] -> what enters every piece, [pieces, n, d]."""
    n_states, n_channels = A.shape
    out = torch.empty_like(ends)
    sizes, blocks = triton_parts.launch(SMALL, n_states, n_channels)
    per_row = triton.cdiv(pieces.time, pieces.length)
    _carry[(pieces.rows * blocks,)](
        A, enter, ends, sums, out, pieces.spans, per_row, n_channels, blocks, N=n_states, BACK=back, **sizes
    )
    return out


def rates(A: Tensor) -> Tensor:
    """A [d, n] -> [n, d], float32."""
    return A.float().mT.contiguous()


def forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, enter: Tensor, offsets: Tensor | None,
    z: Tensor | None, bias: Tensor | None, softplus: bool, keep: bool, want_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y if wanted; state [docs, n, d] after each document; states before each tile [tiles, n, d] if kept.

    All contiguous; B, C float32; A as `rates` gives it; enter [docs, n, d] float32
    """
    (batch, time, n_channels), n_states = x.shape, A.shape[0]
    chosen = dict(settings("selective_scan", "forward", DEFAULT, n=n_states))
    programs, least = chosen.pop("PROGRAMS"), chosen.pop("LEAST")
    chosen, blocks = triton_parts.launch(chosen, n_states, n_channels)
    length = triton_parts.piece_length(batch, time, offsets is not None, blocks, programs, least)
    pieces = triton_parts.Pieces(batch, time, offsets, length)
    new = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
    y, leave, per_piece = triton_parts.to_store(x) if want_y else None, torch.empty_like(enter), (pieces.n, *A.shape)
    grid, inputs = (pieces.n * blocks,), (x, delta, A, B, C, D, z, bias)
    where = (pieces.table, time, length, n_channels, blocks)
    common = dict(N=n_states, SOFTPLUS=softplus, BT=triton_parts.TILE, **chosen)
    if length < time:
        ends, sums = new(*per_piece), new(pieces.n, n_channels)
        _forward[grid](*inputs, None, new(*per_piece), ends, sums, None, *where, KEEP=False, **common)
        enter = carry(pieces, A, enter, ends, sums, back=False)
    slots = new(pieces.tiles if keep else pieces.n, *A.shape)
    _forward[grid](*inputs, enter, slots, leave, None, y, *where, KEEP=keep, **common)
    return leave if y is None else y, leave, slots if keep else slots[:0]


def n_tiles(x: Tensor, offsets: Tensor | None) -> int:
    """How many tiles `Pieces` makes of x, at most."""
    batch, time, _ = x.shape
    return (
        batch * triton.cdiv(time, triton_parts.TILE)
        if offsets is None
        else time // triton_parts.TILE + len(offsets) - 1
    )
