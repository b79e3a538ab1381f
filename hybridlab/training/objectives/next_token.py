"""Predict the next token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.data.batch import UNSCORED, Batch
from hybridlab.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class NextToken(Settings):
    """Cross-entropy in nats per scored token, plus `z_loss` · logsumexp(logits)² and what the layers add.

    Losses of the micro-batches of a step add up to the loss of the step: token losses are divided by the number of
    scored tokens in the whole step, and the layers' own losses weighted by this batch's share of its rows.
    """

    z_loss: float = 0.0

    def __call__(
        self, model: nn.Module, batch: Batch, scored: Tensor | int, share: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """-> loss to differentiate; its parts by name, detached, adding up to it; the layers' statistics."""
        out = model(batch.tokens, batch.packing)
        logits = out.logits.flatten(0, 1).to(torch.promote_types(out.logits.dtype, torch.float32))
        targets = batch.targets.flatten()
        parts = {"loss": F.cross_entropy(logits, targets, ignore_index=UNSCORED, reduction="sum") / scored}
        if self.z_loss:
            squares = logits.logsumexp(-1).square()
            parts["z_loss"] = self.z_loss * (squares * (targets != UNSCORED)).sum() / scored
        parts |= {name: share * loss for name, loss in out.losses.items()}
        return torch.stack(list(parts.values())).sum(), {k: v.detach() for k, v in parts.items()}, out.stats
