"""Causal softmax attention with grouped queries (Vaswani et al. 2017; Ainslie et al. 2023)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from hybridlab.models.mixer import Device, Dtype, State, TokenMixer, wide
from hybridlab.models.mixers.recurrent import divide
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.models.parts.rope import check_dims, positions, rotate
from hybridlab.packing import Packing

BLOCK = 256  # queries at a time; on a CPU as fast as larger blocks at 512 to 2,048 tokens


class AttentionState(NamedTuple):
    """A ring: the token at position p lies in slot p % kept, where kept = min(max_len, window)."""

    k: Tensor  # [batch, kv_heads, kept, head_dim], rotated
    v: Tensor  # [batch, kv_heads, kept, head_dim]
    length: Tensor  # int64 [batch], tokens seen


class Attention(TokenMixer):
    """Every query head weighs the values of the tokens before it; heads share keys and values in groups.

    The options are those that published hybrids combine freely, which is why there are so many.

    n_kv_heads   heads of keys and values, dividing n_heads; None means n_heads
    head_dim     channels per head; None means d_model / n_heads
    window       tokens a query sees, itself included; None sees the whole document
    rope_dims    channels of a head that carry the position; None means all, 0 none
    qk_norm      normalise each head's q and k (Henry et al. 2020)
    sinks        a learned score per head joins the softmax and takes weight without giving a value (as in gpt-oss)
    output_gate  multiply each head's output by a sigmoid of the input (as in Qwen3-Next)
    soft_cap     bound scores to ±soft_cap by tanh (as in Gemma 2); None leaves them
    """

    def __init__(
        self, d_model: int, *, n_heads: int, n_kv_heads: int | None = None, head_dim: int | None = None,
        window: int | None = None, rope_dims: int | None = None, rope_theta: float = 10000.0, qk_norm: bool = False,
        sinks: bool = False, output_gate: bool = False, soft_cap: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if (window is not None and window < 1) or (soft_cap is not None and soft_cap <= 0):
            raise ValueError(f"window={window} must be at least 1, and soft_cap={soft_cap} above 0, or None")
        self.d_model, self.n_heads, self.window, self.soft_cap = d_model, n_heads, window, soft_cap
        self.rope_dims, self.rope_theta, self.output_gate = rope_dims, rope_theta, output_gate
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.head_dim = divide(d_model, n_heads, "d_model", "n_heads") if head_dim is None else head_dim
        divide(n_heads, self.n_kv_heads, "n_heads", "n_kv_heads")
        check_dims(rope_dims, self.head_dim)
        self.heads = [n_heads, self.n_kv_heads, self.n_kv_heads, n_heads if output_gate else 0]  # q, k, v, gate
        self.inputs = nn.Linear(d_model, sum(self.heads) * self.head_dim, bias=False)
        self.norms = nn.ModuleList(RMSNorm(self.head_dim) for _ in "qk") if qk_norm else None
        self.sinks = nn.Parameter(torch.empty(n_heads)) if sinks else None
        self.out = nn.Linear(n_heads * self.head_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def _project(self, x: Tensor, where: Tensor) -> list[Tensor]:
        """x [batch, time, d_model], positions [batch or 1, time] -> q, k, v, gate [batch, time, heads, head_dim]."""
        n_q, n_k, *others = self.heads
        qk, v, gate = rearrange(self.inputs(x), "b t (h d) -> b t h d", d=self.head_dim).split([n_q + n_k, *others], 2)
        if self.norms is not None:
            parts = zip(self.norms, qk.split([n_q, n_k], 2), strict=True)
            qk = torch.cat([norm(part) for norm, part in parts], 2)
        q, k = rotate(qk, where, dims=self.rope_dims, theta=self.rope_theta).split([n_q, n_k], 2)
        return [q, k, v, gate]

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        y = y * torch.sigmoid(gate) if self.output_gate else y
        return self.out(rearrange(y, "b t h d -> b t (h d)"))

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            packing.check(*x.shape[:2])
        where = positions(x, packing=packing)
        q, k, v, gate = self._project(x, where)
        reach = min(x.shape[1], self.window or x.shape[1], packing.longest if packing is not None else x.shape[1])
        return self._output(attend_in_blocks(q, k, v, where, reach, self.sinks, self.soft_cap), gate)

    def init_state(self, batch: int, max_len: int, device: Device = None, dtype: Dtype = None) -> AttentionState:
        shape = (batch, self.n_kv_heads, min(max_len, self.window or max_len), self.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
        return AttentionState(k, v, torch.zeros(batch, device=device, dtype=torch.int64))

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        where = state.length[:, None]
        q, k, v, gate = self._project(rearrange(x, "b d -> b 1 d"), where)
        state = self._remember(state, k, v)
        least, most = (int(length) for length in state.length.aminmax())
        k, v = _kept(state, min(most, state.k.shape[2]), q.dtype)
        if least == most:  # then every slot in use is visible to every row
            y = attend(q, k, v, None, self.sinks, self.soft_cap)
        else:
            y = self._attend(q, k, v, where, _slots(state)[:, : k.shape[1]])
        return rearrange(self._output(y, gate), "b 1 d -> b d"), state

    def prefill(self, x: Tensor, state: State, packing: Packing | None = None) -> tuple[Tensor, State]:
        if packing is not None:
            return self._prefill_documents(x, state, packing)
        if not x.numel():
            return x, state
        where = positions(x, state.length)
        q, k, v, gate = self._project(x, where)
        used = min(int(state.length.max()), state.k.shape[2])  # slots
        keys, values = (torch.cat(pair, 1) for pair in zip(_kept(state, used, q.dtype), (k, v), strict=True))
        y = self._attend(q, keys, values, where, torch.cat([_slots(state)[:, :used], where], 1))
        return self._output(y, gate), self._remember(state, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Positions int64 [batch, queries] and [batch, keys]; negative keys hold nothing."""
        gap = q_positions[:, :, None] - k_positions[:, None, :]
        visible = (gap >= 0) & (k_positions[:, None, :] >= 0)
        visible = visible & (gap < self.window) if self.window else visible
        return attend(q, k, v, visible, self.sinks, self.soft_cap)

    def _remember(self, state: AttentionState, k: Tensor, v: Tensor) -> AttentionState:
        """Write k and v [batch, time, kv_heads, head_dim] into the ring, in place."""
        kept, time = state.k.shape[2], k.shape[1]
        if kept != self.window and (longest := int(state.length.max()) + time) > kept:
            raise ValueError(f"the state was made for max_len={kept} tokens, and this call makes them {longest}")
        last = torch.arange(max(0, time - kept), time, device=k.device)  # earlier ones would be overwritten at once
        rows, slots = torch.arange(len(k), device=k.device)[:, None], (state.length[:, None] + last) % kept
        state.k[rows, :, slots], state.v[rows, :, slots] = k[:, last].to(state.k.dtype), v[:, last].to(state.v.dtype)
        return state._replace(length=state.length + time)

    def flops(self, length: int) -> int:
        """Projections, and scores and weighted values of every visible pair."""
        width = min(length, self.window or length)
        pairs = width * (width + 1) // 2 + (length - width) * width
        projections = 2 * self.d_model * self.head_dim * (sum(self.heads) + self.n_heads)
        return projections * length + 4 * self.n_heads * self.head_dim * pairs


