import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from hybridlab.kernels.chunks import by_document, initial


def selective_scan_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D=None,
    state=None,
    offsets=None,
    *,
    z=None,
    delta_bias=None,
    softplus: bool = False,
) -> tuple[Tensor, Tensor]:
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

    def loop(tokens: list[Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
        x, step, B, C = tokens
        ys = [x[:, :0]]
        for x_t, step_t, B_t, C_t in zip(x.unbind(1), step.unbind(1), B.unbind(1), C.unbind(1), strict=True):
            h = (step_t[..., None] * A.to(wide)).exp() * h + einsum(step_t * x_t, B_t, "b d, b n -> b d n")
            ys.append(einsum(h, C_t, "b d n, b n -> b d")[:, None])
        return torch.cat(ys, 1), h

    tokens = [x.to(wide), step, B.to(wide), C.to(wide)]
    y, state = loop(tokens, state) if offsets is None else by_document(loop, offsets, tokens, state)
    y = y if D is None else y + D.to(wide) * x.to(wide)
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype), state
