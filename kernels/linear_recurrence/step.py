from torch import Tensor

from hybridlab.kernels.chunks import initial, one_token
from hybridlab.kernels.op import Case, outside_autocast


def advance(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition at one token, in few calls: on small tensors they cost more than the work. Nothing is checked.

    q, k       [batch, groups, key]; v [batch, heads, value]; state [batch, heads, key, value]
    log_decay  None, [heads], [batch, heads] or [batch, heads, key]
    returns    y like v, state
    """
    with outside_autocast(state.device.type):
        q, k = (per_head(x, state) for x in (q, k))
        kept = state.clone() if log_decay is None else decay(log_decay, state) * state
        # in place, for baddbmm would copy what is fresh already
        kept = kept.flatten(0, 1).baddbmm_(k.mT, v.to(state.dtype).flatten(0, 1).unsqueeze(1))
        return (q @ kept).view_as(v).to(v.dtype), kept.view_as(state)


def per_head(x: Tensor, state: Tensor) -> Tensor:
    """x [batch, groups, key] -> [batch · heads, 1, key] in the dtype of the state [batch, heads, key, value]."""
    x = x.to(state.dtype).unsqueeze(2)
    return x.expand(-1, -1, state.shape[1] // x.shape[1], -1).flatten(0, 2).unsqueeze(1)


def decay(log_decay: Tensor, state: Tensor) -> Tensor:
    """[heads], [batch, heads] or [batch, heads, key] -> what multiplies the state [batch, heads, key, value]."""
    factor = log_decay.to(state.dtype).exp()
    return factor[..., None] if factor.dim() == 3 else factor[..., None, None]


def linear_recurrence_step(q: Tensor, k: Tensor, v: Tensor, log_decay=None, state=None, offsets=None):
    """Same result as the definition, for one token per row."""
    state = initial(state, v, offsets, v.shape[2], q.shape[3], v.shape[3])
    log_decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay.squeeze(1)
    y, state = advance(q.squeeze(1), k.squeeze(1), v.squeeze(1), log_decay, state)
    return y.unsqueeze(1), state


def refuses(q: Tensor, k: Tensor, v: Tensor, log_decay=None, state=None, offsets=None) -> str | None:
    """Why this is not one token per row."""
    return one_token(v, offsets)


def flops(case: Case) -> int:
    """Outer product and readout."""
    return 4 * case["batch"] * case["heads"] * case["key"] * case["value"]
