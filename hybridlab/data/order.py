"""Which row comes when: arithmetic on the seed and the position, with nothing to remember."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

UNBOUNDED = 2**62  # rows of a stream, which come as they come


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 [broadcast shape, at least one axis]: a hash of the parts, good enough to draw from."""
    h = np.zeros(1, np.uint64)
    for part in parts:
        h = (h ^ np.atleast_1d(np.asarray(part)).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        # the finaliser of SplitMix64; products wrap on purpose
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def order(seed: int, n_rows: int, positions: Tensor | Sequence[int]) -> Tensor:
    """Rows int64 [positions] at these places of endless training, where each n_rows places hold every row once.

    A Feistel network over the next power of four, walked until it falls below n_rows. UNBOUNDED rows stay in order.
    """
    place = torch.as_tensor(positions, dtype=torch.int64).numpy()
    if n_rows < 1 or place.min(initial=0) < 0:
        raise ValueError(f"n_rows={n_rows}, positions from {place.min(initial=0)}: there are no such rows")
    if n_rows == UNBOUNDED:
        return torch.from_numpy(place.copy())
    half = np.uint64(max(1, -(-(n_rows - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    key, row = mix(seed, place // n_rows), (place % n_rows).astype(np.uint64)
    walking = np.ones(row.shape, bool)
    while walking.any():
        left, right = row[walking] >> half, row[walking] & low
        for turn in range(6):
            left, right = right, left ^ (mix(key[walking] + np.uint64(turn), right) & low)
        row[walking] = (left << half) | right
        walking = row >= n_rows
    return torch.from_numpy(row.astype(np.int64))
