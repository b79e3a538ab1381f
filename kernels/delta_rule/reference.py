import torch
from einops import einsum, repeat
from torch import Tensor

from hybridlab.kernels.chunks import by_document, initial


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
    (batch, time, heads), groups = v.shape[:3], q.shape[2]
    state = initial(state, v, offsets, heads, q.shape[3], v.shape[3])
    q, k = (repeat(x.to(wide), "b t g k -> b t (g r) k", r=heads // groups) for x in (q, k))
    decay = v.new_ones(batch, time, heads, dtype=wide) if log_decay is None else log_decay.to(wide).exp()
    decay = decay[..., None] if decay.dim() == 3 else decay
    tokens = [q, k, v.to(wide), beta.to(wide), decay]
    y, state = _loop(tokens, state) if offsets is None else by_document(_loop, offsets, tokens, state)
    return y.to(v.dtype), state


def _loop(tokens: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    ys = [tokens[2][:, :0]]
    for q_t, k_t, v_t, beta_t, a_t in zip(*(x.unbind(1) for x in tokens), strict=True):
        state = a_t[..., None] * state
        error = v_t - einsum(state, k_t, "b h k v, b h k -> b h v")
        state = state + einsum(beta_t, k_t, error, "b h, b h k, b h v -> b h k v")
        ys.append(einsum(state, q_t, "b h k v, b h k -> b h v")[:, None])
    return torch.cat(ys, 1), state
