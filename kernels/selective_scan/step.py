import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlab.kernels.chunks import initial, one_token
from hybridlab.kernels.op import Case


def selective_scan_step(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, state=None, offsets=None,
    *, z=None, delta_bias=None, softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same result as the definition for one token per row, in few calls: small ones cost more than their work."""
    state = initial(state, x, offsets, *A.shape)
    wide, dtype = state.dtype, x.dtype
    x, delta = x.to(wide).squeeze(1), delta.to(wide).squeeze(1)
    step = delta if delta_bias is None else delta + delta_bias.to(wide)
    step = F.softplus(step) if softplus else step
    kept = (step[..., None] * A.to(wide)).exp() * state
    kept = torch.baddbmm(kept, (step * x)[..., None], B.to(wide))
    y = (kept @ C.to(wide).mT).squeeze(-1)
    y = y if D is None else y + D.to(wide) * x
    y = y if z is None else y * F.silu(z.to(wide).squeeze(1))
    return y.to(dtype).unsqueeze(1), kept


def refuses(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D=None, state=None, offsets=None,
    *, z=None, delta_bias=None, softplus: bool = False,
) -> str | None:  # fmt: skip
    """Why this is not one token per row."""
    return one_token(x, offsets)


def flops(case: Case) -> int:
    """(Δx)·B and h·C; Δ·A and decay · h are no matmuls."""
    return 4 * case["batch"] * case["d_model"] * case["n"]
