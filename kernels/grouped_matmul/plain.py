import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matmul_by_expert(x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor]:
    """Same result as the definition, one product per expert. Any dtype and size; reads the offsets on the host."""
    groups = x.split(offsets.diff().tolist())
    return (torch.cat([rows @ w for rows, w in zip(groups, weight.unbind(), strict=True)]),)


class _ContiguousGradient(torch.autograd.Function):
    """Identity; `grouped_mm` fails on the stride-0 gradient of a sum."""

    forward = staticmethod(lambda ctx, y: y.view_as(y))
    backward = staticmethod(lambda ctx, grad: grad.contiguous())


def grouped_matmul_torch(x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor]:
    """Same result as the definition, by torch's own grouped product; a GPU does not wait for the host."""
    # rows beyond the last offset would be uninitialised memory
    torch._assert_async(offsets[-1] == len(x), "offsets must end at the number of rows of x")
    y = F.grouped_mm(x.contiguous(), weight.contiguous(), offs=offsets[1:].to(torch.int32))
    return (_ContiguousGradient.apply(y),)


def refuses(x: Tensor, weight: Tensor, offsets: Tensor) -> str | None:
    """Why torch's grouped product cannot serve this call."""
    fast_only = x.is_cuda or torch.compiler.is_compiling()
    served = (torch.bfloat16,) if fast_only else (torch.bfloat16, torch.float32)
    if x.dtype not in served:
        return f"{x.dtype} is not among {served}, those served here"
    if unaligned := [size for size in weight.shape[1:] if size * x.element_size() % 16]:
        return f"rows of {unaligned} x {x.element_size()} bytes are no multiple of 16 bytes"
    return "no rows" if len(x) == 0 else None
