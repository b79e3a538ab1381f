"""How well a model predicts held-out rows."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_AT_ONCE = 16_384  # bounds the memory that logits take, whatever the rows' length


def rows_at_once(corpus: Any) -> int:
    """How many held-out rows to score together."""
    return max(1, TOKENS_AT_ONCE // corpus.rows("valid", [0]).tokens.shape[1])


@torch.no_grad()
def score(model: Any, batch: Any, token_bytes: Tensor | None = None) -> Tensor:
    """Sums over the scored targets of a batch, documents apart, so that they add up over batches and ranks.

    token_bytes  int64 [vocab]   bytes that each id stands for
    returns      float64 [4] on the CPU: loss in nats, tokens scored, tokens guessed right, bytes (0 when unknown)
    """
    scored = batch.targets[batch.targets != -100]
    size = 0 if token_bytes is None else int(token_bytes[scored.cpu()].sum())
    device = next(model.parameters()).device
    logits = model(batch.tokens.to(device), batch.packing.to(device)).logits.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch.targets.flatten().to(device)
    nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    right = (logits.argmax(-1) == targets).sum()
    return torch.tensor([nats, len(scored), right, size], dtype=torch.float64)


def evaluate(model: Any, corpus: Any, *, rows: int | None = None, batch_size: int | None = None) -> dict[str, float]:
    """Figures over the first `rows` held-out rows, all by default; leaves the model in evaluation mode.

    batch_size  rows scored together; None: as many as `rows_at_once` allows
    """
    n = min(rows or corpus.n_rows("valid"), corpus.n_rows("valid"))
    if n < 1:
        raise ValueError("the data have no held-out rows")
    sums, batch_size = torch.zeros(4, dtype=torch.float64), batch_size or rows_at_once(corpus)
    model.eval()
    for first in range(0, n, batch_size):
        batch = corpus.rows("valid", list(range(first, min(first + batch_size, n))))
        sums += score(model, batch, corpus.token_bytes)
    return figures(sums) | {"rows": n}


def figures(sums: Tensor) -> dict[str, float]:
    """What the sums of `score` say: loss in nats per token, accuracy, and bits per byte where bytes are known."""
    nats, tokens, right, size = sums.tolist()
    found = {"loss": nats / max(tokens, 1), "accuracy": right / max(tokens, 1), "tokens": int(tokens)}
    return found | ({"bytes": int(size), "bits_per_byte": nats / math.log(2) / size} if size else {})
