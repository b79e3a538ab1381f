"""The delta rule on a GPU: what is launched, on which memory, and how autograd and torch.compile see it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from einops import reduce
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridlab.kernels.chunks import how_many
from hybridlab.kernels.delta_rule.triton_gradients import gradients, gradients_channel
from hybridlab.kernels.delta_rule.triton_prepare import prepare, prepare_channel
from hybridlab.kernels.delta_rule.triton_walk import walk, walk_back
from hybridlab.kernels.triton_launch import Settings, interpreted, settings

MOST = 256  # keys of a state that one program keeps in registers
# not measured on a GPU; in float32, longer chunks lose more digits than twice what the recurrence loses
DEFAULT: dict[str, Settings] = {
    "chunk": dict(size=64),
    "chunk_float32": dict(size=16),
    "prepare": dict(num_warps=4, num_stages=2, BK=64),
    "prepare_channel": dict(num_warps=4, num_stages=1, BK=32),
    "walk": dict(num_warps=4, num_stages=2, BV=32),
    "walk_back": dict(num_warps=4, num_stages=2, BV=32),
    "gradients": dict(num_warps=8, num_stages=1, BK=64, BV=32),
    "gradients_channel": dict(num_warps=8, num_stages=1, BK=32, BV=32),
}
# from these sizes of key on; chosen by the registers and spills that the compiler reports for sm_90
WIDE: dict[str, dict[int, Settings]] = {
    "chunk": {129: dict(size=32)},
    "walk": {129: dict(num_warps=8, BV=16)},
    "walk_back": {65: dict(num_warps=8), 129: dict(num_warps=8, BV=16)},
}
_WALKS = [
    dict(num_warps=w, num_stages=s, BV=b) for w, s, b in ((4, 1, 32), (4, 2, 64), (8, 2, 64), (4, 3, 32), (2, 2, 16))
]
_GRADIENTS = [
    dict(num_warps=w, num_stages=s, BK=k, BV=32) for w, s, k in ((4, 1, 64), (8, 2, 64), (8, 1, 128), (4, 1, 32))
]
CANDIDATES: dict[str, list[Settings]] = {
    "chunk": [dict(size=32), dict(size=64)],
    "prepare": [dict(num_warps=w, num_stages=2, BK=b) for w in (2, 4, 8) for b in (32, 64)],
    "prepare_channel": [dict(num_warps=w, num_stages=1, BK=b) for w in (4, 8) for b in (16, 32, 64)],
    "walk": _WALKS,
    "walk_back": _WALKS,
    "gradients": _GRADIENTS,
    "gradients_channel": _GRADIENTS,
}


def refuses(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None) -> str | None:
    dtypes = {x.dtype for x in (q, k, v, beta, log_decay, state) if x is not None}
    if wrong := dtypes - {torch.float32, torch.bfloat16}:
        return f"{', '.join(map(str, wrong))} among the arguments; it computes in float32 and bfloat16"
    if not (1 <= q.shape[3] <= MOST and 1 <= v.shape[3] <= MOST):
        return f"key={q.shape[3]}, value={v.shape[3]}; it serves 1 to {MOST}"
    return None


def delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None
) -> tuple[Tensor, Tensor]:
    """Same result as the definition, by the WY form of chunks; differentiable once."""
    return _forward(q, k, v, beta, log_decay, state, offsets)


@dataclass(frozen=True)
class Plan:
    """Sizes of one call and where its chunks lie.

    spans   int64 [chunks, 2]    first token of a chunk and the end of its document, or None without packing
    begins  int64 [docs + 1]     first chunk of every document
    """

    time: int
    tokens: int
    rows: int
    per_row: int
    chunks: int
    heads: int
    groups: int
    gate: int
    constants: dict[str, Any]
    spans: Tensor
    begins: Tensor
    sizes: dict[str, int]

    def settings(self, kernel: str) -> Settings:
        """Launch settings, block sizes cut to the sizes at hand."""
        chosen = settings("delta_rule", kernel, _default(kernel, self.sizes["key"]), **self.sizes)
        for block, size in (("BK", "key"), ("BV", "value")):
            if block in chosen:
                chosen[block] = min(chosen[block], _padded(self.sizes[size]))
        return chosen


def _default(kernel: str, key: int) -> Settings:
    chosen = DEFAULT[kernel]
    for least, wide in WIDE.get(kernel, {}).items():
        chosen = chosen | wide if key >= least else chosen
    return chosen


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _chunk_size(q: Tensor, v: Tensor, offsets: Tensor | None) -> int:
    """As the table says, but not more than twice a document of average length."""
    kernel = "chunk" if v.dtype == torch.bfloat16 else "chunk_float32"
    most = settings("delta_rule", kernel, _default(kernel, q.shape[3]), key=q.shape[3], value=v.shape[3])["size"]
    mean = v.shape[1] if offsets is None else -(-v.shape[1] // (len(offsets) - 1))
    return min(most, _padded(mean))


def _plan(q: Tensor, v: Tensor, log_decay: Tensor | None, offsets: Tensor | None) -> Plan:
    (batch, time, heads, value), (groups, key) = v.shape, q.shape[2:]
    size = _chunk_size(q, v, offsets)
    low = v.dtype == torch.bfloat16 and not interpreted()
    gate = 0 if log_decay is None else log_decay.dim() - 2
    constants = dict(K=key, C=size, PACKED=offsets is not None, LOW=low)
    per_row, chunks = -(-time // size), batch * how_many(time, offsets, size)
    rows, spans, begins = batch, q, q
    if offsets is not None:
        rows = len(offsets) - 1
        spans, begins = _spans(offsets.long(), chunks, size)
    sizes = dict(key=key, value=value)
    return Plan(
        time, batch * time, rows, per_row, chunks, heads, groups, gate, constants, spans, begins, sizes
    )  # fmt: skip


def _spans(offsets: Tensor, chunks: int, size: int) -> tuple[Tensor, Tensor]:
    """`Plan.spans` and `Plan.begins`, on the device; chunks beyond the last document are empty."""
    begins = F.pad(((offsets.diff() + size - 1) // size).cumsum(0), (1, 0))
    chunk = torch.arange(chunks, device=offsets.device)
    doc = torch.searchsorted(begins[1:].contiguous(), chunk, right=True).clamp(max=len(offsets) - 2)
    stop = offsets[doc + 1]
    start = torch.minimum(offsets[doc] + (chunk - begins[doc]) * size, stop)
    return torch.stack([start, stop], 1), begins


@dataclass(frozen=True)
class Prepared:
    """What `prepare` or `prepare_channel` has written; see there. q stands where there is nothing."""

    q_since: Tensor
    k_since: Tensor
    k_until: Tensor
    solve: Tensor
    read: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor
    groups: int


def _prepare(plan: Plan, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None) -> Prepared:
    size, key = plan.constants["C"], plan.sizes["key"]
    of_chunk = (plan.chunks, plan.heads)
    solve, read = (q.new_empty(*of_chunk, size, size, dtype=torch.float32) for _ in range(2))
    where = (plan.spans, plan.time, plan.per_row, plan.heads, plan.groups)
    grid = (plan.chunks * plan.heads,)
    if plan.gate == 2:
        scaled = [q.new_empty(plan.tokens, plan.heads, key, dtype=torch.float32) for _ in range(3)]
        whole = q.new_empty(*of_chunk, key, dtype=torch.float32)
        prepare_channel[grid](
            q, k, beta, log_decay, solve, read, *scaled, whole, *where,
            **plan.constants, **plan.settings("prepare_channel"),
        )  # fmt: skip
        q_since, k_since, k_until = scaled
        return Prepared(q_since, k_since, k_until, solve, read, q, q, whole, plan.heads)
    since, until = q, q
    if plan.gate:
        since, until = (q.new_empty(*of_chunk, size, dtype=torch.float32) for _ in range(2))
    prepare[grid](
        q, k, beta, q if log_decay is None else log_decay, solve, read, since, until, *where,
        GATED=plan.gate == 1, **plan.constants, **plan.settings("prepare"),
    )  # fmt: skip
    return Prepared(q, k, k, solve, read, since, until, q, plan.groups)


def _walk(
    plan: Plan, at: Prepared, v: Tensor, beta: Tensor, state: Tensor | None, record: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state; with `record`, the states that enter chunks, and the errors."""
    key, value = plan.sizes["key"], plan.sizes["value"]
    rows = v.new_empty(v.shape, dtype=torch.float32 if record else v.dtype)
    if record:
        states = v.new_empty(plan.chunks, plan.heads, key, value, dtype=torch.float32)
    else:
        states = v.new_empty(plan.rows, plan.heads, key, value, dtype=torch.float32)
    chosen = plan.settings("walk")
    grid = (plan.rows * plan.heads * triton.cdiv(value, chosen["BV"]),)
    walk[grid](
        at.q_since, at.k_since, at.k_until, v, beta, at.solve, at.read, at.since, at.until, at.whole,
        v if state is None else state, rows, states, states, rows,
        plan.spans, plan.begins, plan.time, plan.per_row, plan.heads, at.groups,
        V=value, BK=_padded(key), GATE=plan.gate, STATE=state is not None, RECORD=record, **plan.constants, **chosen,
    )  # fmt: skip
    return rows, states


