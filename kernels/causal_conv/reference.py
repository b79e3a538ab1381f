import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from hybridlab.kernels.chunks import initial, recur


def causal_conv_reference(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False):
    """y_t = act(bias + Σ_i weight[:, i] x_{t - w + 1 + i}), act = silu or identity; `state` stands before x_0.

    x          [batch, time, d_model]
    weight     [d_model, w]; bias [d_model] or None
    state      [batch, w - 1, d_model]: the inputs before the first token, oldest first; zeros if None
    offsets    int32 [docs + 1]: documents in one row (batch 1), each with its own row of state
    returns    y like x; state [batch or docs, w - 1, d_model]: the last w - 1 inputs, float32 or wider
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    state = initial(state, x, offsets, weight.shape[1] - 1, x.shape[2])

    def step(past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([past, x[:, None]], 1)
        return window[:, 1:], einsum(window, weight.to(wide), "b w d, d w -> b d")

    y, state = recur(step, state, offsets, x.to(wide))
    y = y if bias is None else y + bias.to(wide)
    return (F.silu(y) if silu else y).to(x.dtype), state
