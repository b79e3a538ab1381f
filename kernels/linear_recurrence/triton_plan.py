"""What a call of linear_recurrence is before any kernel runs: sizes, strides, chunks, launch options."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlab.kernels.chunks import how_many
from hybridlab.kernels.triton_launch import Settings, interpreted, settings

NONE, HEAD, TIME, CHANNEL = range(4)  # the kinds of log decay, as kernels know them
CANDIDATES = {"chunk": [{"size": size} for size in (32, 64, 128)]}
SHORTEST = 4  # chunks in a segment; below, what is added twice costs more than programs that wait


@dataclass(frozen=True)
class Plan:
    """q, k, v, g have a contiguous last axis; g is v where there is no decay. chunks: see `chunk_table`; v if none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    kind: int
    offsets: Tensor | None
    chunk: int
    n_chunks: int
    chunks: Tensor

    @property
    def batch(self) -> int:
        return self.v.shape[0]

    @property
    def time(self) -> int:
        return self.v.shape[1]

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def groups(self) -> int:
        return self.q.shape[2]

    @property
    def key(self) -> int:
        return self.q.shape[3]

    @property
    def value(self) -> int:
        return self.v.shape[3]

    @property
    def shared(self) -> int:
        return self.heads // self.groups

    @property
    def packed(self) -> bool:
        return self.offsets is not None

    @property
    def dot(self) -> tl.dtype:
        """What matmuls multiply: bfloat16 for bfloat16; anything else in full float32, and so does the interpreter."""
        narrow = self.q.dtype == self.k.dtype == self.v.dtype == torch.bfloat16
        return tl.bfloat16 if narrow and not interpreted() else tl.float32

    @property
    def g_strides(self) -> tuple[int, int, int]:
        if self.kind in (NONE, HEAD):
            return 0, 0, self.g.stride(0) if self.kind == HEAD else 0
        return self.g.stride(0), self.g.stride(1), self.g.stride(2)

    def empty(self, *shape: int) -> Tensor:
        """What kernels fill: as wide as what they multiply; the interpreter cannot round to bfloat16."""
        return self.v.new_empty(shape, dtype=torch.bfloat16 if self.dot is tl.bfloat16 else torch.float32)

    def ends(self, initial: Tensor | None) -> Tensor:
        """Where states at the end go, [rows, heads, key, value]; an empty document passes its state on."""
        docs = len(self.offsets) - 1 if self.offsets is not None else self.batch
        if self.packed and initial is not None:
            return initial.clone(memory_format=torch.contiguous_format)
        make = self.v.new_zeros if self.packed else self.v.new_empty
        return make(docs, self.heads, self.key, self.value, dtype=torch.float32)

    def segments(self, tiles: int, programs: int) -> tuple[int, int]:
        """How many segments, and chunks in each, for about as many programs as fill the GPU."""
        wanted = programs // (tiles * self.heads * self.batch)
        per_segment = -(-self.n_chunks // max(1, min(wanted, self.n_chunks // SHORTEST, 32)))
        return -(-self.n_chunks // per_segment), per_segment


def launch(chosen: Settings) -> Settings:
    # without a bound of its own, ptxas falls back to 32 registers where it would have to spill at all
    return {"num_warps": chosen["num_warps"], "num_stages": chosen["num_stages"], "maxnreg": 255}


def block(size: int, most: int = 256) -> int:
    """A power of two from 16, the least that matmuls take."""
    return max(16, min(most, triton.next_power_of_2(size)))


def rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def chunk_size(v: Tensor, key: int, offsets: Tensor | None) -> int:
    """Tokens in a chunk: as settings say, or fewer where no document of average length is as long."""
    # without tensor cores a matmul holds whole operands in registers: short chunks for float32 on a GPU
    size = 64 if v.dtype == torch.bfloat16 or interpreted() else 32 if key <= 64 else 16
    chosen = settings("linear_recurrence", "chunk", {"size": size}, key=key, value=v.shape[3])
    docs = 1 if offsets is None else len(offsets) - 1
    return block(-(-v.shape[1] // docs), chosen["size"])


def plan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, offsets: Tensor | None) -> Plan:
    chunk = chunk_size(v, q.shape[3], offsets)
    n_chunks = how_many(v.shape[1], offsets, chunk)
    chunks = v if offsets is None else chunk_table(offsets, n_chunks, chunk)
    kind = NONE if log_decay is None else {1: HEAD, 3: TIME, 4: CHANNEL}[log_decay.dim()]
    g = v if log_decay is None else rows(log_decay) if kind == CHANNEL else log_decay
    return Plan(rows(q), rows(k), rows(v), g, kind, offsets, chunk, n_chunks, chunks)


def chunk_table(offsets: Tensor, n_chunks: int, size: int) -> Tensor:
    """First token, length, document, whether it begins and ends here: int32 [n_chunks, 5], made where offsets are.

    No chunk holds two documents. `n_chunks` is a bound known from the shapes: chunks past the last document are empty.
    """
    offsets = offsets.long()
    used = (offsets.diff() + size - 1) // size
    ends = used.cumsum(0)
    n = torch.arange(n_chunks, device=offsets.device)
    doc = torch.searchsorted(ends, n, right=True)
    real = doc < len(used)
    doc = doc.clamp(max=len(used) - 1)
    nth = n - (ends - used)[doc]
    begin = torch.where(real, offsets[doc] + nth * size, 0)
    length = torch.where(real, (offsets[doc + 1] - begin).clamp(max=size), 0)
    table = torch.stack([begin, length, doc, real & (nth == 0), real & (n == ends[doc] - 1)], 1)
    return table.to(torch.int32)