def _walk_back(plan: Plan, at: Prepared, beta: Tensor, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
    """Gradients of v, once more in float32, of the initial state, and of the states that leave chunks."""
    key, value = plan.sizes["key"], plan.sizes["value"]
    writes, dstate = dy.new_empty(dy.shape, dtype=torch.float32), dfinal.new_empty(dfinal.shape)
    dv = writes if dy.dtype == torch.float32 else dy.new_empty(dy.shape)
    leaving = dy.new_empty(plan.chunks, plan.heads, key, value, dtype=torch.float32)
    chosen = plan.settings("walk_back")
    grid = (plan.rows * plan.heads * triton.cdiv(value, chosen["BV"]),)
    walk_back[grid](
        at.q_since, at.k_since, at.k_until, beta, at.solve, at.read, at.since, at.until, at.whole,
        dy, dfinal, dv, writes, dstate, leaving,
        plan.spans, plan.begins, plan.time, plan.per_row, plan.heads, at.groups,
        V=value, BK=_padded(key), GATE=plan.gate, ROUND=dv is not writes, **plan.constants, **chosen,
    )  # fmt: skip
    return dv, writes, dstate, leaving


def _gradients(
    plan: Plan, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, dy: Tensor, *recorded: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, beta and log_decay from `writes`, `errors`, `entering` and `leaving`."""
    heads, key = plan.heads, plan.sizes["key"]
    channel = plan.gate == 2
    chosen = plan.settings("gradients_channel" if channel else "gradients")
    blocks = triton.cdiv(key, chosen["BK"])
    shared = heads > plan.groups
    dq, dk = (x.new_empty(*x.shape[:2], heads, key, dtype=torch.float32 if shared else x.dtype) for x in (q, k))
    dbeta = beta.new_empty(blocks, *beta.shape, dtype=torch.float32)
    none = dbeta.new_empty(0)
    dg = none if log_decay is None else torch.empty_like(log_decay) if channel else torch.empty_like(dbeta)
    (gradients_channel if channel else gradients)[(plan.chunks * heads * blocks,)](
        q, k, beta, q if log_decay is None else log_decay, dy, *recorded, dq, dk, dbeta, dg,
        plan.spans, plan.time, plan.per_row, plan.tokens, heads, plan.groups,
        V=plan.sizes["value"], GATED=plan.gate > 0, **plan.constants, **chosen,
    )  # fmt: skip
    if shared:
        dq, dk = (reduce(d, "b t (g r) k -> b t g k", "sum", g=plan.groups).to(x.dtype) for d, x in ((dq, q), (dk, k)))
    if log_decay is not None and not channel:
        dg = dg.sum(0).to(log_decay.dtype)
    return dq, dk, dbeta.sum(0).to(beta.dtype), dg


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [x if x is None else x.contiguous() for x in tensors]


def _documents(v: Tensor, offsets: Tensor | None) -> int:
    return v.shape[0] if offsets is None else len(offsets) - 1


@torch.library.custom_op("hybridlab::delta_rule_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v, beta, log_decay, state = _contiguous(q, k, v, beta, log_decay, state)
    if v.numel() == 0:
        final = v.new_zeros(_documents(v, offsets), v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
        return torch.empty_like(v), final if state is None else final + state
    plan = _plan(q, v, log_decay, offsets)
    at = _prepare(plan, q, k, beta, log_decay)
    return _walk(plan, at, v, beta, state, record=False)


@_forward.register_fake
def _(q, k, v, beta, log_decay, state, offsets):
    final = v.new_empty(_documents(v, offsets), v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), final


@torch.library.custom_op("hybridlab::delta_rule_triton_backward", mutates_args=())
def _backward(
    dy: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor,
    log_decay: Tensor | None, state: Tensor | None, offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, log_decay and state; empty where there is no such argument."""
    dy, dfinal, q, k, v, beta, log_decay, state = _contiguous(dy, dfinal, q, k, v, beta, log_decay, state)
    none = v.new_empty(0)
    if v.numel() == 0:
        dg = none if log_decay is None else torch.zeros_like(log_decay)
        dstate = none if state is None else dfinal.to(state.dtype, copy=True)
        return *(torch.zeros_like(x) for x in (q, k, v, beta)), dg, dstate  # type: ignore[return-value]
    plan = _plan(q, v, log_decay, offsets)
    at = _prepare(plan, q, k, beta, log_decay)
    errors, entering = _walk(plan, at, v, beta, state, record=True)
    dv, writes, dstate, leaving = _walk_back(plan, at, beta, dy, dfinal)
    dq, dk, dbeta, dg = _gradients(plan, q, k, beta, log_decay, dy, writes, errors, entering, leaving)
    return dq, dk, dv, dbeta, dg, none if state is None else dstate.to(state.dtype)


@_backward.register_fake
def _(dy, dfinal, q, k, v, beta, log_decay, state, offsets):
    return tuple(v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, log_decay, state))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor, dfinal: Tensor) -> tuple:
    *_, log_decay, state, _offsets = ctx.saved_tensors
    *grads, dg, dstate = _backward(dy, dfinal, *ctx.saved_tensors)
    return *grads, None if log_decay is None else dg, None if state is None else dstate, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _executed(tokens: int, chunks: int, heads: int, key: int, value: int, channel: bool) -> tuple[int, int]:
    """FLOPs of the matmuls of forward and backward, for chunks with room for `tokens`."""
    size = tokens // max(chunks, 1)
    levels = size.bit_length() - 1 if channel else 1
    merges = 6 * 16**2 * size + sum(2 * s * s * size // 2 for s in (16, 32, 64) if s < size)
    prepare = 2 * levels * size**2 * key + merges
    walk = 3 * size * key * value + 2 * size**2 * value
    record = 2 * size * key * value + size**2 * value
    inside = (6 * levels if channel else 5) * size**2 * key + (0 if channel else size**3)
    back = prepare + record + walk + 3 * size * key * value + 2 * size**2 * value + inside
    return 2 * chunks * heads * (prepare + walk), 2 * chunks * heads * back


def _sizes(v: Tensor, offsets: Tensor | None, size: int) -> tuple[int, int]:
    """Tokens that all chunks of one call have room for, and how many chunks there are."""
    chunks = v.shape[0] * how_many(v.shape[1], offsets, size)
    return chunks * size, chunks


def flops(case: dict[str, Any]) -> int:
    """Forward FLOPs that the matmuls execute in bfloat16."""
    size = _default("chunk", case["key"])["size"]
    docs = case["docs"]
    chunks = case["batch"] * -(-case["time"] // size) if docs is None else sum(-(-n // size) for n in docs)
    return _executed(chunks * size, chunks, case["heads"], case["key"], case["value"], case["decay"] == "channel")[0]


@register_flop_formula(torch.ops.hybridlab.delta_rule_triton, get_raw=True)
def _(q, k, v, beta, log_decay=None, state=None, offsets=None, *, out_val=None, **_kwargs) -> int:
    room = _sizes(v, offsets, _chunk_size(q, v, offsets))
    return _executed(*room, v.shape[2], q.shape[3], v.shape[3], log_decay is not None and log_decay.dim() == 4)[0]


@register_flop_formula(torch.ops.hybridlab.delta_rule_triton_backward, get_raw=True)
def _(dy, dfinal, q, k, v, beta, log_decay=None, state=None, offsets=None, *, out_val=None, **_kwargs) -> int:
    room = _sizes(v, offsets, _chunk_size(q, v, offsets))
    return _executed(*room, v.shape[2], q.shape[3], v.shape[3], log_decay is not None and log_decay.dim() == 4)[1]
