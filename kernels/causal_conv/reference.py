import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from hybridlab.kernels.chunks import by_document, initial


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

    def loop(tokens: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        x = tokens[0]
        ys = [x[:, :0]]
        for x_t in x.unbind(1):
            window = torch.cat([state, x_t[:, None]], 1)
            y_t = einsum(window, weight.to(wide), "b w d, d w -> b d")
            ys.append((y_t if bias is None else y_t + bias.to(wide))[:, None])
            state = window[:, 1:]
        return torch.cat(ys, 1), state

    y, state = loop([x.to(wide)], state) if offsets is None else by_document(loop, offsets, [x.to(wide)], state)
    return (F.silu(y) if silu else y).to(x.dtype), state
