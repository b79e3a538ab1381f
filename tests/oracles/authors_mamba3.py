"""The authors' Mamba-3 layer on a CPU: its own class and torch references, in place of its kernels."""

import math
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from peers import SEED, Args, Draw, lift
from torch import nn


def mamba3(folder: Path, output_norm: bool) -> tuple[Args, dict[str, str]]:
    """The authors' Mamba3, stepped token by token with the torch versions that stand beside its kernels."""
    torch.manual_seed(SEED)
    root, known = folder / "mamba_ssm", {"torch": torch, "F": F, "nn": nn, "math": math, "rearrange": rearrange}
    known |= {"Optional": Optional, "repeat": repeat, "mamba3_mimo_combined": None}
    norm = lift(root / "ops/triton/layernorm_gated.py", known, "rms_norm_ref")[0]
    turn = lift(root / "ops/triton/mamba3/mamba3_mimo_rotary_step.py", known, "apply_rotary_qk_inference_reference")[0]
    update = lift(root / "ops/cute/mamba3/mamba3_step_fn.py", known, "selective_state_update_fused_ref_v2")[0]

    class RMSNormGated(nn.Module):
        def __init__(self, dim, eps, norm_before_gate=True, group_size=None, device=None, dtype=None):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
            self.options = {"eps": eps, "norm_before_gate": norm_before_gate, "group_size": group_size}

        def forward(self, x, z=None):
            return norm(x, self.weight, None, z, **self.options)

    def rotate(q, k, angle_state, angle_proj, dt, bias_q, bias_k, conjugate, inplace, rotate_pairwise):
        return turn(q, k, angle_state.clone(), angle_proj, dt, bias_q, bias_k, conjugate, rotate_pairwise)

    def step(state, k, v, A, B, C, D, x, dt, trap, xproj, *, outproj, state_out, out, z, zproj, tile_D, num_warps):
        held = (part.clone() for part in (state, k, v))  # the layer overwrites them, and autograd must not notice
        old, k, v = held
        y, new = update(old, A, B, C, xproj, x, zproj, z, dt, k, v, trap, D, outproj, torch.float64)
        out.copy_(y), state.copy_(new)

    known |= {"RMSNormGated": RMSNormGated, "apply_rotary_qk_inference_fwd": rotate, "mamba3_step_fn": step}
    layer = lift(root / "modules/mamba3.py", known, "Mamba3")[0](
        8, d_state=8, expand=2, headdim=4, is_outproj_norm=output_norm
    ).double()
    draw = Draw(f"mamba3{output_norm}", time=19)
    for p in layer.parameters():
        p.detach().add_(0.3 * draw.normal(*p.shape))
    x, up, ys = draw.tokens(8).requires_grad_(), draw.tokens(8), []
    state = [torch.zeros(2, *shape).double() for shape in ((4, 2), (4, 4, 8), (1, 4, 8), (4, 4))]
    for token in x.unbind(1):
        y, *state = layer.step(token, *(part.clone() for part in state))
        ys.append(y)
    y = torch.stack(ys, 1)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(y, [x, *named.values()], up)
    tensors = {"x": x, "up": up, "y": y} | {f"layer.{name}": p for name, p in named.items()}
    tensors |= {f"grad.{name}": g for name, g in zip(["x", *named], grads, strict=True)}
    return tensors, {"peer": "mamba-ssm mamba_ssm/modules/mamba3.py Mamba3.step"}
