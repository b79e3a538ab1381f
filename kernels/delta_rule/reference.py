import torch
from einops import einsum, repeat
from torch import Tensor

from hybridlab.kernels.chunks import initial, recur
from hybridlab.kernels.decay import per_token


def delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay=None, state=None, offsets=None):
    """S_t = (I − β_t k_t k_tᵀ) diag(exp(log_decay_t)) S_{t-1} + β_t k_t v_tᵀ;  y_t = S_tᵀ q_t.

    q, k       [batch, time, groups, key], k of unit length; head i reads group i // (heads / groups)
    v          [batch, time, heads, value]
    beta       [batch, time, heads], from 0 to 2
    log_decay  None, [batch, time, heads] or [batch, time, heads, key]; never positive
    state      [batch, heads, key, value] before the first token; zeros if None
    offsets    int32 [docs + 1]: documents in one row (batch 1), each with its own row of state
    returns    y like v; state [batch or docs, heads, key, value] after the last token, float32 or wider
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    state = initial(state, v, offsets, v.shape[2], q.shape[3], v.shape[3])
    q, k = (repeat(x.to(wide), "b t g k -> b t (g r) k", r=v.shape[2] // x.shape[2]) for x in (q, k))

    def step(s: Tensor, v: Tensor, q: Tensor, k: Tensor, beta: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        s = decay[..., None] * s
        error = v - einsum(s, k, "b h k v, b h k -> b h v")
        s = s + einsum(beta, k, error, "b h, b h k, b h v -> b h k v")
        return s, einsum(s, q, "b h k v, b h k -> b h v")

    y, state = recur(step, state, offsets, v.to(wide), q, k, beta.to(wide), per_token(log_decay, v).exp())
    return y.to(v.dtype), state
