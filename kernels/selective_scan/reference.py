import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from hybridlab.kernels.chunks import initial, recur


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, state=None, offsets=None,
    *, z=None, delta_bias=None, softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t;  y_t = (C_t h_t + D x_t) silu(z_t),  Δ = softplus(delta + delta_bias).

    x, delta    [batch, time, d_model]; Δ is not negative
    A           [d_model, state], not positive; B, C [batch, time, state]
    D           [d_model], no skip if None; z [batch, time, d_model], no gate if None; delta_bias [d_model]
    softplus    whether Δ passes through it
    state       [batch, d_model, state] before the first token; zeros if None
    offsets     int32 [docs + 1]: documents in one row (batch 1), each with its own row of state
    returns     y like x; state [batch or docs, d_model, state] after the last token, float32 or wider
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    state = initial(state, x, offsets, *A.shape)
    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    step = F.softplus(step) if softplus else step

    def move(h: Tensor, x: Tensor, step: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        h = (step[..., None] * A.to(wide)).exp() * h + einsum(step * x, B, "b d, b n -> b d n")
        return h, einsum(h, C, "b d n, b n -> b d")

    y, state = recur(move, state, offsets, x.to(wide), step, B.to(wide), C.to(wide))
    y = y if D is None else y + D.to(wide) * x.to(wide)
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype), state
