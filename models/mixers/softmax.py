"""Softmax attention over the keys a mask leaves visible, and over long rows in blocks of queries."""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from hybridlab.models.mixer import wide

BLOCK = 256  # queries at a time; on a CPU as fast as larger blocks at 512 to 2,048 tokens


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None, soft_cap: float | None) -> Tensor:
    """softmax(q · k / sqrt(head_dim)) v over visible keys.

    q         [batch, queries, heads, head_dim]
    k, v      [batch, keys, kv_heads, head_dim]; head i reads kv head i // (heads / kv_heads)
    visible   bool [batch or 1, queries, keys]; at least one key per query
    sinks     [heads], a further score per head that carries no value
    soft_cap  scores s become soft_cap · tanh(s / soft_cap)
    """
    if sinks is None and soft_cap is None:
        q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, visible[:, None], enable_gqa=q.shape[1] != k.shape[1])
        return rearrange(y, "b h t d -> b t h d")
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, dtype = *(x.to(wide(q.dtype)) for x in (q, k, v)), q.dtype
        q = rearrange(q, "b q (g r) d -> b g r q d", g=k.shape[2])
        scores = einsum(q, k, "b g r q d, b k g d -> b g r q k") * q.shape[-1] ** -0.5
        scores = scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)
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
