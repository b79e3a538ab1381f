import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hybridlab.kernels.chunks import Chunks, initial, of_case, pick
from hybridlab.kernels.op import Case

CHUNK = 16  # tokens, at most


def selective_scan_chunked(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, state=None, offsets=None,
    *, z=None, delta_bias=None, softplus: bool = False, chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same result as the definition; states [batch, chunk, d_model, state] live for one chunk, in the backward too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    state = initial(state, x, offsets, *A.shape)
    step = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
    step = F.softplus(step) if softplus else step
    cut = Chunks(x.shape[1], offsets, chunk or pick(x.shape[1], offsets, CHUNK))
    wide_x, rates = x.to(wide), rearrange(A.to(wide), "d n -> n d").contiguous()
    parts = [
        rearrange(cut.split(t), "b n c d -> n c b d").unbind(0) for t in (step, step * wide_x, B.to(wide), C.to(wide))
    ]
    run = lambda n, h: _Chunk.apply(rates, *(part[n] for part in parts), h)  # noqa: E731
    ys, state = cut.scan(run, rearrange(state, "b d n -> b n d"))
    y = cut.join(rearrange(torch.stack(ys), "n c b d -> b n c d")) if ys else torch.zeros_like(wide_x)
    y = y if D is None else y + D.to(wide) * wide_x
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype), rearrange(state, "b n d -> b d n")


def flops(case: Case) -> int:
    """What the matmuls execute, padding included: h·C. The recurrence itself is element by element."""
    chunks, c = of_case(case, CHUNK)
    return 2 * chunks * c * case["d_model"] * case["n"]


class _Chunk(torch.autograd.Function):
    """One chunk: rates [n d]; step, inputs [c b d]; B, C [c b n]; h [b n d] -> y [c b d], h. Differentiable once.

    Keeps its arguments only: the backward recomputes the states, [c b n d], then runs the recurrence in reverse.
    """

    @staticmethod
    def forward(ctx, rates: Tensor, step: Tensor, inputs: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple:
        ctx.save_for_backward(rates, step, inputs, B, C, h)
        _, states = _states(rates, step, inputs, B, h)
        return (C.unsqueeze(-2) @ states[1:]).squeeze(-2), states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y: Tensor, d_h: Tensor) -> tuple:
        rates, step, inputs, B, C, h = ctx.saved_tensors
        decays, states = _states(rates, step, inputs, B, h)
        grads = torch.cat([h.new_zeros(1, *h.shape), C.unsqueeze(-1) * d_y.unsqueeze(-2)])  # of states, once complete
        grads[-1] += d_h
        for t in range(len(step), 0, -1):
            grads[t - 1].addcmul_(decays[t - 1], grads[t])
        writes, d_C = grads[1:], (states[1:] @ d_y.unsqueeze(-1)).squeeze(-1)
        d_B, d_inputs = (writes @ inputs.unsqueeze(-1)).squeeze(-1), (B.unsqueeze(-2) @ writes).squeeze(-2)
        exponents = decays.mul_(writes).mul_(states[:-1])
        d_step, d_rates = (exponents * rates).sum(-2), (exponents * step.unsqueeze(-2)).sum((0, 1))
        return d_rates, d_step, d_inputs, d_B, d_C, grads[0]


def _states(rates: Tensor, step: Tensor, inputs: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decay of every step [c b n d], and the states before the first and after every step [1 + c b n d]."""
    decays = (step.unsqueeze(-2) * rates).exp_()
    states = torch.cat([h.unsqueeze(0), B.unsqueeze(-1) * inputs.unsqueeze(-2)])
    for t in range(len(step)):
        states[t + 1].addcmul_(decays[t], states[t])
    return decays, states
