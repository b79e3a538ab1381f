"""Time cut into chunks, none of which holds tokens of two documents."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def initial(state: Tensor | None, like: Tensor, offsets: Tensor | None, *shape: int) -> Tensor:
    """`state`, or zeros [docs or batch, *shape], in float32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    rows = like.shape[0] if offsets is None else len(offsets) - 1
    return like.new_zeros(rows, *shape, dtype=wide) if state is None else state.to(wide)


def one_token(x: Tensor, offsets: Tensor | None) -> str | None:
    """Why x [batch, time, ...] is not one token per row of state, or None."""
    if offsets is not None:
        return f"{len(offsets) - 1} documents in one row; it serves one token per row"
    return None if x.shape[1] == 1 else f"time={x.shape[1]}; it serves one token per row"


def recur(
    step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, offsets: Tensor | None, *tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """`step(state, *tokens at t) -> (state, y_t)` over time; every y_t has the shape of the first tokens.

    tokens [batch, time, ...]. With offsets, batch is 1 and document i starts from row i of the state; this is what
    packing means.
    """
    if offsets is None:
        ys = [tokens[0][:, :0]]
        for token in zip(*(x.unbind(1) for x in tokens), strict=True):
            state, y = step(state, *token)
            ys.append(y[:, None])
        return torch.cat(ys, 1), state
    docs = zip(state.split(1), *(x.split(offsets.diff().tolist(), 1) for x in tokens), strict=True)
    parts = [recur(step, row, None, *doc) for row, *doc in docs]
    return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])


class Take(torch.autograd.Function):
    """Rows of x by index, zeros for an index past the end. `back` is the index that undoes `there`, for the gradient:
    no row is taken twice, so that gradients are taken too, and never added up."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1)).index_select(0, there)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        there, back = ctx.saved_tensors
        return Take.apply(grad, back, there), None, None


class Chunks:
    """Cuts [batch, time, ...] into [batch, n, size, ...], zeros where a chunk runs past its row or its document.

    With offsets, n is a bound known from the shapes, so nothing waits for the device; chunks beyond the last document
    hold zeros.
    """

    def __init__(self, time: int, offsets: Tensor | None, size: int):
        self.time, self.offsets, self.size = time, offsets, size
        self.n = how_many(time, offsets, size)
        if offsets is None:
            return
        offsets, docs, device = offsets.long(), len(offsets) - 1, offsets.device
        used = (offsets.diff() + size - 1) // size
        ends = used.cumsum(0)
        chunk, token = torch.arange(self.n, device=device), torch.arange(time, device=device)
        self.doc = torch.searchsorted(ends, chunk, right=True).clamp(max=docs - 1)
        begin = ends - used
        self.first = chunk == begin[self.doc]
        source = (offsets[self.doc] + (chunk - begin[self.doc]) * size)[:, None] + torch.arange(size, device=device)
        self.source = torch.where(source < offsets[self.doc + 1, None], source, time).flatten()  # `time` = a zero row
        owner = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
        self.place = begin[owner] * size + token - offsets[owner]
        self.last, self.empty = (ends - 1).clamp(min=0), used == 0

    def split(self, x: Tensor) -> Tensor:
        """x [batch, time, ...] -> [batch, n, size, ...]"""
        if self.offsets is not None:
            x = Take.apply(x[0], self.source, self.place)[None]
        elif pad := self.n * self.size - self.time:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
        return x.unflatten(1, (self.n, self.size))

    def join(self, y: Tensor) -> Tensor:
        """y [batch, n, size, ...] -> [batch, time, ...]"""
        y = y.flatten(1, 2)
        return y[:, : self.time] if self.offsets is None else Take.apply(y[0], self.place, self.source)[None]

    def scan(self, step: Callable[[int, Tensor], tuple], state: Tensor) -> tuple[list, Tensor]:
        """Carry `state` [rows, ...] through `step(n, state) -> (out, state)`: all outs, the state after each row."""
        if self.offsets is None:
            return _carry(step, [None] * self.n, state)[:2]
        rows = state.split(1)
        if not (state.is_cuda or torch.compiler.is_compiling()):  # the host may look where documents begin
            marks = zip(self.first.tolist(), self.doc.tolist(), strict=True)
            outs, _, after = _carry(step, [rows[doc] if first else None for first, doc in marks], state[:1])
            ends = zip(self.empty.tolist(), self.last.tolist(), rows, strict=True)
            return outs, torch.cat([row if empty else after[last] for empty, last, row in ends])
        # select before any arithmetic: the document before may hold NaN
        starts = zip(self.first, state.index_select(0, self.doc).split(1), strict=True)
        selects = [lambda s, first=first, row=row: torch.where(first, row, s) for first, row in starts]
        outs, _, after = _carry(step, selects, state[:1])
        last = torch.cat(after).index_select(0, self.last) if after else state
        return outs, torch.where(self.empty.view(-1, *[1] * (state.dim() - 1)), state, last)


def _carry(step: Callable[[int, Tensor], tuple], starts: list, state: Tensor) -> tuple[list, Tensor, list[Tensor]]:
    """starts: per chunk, what enters in place of the state before it: a tensor, a function of that state, or None."""
    outs, after = [], []
    for n, start in enumerate(starts):
        state = state if start is None else start if isinstance(start, Tensor) else start(state)
        out, state = step(n, state)
        outs.append(out)
        after.append(state)
    return outs, state, after


def pick(time: int, offsets: Tensor | None, most: int) -> int:
    """A chunk size up to `most`: the power of two that holds a document of average length."""
    mean = time if offsets is None else -(-time // (len(offsets) - 1))
    return max(1, min(most, 1 << (mean - 1).bit_length() if mean else 1))


def how_many(time: int, offsets: Tensor | None, size: int) -> int:
    """Chunks of `size` tokens that suffice for a row of `time` tokens, wherever its documents begin."""
    return -(-time // size) if offsets is None else (time + (len(offsets) - 1) * (size - 1)) // size


def of_case(case: dict, most: int) -> tuple[int, int]:
    """Chunks in all rows of an op's case, and tokens per chunk, where `pick` chooses up to `most`."""
    offsets = None if case["docs"] is None else torch.empty(len(case["docs"]) + 1)
    size = pick(case["time"], offsets, most)
    return case["batch"] * how_many(case["time"], offsets, size), size
