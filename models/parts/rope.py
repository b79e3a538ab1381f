"""Rotary position embedding, and the positions it reads."""

import torch
from einops import rearrange
from torch import Tensor

from hybridlab.models.mixer import wide
from hybridlab.packing import Packing


def rotate(x: Tensor, positions: Tensor, *, dims: int | None = None, theta: float = 10000.0) -> Tensor:
    """Turn pairs of channels by an angle that grows with position, so that q · k depends on distance only.

    Channels i and i + dims / 2 form a pair and turn by position · theta^(-2i / dims) (Su et al. 2021, section 3.2.2).

    x          [batch, time, heads, dim]
    positions  int64 [batch or 1, time]
    dims       leading channels that turn, an even number; None turns all, 0 none
    """
    dims = check_dims(dims, x.shape[-1])
    if dims == 0:
        return x
    exponents = torch.arange(0, dims, 2, device=x.device, dtype=wide(x.dtype)) / dims
    return turn(x, rearrange(positions, "b t -> b t 1 1") * theta**-exponents)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Turn channels i and i + n of x [batch, time, heads, dim], a pair, by angles [batch, time, heads or 1, n]."""
    n = angles.shape[-1]
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.split([n, n, x.shape[-1] - 2 * n], -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], -1)


def check_dims(dims: int | None, head_dim: int) -> int:
    """How many channels turn. Raises ValueError where they cannot be paired."""
    dims = head_dim if dims is None else dims
    if dims % 2 or not 0 <= dims <= head_dim:
        raise ValueError(f"rope_dims={dims} of head_dim={head_dim} channels: give an even number, at most head_dim")
    return dims


def positions(x: Tensor, length: Tensor | None = None, packing: Packing | None = None) -> Tensor:
    """int64 [batch or 1, time]: index of each token of x [batch, time, ...] in its own document.

    length   int64 [rows], tokens already seen by each row of a state; with `packing`, document i continues row i
    """
    if packing is not None:
        index = packing.row_positions(x.shape[1])
        return index if length is None else index + length[packing.row_ids(x.shape[1])]
    index = torch.arange(x.shape[1], device=x.device)[None]
    return index if length is None else index + length[:, None]
