"""Products of decays between any two tokens of a chunk, from sums that are never positive."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = -1e3  # exp of it is 0 even in float64; finite, so that differences of sums are


def per_token(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """None, [heads], [batch, time, heads] or [..., key] -> [batch, time, heads, 1 or key], in float32 or wider.

    v  [batch, time, heads, value]
    """
    log_decay = v.new_zeros(v.shape[2]) if log_decay is None else log_decay
    log_decay = log_decay if log_decay.dim() == 4 else log_decay.expand(v.shape[:3])[..., None]
    return log_decay.to(torch.promote_types(v.dtype, torch.float32))


def decays(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(Σ_{j < m ≤ i} log_decay_m) for i ≥ j, and 0 above: [..., chunk, chunk] from log_decay [..., chunk].

    Also returns the decay since the chunk's start (i included) and up to its end (j left out), both [..., chunk].
    Sums are float64: a strong decay must not cost the weak ones after it their digits.
    """
    log_decay, dtype = log_decay.clamp(min=LEAST).double(), log_decay.dtype
    total = log_decay.cumsum(-1)
    # not total[-1] - total: what then cancels in the gradient can be far larger than what remains
    rest = F.pad(log_decay.flip(-1).cumsum(-1).flip(-1)[..., 1:], (0, 1))
    return _Between.apply(total, dtype), total.exp().to(dtype), rest.exp().to(dtype)


class _Between(torch.autograd.Function):
    """total float64 [..., chunk] -> exp(total_i - total_j) for i ≥ j, and 0 above; differentiable once."""

    @staticmethod
    def forward(ctx, total: Tensor, dtype: torch.dtype) -> Tensor:
        # above the diagonal exp may overflow; those are selected away
        y = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dtype).exp_().tril_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        m = (grad * ctx.saved_tensors[0]).tril_(-1)
        return m.sum(-1, dtype=torch.float64) - m.sum(-2, dtype=torch.float64), None


def decayed_products(log_decay: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M_ij = Σ_k a_ik b_jk exp(Σ_{j < m ≤ i} log_decay_mk) for i ≥ j, and 0 above.

    log_decay, a, b  [..., chunk, key]; chunk a power of two
    returns  M [..., chunk, chunk]; decay since the chunk's start and up to its end as in `decays`, [..., chunk, key]

    Blocks double in size: the tokens of an odd block meet those of the even block before it over the decay up to the
    border between the two, so no exponent is ever positive and no difference of long sums is ever taken.
    """
    since, until = log_decay.unsqueeze(-2), torch.zeros_like(log_decay).unsqueeze(-2)  # [..., blocks, size, key]
    m = (a * b).sum(-1)[..., None, None]  # [..., blocks, size, size]
    while m.shape[-3] > 1:
        blocks, size = m.shape[-3], m.shape[-1]
        even, odd = m.unflatten(-3, (blocks // 2, 2)).unbind(-3)
        since_even, since_odd = since.unflatten(-3, (blocks // 2, 2)).unbind(-3)
        until_even, until_odd = until.unflatten(-3, (blocks // 2, 2)).unbind(-3)
        rows = a.unflatten(-2, (blocks // 2, 2, size)).select(-3, 1) * since_odd.exp()
        columns = b.unflatten(-2, (blocks // 2, 2, size)).select(-3, 0) * until_even.exp()
        low = rows @ columns.mT
        top, bottom = torch.cat([even, torch.zeros_like(low)], -1), torch.cat([low, odd], -1)
        m = torch.cat([top, bottom], -2)
        until = torch.cat([until_even + since_odd[..., -1:, :], until_odd], -2)
        since = torch.cat([since_even, since_odd + since_even[..., -1:, :]], -2)
    return m.squeeze(-3), since.squeeze(-3).exp(), until.squeeze(-3).exp()


def decayed_products_flops(chunk: int, key: int) -> int:
    """What its matmuls execute: each of log2(chunk) levels multiplies chunk / 2 rows with half as wide a block."""
    return chunk * (chunk - 1) * key
