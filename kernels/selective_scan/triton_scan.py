"""The selective scan in Triton, as an operator that torch can compile and differentiate once."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hybridlab.kernels.chunks import initial
from hybridlab.kernels.selective_scan import triton_backward, triton_forward
from hybridlab.kernels.selective_scan.triton_forward import rates

CANDIDATES = {
    "forward": [
        dict(BN=4, BD=32, num_warps=4), dict(BN=4, BD=32, num_warps=4, maxnreg=128), dict(BN=2, BD=32, num_warps=2),
        dict(BN=4, BD=32, num_warps=2), dict(BN=4, BD=64, num_warps=8), dict(BN=8, BD=32, num_warps=8),
    ],
    "backward": [
        dict(BN=2, BD=64, num_warps=4), dict(BN=2, BD=128, num_warps=8), dict(BN=4, BD=64, num_warps=8),
        dict(BN=1, BD=128, num_warps=4), dict(BN=4, BD=32, num_warps=4), dict(BN=1, BD=64, num_warps=2),
    ],
}  # fmt: skip
KEPT = 16  # up to so many states per channel, those before each tile are kept for the backward, else computed again


def selective_scan_triton(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, state=None, offsets=None,
    *, z=None, delta_bias=None, softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same result as the definition; float32 inside, at most 256 states per channel. Differentiable once."""
    state = initial(state, x, offsets, *A.shape)
    given = (v for v in (x, delta, A, B, C, D, state, z, delta_bias) if v is not None)
    keep = torch.is_grad_enabled() and A.shape[1] <= KEPT and any(v.requires_grad for v in given)
    return _scan(x, delta, A, B, C, D, state, offsets, z, delta_bias, softplus, keep)[:2]


def _ready(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in tensors]


@torch.library.custom_op("hybridlab::selective_scan_triton", mutates_args=())
def _scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, offsets: Tensor | None,
    z: Tensor | None, bias: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, state, states before each tile [tiles, state, d_model] (none unless kept)"""
    if not x.numel() or not state.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format), state.clone(), state.new_empty(0)
    x, delta, enter = x.contiguous(), delta.contiguous(), state.mT.contiguous()
    D, z, bias = _ready(D, z, bias)
    y, leave, slots = triton_forward.forward(
        x, delta, rates(A), B.float().contiguous(), C.float().contiguous(), D, enter, offsets, z, bias, softplus, keep
    )
    return y.to(x.dtype), leave.mT.contiguous(), slots


@_scan.register_fake
def _(x, delta, A, B, C, D, state, offsets, z, bias, softplus, keep):
    slots = state.new_empty(0)
    if keep and x.numel() and state.numel():
        slots = state.new_empty(triton_forward.n_tiles(x, offsets), *A.mT.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format), state.new_empty(state.shape), slots


@torch.library.custom_op("hybridlab::selective_scan_triton_backward", mutates_args=())
def _scan_backward(
    d_y: Tensor, d_state: Tensor, slots: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, state: Tensor, offsets: Tensor | None, z: Tensor | None, bias: Tensor | None, softplus: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, state, and of D, z, bias where given."""
    inputs = [v for v in (x, delta, A, B, C, state, D, z, bias) if v is not None]
    if not x.numel() or not state.numel():
        return [d_state.clone() if v is state else v.new_zeros(v.shape) for v in inputs]
    d_y, x, delta, enter = (v.contiguous() for v in (d_y, x, delta, state.mT))
    D, z, bias = _ready(D, z, bias)
    wide = (rates(A), B.float().contiguous(), C.float().contiguous())
    d_leave = d_state.mT.contiguous()
    got = triton_backward.backward(d_y, d_leave, x, delta, *wide, D, enter, offsets, z, bias, softplus, slots)
    dB, dC = got["dB"].view(B.shape).to(B.dtype), got["dC"].view(C.shape).to(C.dtype)
    grads = [got["dx"].to(x.dtype), got["d_delta"].to(delta.dtype), got["dA"].mT.to(A.dtype).contiguous(), dB, dC]
    grads.append(got["d_enter"].mT.contiguous())
    options = ((D, got["dD"]), (z, got["dz"]), (bias, got["d_bias"]))
    return grads + [g.to(v.dtype) for v, g in options if v is not None]


@_scan_backward.register_fake
def _(d_y, d_state, slots, x, delta, A, B, C, D, state, offsets, z, bias, softplus):
    return [v.new_empty(v.shape) for v in (x, delta, A, B, C, state, D, z, bias) if v is not None]


def _save(ctx, inputs, output) -> None:
    x, delta, A, B, C, D, state, offsets, z, bias, ctx.softplus, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, delta, A, B, C, D, state, offsets, z, bias, output[2])


def _gradients(ctx, d_y: Tensor | None, d_state: Tensor | None, _: Tensor | None) -> tuple:
    x, delta, A, B, C, D, state, offsets, z, bias, slots = ctx.saved_tensors
    d_y = torch.zeros_like(x) if d_y is None else d_y
    d_state = torch.zeros_like(state) if d_state is None else d_state
    grads = iter(_scan_backward(d_y, d_state, slots, x, delta, A, B, C, D, state, offsets, z, bias, ctx.softplus))
    first = [next(grads) for _ in range(5)]
    d_enter = next(grads)
    dD, dz, d_bias = (None if v is None else next(grads) for v in (D, z, bias))
    return *first, dD, d_enter, None, dz, d_bias, None, None


_scan.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.hybridlab.selective_scan_triton)
def _flops(*shapes, out_shape=None, **kwargs) -> int:
    return 0  # no matmuls


@register_flop_formula(torch.ops.hybridlab.selective_scan_triton_backward)
def _backward_flops(*shapes, out_shape=None, **kwargs) -> int:
    return 0
