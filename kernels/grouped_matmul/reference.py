import torch
from torch import Tensor


def grouped_matmul_reference(x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor]:
    """y_i = x_i W_e where offsets[e] <= i < offsets[e + 1], each row by itself.

    x [rows, k]; weight [experts, k, n]; offsets int [experts + 1], rising from 0 to rows; returns y [rows, n]
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = zip(x.to(wide).split(offsets.diff().tolist()), weight.to(wide).unbind(), strict=True)
    return (torch.cat([row @ w for rows, w in groups for row in rows.split(1)]).to(x.dtype),)
