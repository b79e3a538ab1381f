"""Learning rates over time, as pure functions of the step: nothing to save, nothing that a resume could lose.

`factor(step, total)` is the multiple of the learning rate in step 0 … total - 1.
"""

import math
from dataclasses import dataclass

from hybridlab.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Settings):
    """Rise over `warmup_ratio` of the steps, stay at 1, fall in a line over the last `decay_ratio` to `final`."""

    warmup_ratio: float = 0.02
    decay_ratio: float = 0.3
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (both := self.warmup_ratio + self.decay_ratio) > 1:
            raise ValueError(f"warmup_ratio + decay_ratio={both}: give no more than 1 in all")

    def factor(self, step: int, total: int) -> float:
        left = min(1.0, (total - step) / max(1.0, self.decay_ratio * total))
        return _rise(step, self.warmup_ratio * total) * (self.final + (1 - self.final) * left)


@dataclass(frozen=True, kw_only=True)
class Cosine(Settings):
    """Rise over `warmup_ratio` of the steps, then half a cosine down to `final`."""

    warmup_ratio: float = 0.02
    final: float = 0.1

    def factor(self, step: int, total: int) -> float:
        warm = self.warmup_ratio * total
        x = min(1.0, max(0.0, step - warm) / max(1.0, total - warm))
        return _rise(step, warm) * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * x)))


def _rise(step: int, steps: float) -> float:
    return min(1.0, (step + 1) / max(1.0, steps))
