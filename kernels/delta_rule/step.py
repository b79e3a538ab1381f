import torch
from torch import Tensor

from hybridlab.kernels.chunks import initial, one_token
from hybridlab.kernels.linear_recurrence.step import decay, per_head
from hybridlab.kernels.op import Case


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None):
    """Same result as the definition for one token per row, in few calls: small ones cost more than their work."""
    state = initial(state, v, offsets, v.shape[2], q.shape[3], v.shape[3])
    q, k = (per_head(x.squeeze(1), state) for x in (q, k))
    beta = beta.to(state.dtype).flatten()[:, None, None]
    kept = (state if log_decay is None else decay(log_decay.squeeze(1), state) * state).flatten(0, 1)
    kept = torch.baddbmm(kept, k.mT, beta * (v.to(state.dtype).flatten(0, 2).unsqueeze(1) - k @ kept))
    return (q @ kept).view_as(v).to(v.dtype), kept.view_as(state)


def refuses(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None) -> str | None:
    """Why this is not one token per row."""
    return one_token(v, offsets)


def flops(case: Case) -> int:
    """Recall, correction, readout."""
    return 6 * case["batch"] * case["heads"] * case["key"] * case["value"]
