import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlab.kernels.chunks import Take, initial

BLOCK = 256  # tokens per pass over the taps, so that a pass stays in a CPU's cache


def causal_conv_chunked(x: Tensor, weight: Tensor, bias=None, state=None, offsets=None, *, silu: bool = False):
    """Same result as the definition: shifted products over blocks of time, each document behind its state."""
    wide = torch.promote_types(x.dtype, torch.float32)
    time, past = x.shape[1], weight.shape[1] - 1
    state = initial(state, x, offsets, past, x.shape[2])
    if offsets is None:
        whole = torch.cat([state, x.to(wide)], 1)
        y, last = _Taps.apply(whole, weight.to(wide)), whole[:, time:]
    else:
        order, place, token, tail = _behind_states(offsets.long(), time, past)
        whole = Take.apply(torch.cat([state.flatten(0, 1), x[0].to(wide)]), order.argsort(), order)
        y = Take.apply(_Taps.apply(whole[None], weight.to(wide))[0], place, token)[None]
        last = whole.index_select(0, tail).view_as(state)
    y = y if bias is None else y + bias.to(wide)
    return (F.silu(y) if silu else y).to(x.dtype), last


def _behind_states(offsets: Tensor, time: int, past: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where things stand once all documents lie in one row, each behind the `past` rows of its state; all int64:
    every row of the states, then every token; the y of every token; the token of every y; the last inputs."""
    docs, token, lag = (torch.arange(n, device=offsets.device) for n in (len(offsets) - 1, time, past))
    place = token + torch.searchsorted(offsets[1:].contiguous(), token, right=True) * past
    starts, ends = offsets[:-1] + docs * past, offsets[1:] + docs * past
    before, tail = ((at[:, None] + lag).flatten() for at in (starts, ends))
    owner = torch.full((time + len(docs) * past,), time, device=offsets.device).scatter(0, place, token)
    return torch.cat([before, place + past]), place, owner[: len(owner) - past], tail


class _Taps(torch.autograd.Function):
    """whole [b, past + time, d], weight [d, past + 1] -> Σ_i weight[:, i] whole[:, i : i + time]; gradients once"""

    @staticmethod
    def forward(ctx, whole: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(whole, weight)
        y = torch.zeros_like(whole[:, weight.shape[1] - 1 :])
        taps = weight.mT.contiguous()
        for row, begin, end in _blocks(y):
            for i, tap in enumerate(taps):
                y[row, begin:end].addcmul_(whole[row, begin + i : end + i], tap)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        whole, weight = ctx.saved_tensors
        taps = weight.mT.contiguous()
        d_whole, d_taps = torch.zeros_like(whole), torch.zeros_like(taps)
        for row, begin, end in _blocks(grad):
            part = grad[row, begin:end]
            for i, tap in enumerate(taps):
                d_whole[row, begin + i : end + i].addcmul_(part, tap)
                d_taps[i] += (part * whole[row, begin + i : end + i]).sum(0)
        return d_whole, d_taps.mT


def _blocks(y: Tensor) -> list[tuple[int, int, int]]:
    return [(b, t, min(t + BLOCK, y.shape[1])) for b in range(y.shape[0]) for t in range(0, y.shape[1], BLOCK)]
