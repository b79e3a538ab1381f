"""Tokens from prompts: prefill in chunks, then one step per token."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridlab.generation.sampling import Sampler
from hybridlab.packing import Packing


@torch.no_grad()
def prefill(model: Any, prompts: Sequence[Sequence[int]], max_len: int, chunk: int = 512) -> tuple[Tensor, Any]:
    """Run prompts of any lengths from 1 together, at most `chunk` tokens of each at a time.

    returns  logits after the last token of each prompt [prompts, vocab], state with a row per prompt
    """
    if not prompts or not all(prompts):
        raise ValueError(f"lengths of prompts {[len(p) for p in prompts]}: give at least one, and one token in each")
    device = model.embed.weight.device
    state = model.init_state(len(prompts), max_len, device)
    last = torch.empty(len(prompts), model.vocab_size, device=device, dtype=model.embed.weight.dtype)
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [prompt[start : start + chunk] for prompt in prompts]
        packing = Packing.from_lengths([len(part) for part in parts], device)
        tokens = torch.tensor([[token for part in parts for token in part]], device=device)
        logits, state = model.prefill(tokens, state, packing)
        ended = [i for i, prompt in enumerate(prompts) if start < len(prompt) <= start + chunk]
        last[ended] = logits[0, packing.offsets[1:][ended].long() - 1].to(last.dtype)
    return last, state


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, sampler: Sampler, *, stop: int | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Up to `tokens` new tokens per prompt, as (prompt, token) for each step; a prompt ends before the token `stop`."""
    generators = sampler.generators(prompts)
    logits, state = prefill(model, prompts, max(map(len, prompts)) + tokens)
    running = list(range(len(prompts)))
    for left in reversed(range(tokens)):
        chosen = sampler(logits, generators)
        ids = chosen.tolist()
        running = [row for row in running if ids[row] != stop]
        yield [(row, ids[row]) for row in running]
        if not running or not left:
            return
        logits, state = model.step(chosen, state)


def complete(model: Any, tokenizer: Any, prompts: Sequence[str | bytes], tokens: int, sampler: Sampler) -> list[str]:
    """Continuations of texts, each up to the end of its document."""
    made: list[list[int]] = [[] for _ in prompts]
    starts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    for step in generate(model, starts, tokens, sampler, stop=tokenizer.bos):
        for row, token in step:
            made[row].append(token)
    return [tokenizer.decode(ids) for ids in made]
