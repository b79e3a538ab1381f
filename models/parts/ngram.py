"""N-gram heads: hard attention to what followed the last tokens when they stood here before."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from hybridlab.models.mixer import map_state
from hybridlab.models.parts.init import Module
from hybridlab.packing import Packing

RUNS = 4  # agreement is told apart as 1, 2-3, 4-7, and 8 or more occurrences


class Found(NamedTuple):
    """What each head reads.

    token   int64 [..., heads]   the token that followed the most recent earlier occurrence; 0 where there is none
    level   int64 [..., heads]   0 for none, else 1 + RUNS · (index of the matched order) + log2 of the agreement
    """

    token: Tensor
    level: Tensor


class NgramState(NamedTuple):
    tokens: Tensor  # int64 [batch, max_len], the document so far
    length: Tensor  # int64 [batch]


class NgramHeads(Module):
    """Heads that match the last n tokens against the document so far (Akyürek et al. 2024, arXiv 2401.12973, §6).

    For every order n, the most recent earlier position whose last n tokens equal the current ones is found, and with it
    the token that followed, and how many of the latest such positions agree on that token. The first head reads the
    longest order that matches, each further one the longest whose token no head before it reads. What a head reads
    enters the residual stream, and raises the logit of the token read, as a pointer (Merity et al. 2016, arXiv
    1609.07843) without a mixture.

    orders   lengths matched, ascending; each at most twice the one before it
    """

    def __init__(self, d_model: int, *, n_heads: int = 1, orders: Sequence[int] = (1, 2, 4, 8, 16, 32)):
        super().__init__()
        orders = list(orders)
        if orders[:1] != [1] or any(not a < b <= 2 * a for a, b in pairwise(orders)):
            raise ValueError(f"orders={orders}: start at 1 and grow, each at most twice the one before it")
        if not 1 <= n_heads <= len(orders):
            raise ValueError(f"n_heads={n_heads}: from 1 to as many as orders={orders} holds")
        self.d_model, self.orders, self.n_heads = d_model, orders, n_heads
        levels = 1 + RUNS * len(orders)
        self.read = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(n_heads))
        self.level_embed = nn.Parameter(torch.empty(n_heads, levels, d_model))
        self.level_logit = nn.Parameter(torch.empty(n_heads, levels))
        self.trust = nn.Parameter(torch.empty(n_heads, d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for p in (self.level_embed, self.level_logit, self.trust):
            p.zero_()

    def enter(self, x: Tensor, found: Found, embedding: nn.Embedding) -> Tensor:
        """x [..., d_model] with what the heads read added, as vectors."""
        some = (found.level > 0).to(x.dtype)
        for i, read in enumerate(self.read):
            value = read(embedding(found.token[..., i])) * some[..., i, None]
            x = x + value + F.embedding(found.level[..., i], self.level_embed[i]).to(x.dtype)
        return x

    def leave(self, logits: Tensor, x: Tensor, found: Found) -> Tensor:
        """logits [..., vocab], x [..., d_model] normalised -> logits with the tokens read raised (or lowered)."""
        heads = torch.arange(self.n_heads, device=x.device)
        bonus = x.to(self.trust.dtype) @ self.trust.mT + self.level_logit[heads, found.level]
        bonus = torch.where(found.level > 0, bonus, 0.0)
        return logits.scatter_add(-1, found.token, bonus.to(logits.dtype))

    @torch.no_grad()
    def find(self, tokens: Tensor, packing: Packing | None = None) -> Found:
        """tokens int64 [batch, time] -> what each head reads at each of them, documents apart."""
        packing = packing or Packing.from_lengths([tokens.shape[1]] * tokens.shape[0], tokens.device)
        flat = tokens.flatten()
        per_order = [_follow(names, flat) for names in _names(flat, packing, self.orders)]
        found = self._choose(*(torch.stack(parts, -1) for parts in zip(*per_order, strict=True)))
        return map_state(lambda part: part.view(*tokens.shape, self.n_heads), found)

    def _choose(self, token: Tensor, run: Tensor) -> Found:
        """token, run int64 [..., orders], run 0 where nothing matches -> what each head reads."""
        # floor(log2(run)) by comparison: exact, where a float logarithm need not be
        grade = sum((run >= 2**i).long() for i in range(1, RUNS))
        tokens, levels = ([torch.zeros_like(run[..., 0])] * self.n_heads for _ in range(2))
        for i in reversed(range(len(self.orders))):
            offered = run[..., i] > 0
            for head in range(self.n_heads):
                empty = levels[head] == 0
                taken = offered & empty
                tokens[head] = torch.where(taken, token[..., i], tokens[head])
                levels[head] = torch.where(taken, 1 + RUNS * i + grade[..., i], levels[head])
                offered = offered & ~empty & (tokens[head] != token[..., i])
        return Found(torch.stack(tokens, -1), torch.stack(levels, -1))

    def init_state(self, batch: int, max_len: int, device: torch.device | str | None = None) -> NgramState:
        return NgramState(
            *(torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((batch, max_len), batch))
        )

    @torch.no_grad()
    def prefill(self, tokens: Tensor, state: NgramState, packing: Packing | None = None) -> tuple[Found, NgramState]:
        """tokens int64 [batch, time] (with `packing`, [1, tokens]: document i continues row i). Consumes `state`."""
        new = list(tokens if packing is None else tokens[0].split(packing.offsets.diff().tolist()))
        length = state.length + torch.tensor([len(part) for part in new], device=tokens.device)
        self._check(length, state)
        for row, part, end in zip(state.tokens, new, length.tolist(), strict=True):
            row[end - len(part) : end] = part
        rows = [row[:end] for row, end in zip(state.tokens, length.tolist(), strict=True)]
        whole = Packing.from_lengths([len(row) for row in rows], tokens.device)
        found = self.find(torch.cat(rows)[None], whole)
        fresh = whole.positions >= state.length[whole.ids]
        return map_state(lambda part: part[0, fresh].view(*tokens.shape, self.n_heads), found), NgramState(
            state.tokens, length
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: NgramState) -> tuple[Found, NgramState]:
        """tokens int64 [batch]: the definition, position by position against the document so far. Consumes `state`."""
        length, reach = state.length + 1, self.orders[-1]
        self._check(length, state)
        state.tokens.scatter_(1, state.length[:, None], tokens[:, None])
        history = state.tokens[:, : int(length.max())]
        ends = F.pad(history, (reach - 1, 0), value=-1).unfold(1, reach, 1)  # [batch, time, reach], -1 before the start
        now = ends.gather(1, repeat(state.length, "b -> b 1 r", r=reach))
        equal = ((ends == now) & (ends >= 0)).flip(-1).cumprod(-1, dtype=torch.uint8)[
            ..., [n - 1 for n in self.orders]
        ] > 0
        position = rearrange(torch.arange(history.shape[1], device=tokens.device), "t -> 1 t 1")
        equal = equal & (position < state.length[:, None, None])  # [batch, time, orders]
        last = torch.where(equal, position, -1).amax(1, keepdim=True)
        following = repeat(history.roll(-1, 1), "b t -> b t o", o=len(self.orders))
        follow = following.gather(1, last.clamp(min=0))
        differs = torch.where(equal & (following != follow), position, -1).amax(1, keepdim=True)
        run = (equal & (position > differs)).sum(1)
        return self._choose(follow[:, 0], run), NgramState(state.tokens, length)

    def _check(self, length: Tensor, state: NgramState) -> None:
        if (longest := int(length.max())) > state.tokens.shape[1]:
            raise ValueError(f"n-gram heads keep max_len={state.tokens.shape[1]} tokens, but {longest} were given")

    def flops(self, length: int) -> int:
        """Forward FLOPs on `length` tokens; comparisons of tokens are none."""
        return self.n_heads * (2 * self.d_model**2 + 2 * self.d_model) * length


def _names(flat: Tensor, packing: Packing, orders: Sequence[int]) -> list[Tensor]:
    """For each order n, int64 [tokens]: equal just where document and last n tokens are equal; negative if cut short.

    Longer n-grams are named by pairs of shorter ones that overlap (prefix doubling), so no hash can collide.
    """
    ids, positions = packing.ids, packing.positions
    names = [torch.unique(ids * 2**31 + flat, return_inverse=True)[1]]
    for shorter, n in pairwise(orders):
        before = names[-1].roll(n - shorter)
        pair = torch.unique(names[-1] * len(flat) + before, return_inverse=True)[1]
        names.append(torch.where(positions >= n - 1, pair, -1 - torch.arange(len(flat), device=flat.device)))
    return names


def _follow(names: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Token after the latest earlier position of the same name, and how many of the latest agree on it (0: none)."""
    sorted_names, order = torch.sort(names, stable=True)
    following = flat.roll(-1)[order]
    index = torch.arange(len(flat), device=flat.device)
    again = torch.cat([sorted_names.new_zeros(1), (sorted_names[1:] == sorted_names[:-1]).long()]).bool()
    agrees = again & (following == following.roll(1))
    first = torch.where(agrees, 0, index).cummax(0).values
    run = index - first + 1
    token, count = torch.empty_like(flat), torch.empty_like(flat)
    token[order] = following.roll(1)
    count[order] = torch.where(again, run.roll(1), 0)
    return token, count
