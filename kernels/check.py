"""What every op asks of its arguments: shapes that fit, documents that cover the tokens, values within range."""

import math

import torch
from torch import Tensor

Sizes = dict[str, int]
Named = dict[str, tuple[Tensor | None, str]]  # argument -> (tensor, its axes by letter)


def shapes(named: Named) -> Sizes:
    """Size of every letter. Raises ValueError on the first tensor whose axes do not fit the ones before it."""
    sizes: Sizes = {}
    for name, (tensor, axes) in named.items():
        if tensor is None:
            continue
        letters = axes.split()
        want = [sizes.get(letter, size) for letter, size in zip(letters, tensor.shape, strict=False)]
        if tensor.dim() != len(letters) or list(tensor.shape) != want:
            known = ", ".join(f"{letter}={sizes[letter]}" for letter in letters if letter in sizes)
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but must be [{axes}], {known or 'of any size'}")
        sizes.update(zip(letters, tensor.shape, strict=True))
    return sizes


def state(state: Tensor | None, axes: str, sizes: Sizes, offsets: Tensor | None) -> None:
    """Raise ValueError unless `offsets` covers the tokens of one row, and `state` has a row for each."""
    rows = sizes["b"]
    if offsets is not None:
        if offsets.dim() != 1 or len(offsets) < 2 or offsets.is_floating_point():
            raise ValueError(f"offsets must be int [docs + 1], not {offsets.dtype} {list(offsets.shape)}")
        if rows != 1:
            raise ValueError(f"batch={rows} with offsets; flatten the batch to one row of {rows * sizes['t']} tokens")
        if _readable(offsets) and (offsets[0] != 0 or offsets[-1] != sizes["t"] or (offsets.diff() < 0).any()):
            raise ValueError(f"offsets={offsets.tolist()} must rise from 0 to time={sizes['t']}")
        rows = len(offsets) - 1
    want = [rows, *(sizes[letter] for letter in axes.split())]
    if state is not None and list(state.shape) != want:
        rows_are = "b" if offsets is None else "docs"
        raise ValueError(f"state has shape {list(state.shape)}, but must be [{rows_are} {axes}] = {want}")


def within(name: str, tensor: Tensor | None, low: float, high: float) -> None:
    """Raise ValueError on a value outside [low, high]; NaN passes, and so does what only a GPU sync could tell."""
    if tensor is None or not _readable(tensor):
        return
    if (low > -math.inf and (tensor < low).any()) or (high < math.inf and (tensor > high).any()):
        span = f"{tensor.min().item():.4g} to {tensor.max().item():.4g}"
        raise ValueError(f"{name} ranges over {span}, but must stay within {low:g} to {high:g}")


def _readable(tensor: Tensor) -> bool:
    return not (tensor.is_cuda or tensor.is_meta or torch.compiler.is_compiling())
