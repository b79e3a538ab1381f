import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlab.kernels.chunks import initial, one_token


def advance(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """The definition at one token, in few calls: on small tensors they cost more than the work. Nothing is checked.

    x [batch, d_model], weight and bias as there, state [batch, w - 1, d_model] -> y like x, state
    """
    window = torch.cat([state, x.to(state.dtype).unsqueeze(1)], 1)
    y = (window * weight.to(state.dtype).mT).sum(1)
    y = y if bias is None else y + bias.to(state.dtype)
    return (F.silu(y) if silu else y).to(x.dtype), window[:, 1:]


def causal_conv_step(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False):
    """Same result as the definition, for one token per row."""
    state = initial(state, x, offsets, weight.shape[1] - 1, x.shape[2])
    y, state = advance(x.squeeze(1), weight, bias, state, silu)
    return y.unsqueeze(1), state


def refuses(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False) -> str | None:
    """Why this is not one token per row."""
    return one_token(x, offsets)
