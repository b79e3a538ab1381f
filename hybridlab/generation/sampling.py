"""Choosing the next token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANGES = {"temperature": (0, 10**9), "top_k": (1, 10**9), "top_p": (1e-9, 1), "min_p": (0, 1), "seed": (0, 2**63 - 1)}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws from softmax(logits / temperature), cut down to tokens that pass every filter; the best one always does.

    temperature   0 takes the best token
    top_k         the k best tokens; None for all
    top_p         the fewest best tokens whose probabilities reach p
    min_p         tokens at least this fraction as probable as the best
    seed          with the prompt alone it decides what is drawn, whatever other prompts run beside it
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value}: it must lie between {low} and {high}")

    def generators(self, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
        """One source of chance per prompt; the n-th repetition of a prompt gets one of its own."""
        keys = [repr((self.seed, list(prompt))) for prompt in prompts]
        hashes = [hashlib.sha256(f"{keys[:i].count(key)} {key}".encode()).digest() for i, key in enumerate(keys)]
        return [torch.Generator().manual_seed(int.from_bytes(h[:8], "little", signed=True)) for h in hashes]

    def __call__(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """logits [batch, vocab], a CPU generator per row -> int64 [batch]. Raises ValueError on NaN."""
        if logits.isnan().any():
            raise ValueError("the model gave NaN in place of logits")
        if self.temperature == 0:
            return logits.argmax(-1)
        logits, order = logits.double().sort(dim=-1, descending=True, stable=True)
        p = ((logits - logits[:, :1]) / self.temperature).softmax(-1)
        rank = torch.arange(p.shape[-1], device=p.device)
        keep = (p.cumsum(-1) - p < self.top_p) & (p >= self.min_p * p[:, :1]) & (rank < (self.top_k or len(rank)))
        reach = (p * keep).cumsum(-1)
        draw = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(p.device)
        place = (reach <= draw[:, None] * reach[:, -1:]).sum(-1).minimum(keep.sum(-1) - 1)
        return order.gather(-1, place[:, None]).squeeze(-1)