def _slots(state: AttentionState) -> Tensor:
    """int64 [batch, kept]: the position of the token in each slot of the ring, negative where there is none yet."""
    newest = state.length[:, None] - 1
    return newest - (newest - torch.arange(state.k.shape[2], device=newest.device)) % state.k.shape[2]


def _kept(state: AttentionState, slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k and v of the first slots, [batch, slots, kv_heads, head_dim], without a copy where the dtype is right."""
    k, v = (rearrange(x[:, :, :slots], "b h t d -> b t h d").to(dtype) for x in (state.k, state.v))
    return k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sinks: Tensor | None, soft_cap: float | None
) -> Tensor:
    """softmax(q · k / sqrt(head_dim)) v over visible keys.

    q         [batch, queries, heads, head_dim]
    k, v      [batch, keys, kv_heads, head_dim]; head i reads kv head i // (heads / kv_heads)
    visible   bool [batch or 1, queries, keys]; at least one key per query; None where all are
    sinks     [heads], a further score per head that carries no value
    soft_cap  scores s become soft_cap · tanh(s / soft_cap)
    """
    if sinks is None and soft_cap is None:
        mask = None if visible is None else visible[:, None]
        k, v = (rearrange(x, "b t h d -> b h t d") for x in (k, v))
        if q.shape[1] == 1:  # the heads of a group are rows of one product: keys and values are read once for all
            y = F.scaled_dot_product_attention(rearrange(q, "b 1 (g r) d -> b g r d", g=k.shape[1]), k, v, mask)
            return rearrange(y, "b g r d -> b 1 (g r) d")
        y = F.scaled_dot_product_attention(
            rearrange(q, "b t h d -> b h t d"), k, v, mask, enable_gqa=q.shape[2] != k.shape[1]
        )
        return rearrange(y, "b h t d -> b t h d")
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, dtype = *(x.to(wide(q.dtype)) for x in (q, k, v)), q.dtype
        q = rearrange(q, "b q (g r) d -> b g r q d", g=k.shape[2])
        scores = einsum(q, k, "b g r q d, b k g d -> b g r q k") * q.shape[-1] ** -0.5
        scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
        if visible is not None:
            scores = scores.masked_fill(~rearrange(visible, "b q k -> b 1 1 q k"), -torch.inf)
        if sinks is not None:
            sink = rearrange(sinks.to(scores.dtype), "(g r) -> 1 g r 1 1", g=k.shape[2])
            scores = torch.cat([scores, sink.expand(*scores.shape[:4], 1)], -1)
        y = einsum(scores.softmax(-1)[..., : k.shape[1]], v, "b g r q k, b k g d -> b g r q d")
        return rearrange(y, "b g r q d -> b q (g r) d").to(dtype)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, since_start: Tensor, reach: int, sinks: Tensor | None, soft_cap: float | None
) -> Tensor:
    """Causal attention of a row to itself; q, k, v [batch, time, heads, head_dim].

    since_start  int64 [batch or 1, time], tokens between a query and the start of its document
    reach        tokens a query sees at most, itself included; keys further back are never touched
    """
    index = torch.arange(q.shape[1], device=q.device)
    first, ys = index - since_start.clamp(max=reach - 1), [q[:, :0]]
    for start in range(0, q.shape[1], BLOCK):
        queries, keys = slice(start, start + BLOCK), slice(max(0, start - reach + 1), start + BLOCK)
        visible = (index[keys] <= index[queries, None]) & (index[keys] >= first[:, queries, None])
        ys.append(attend(q[:, queries], k[:, keys], v[:, keys], visible, sinks, soft_cap))
    return torch.cat(ys, 1)
