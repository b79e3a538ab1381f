"""Learning rates over time, as pure functions of the step: nothing to save, nothing that a resume could lose."""

import math
from dataclasses import asdict, dataclass
from typing import Literal


class Schedule:
    """`factor(step, total)`: the multiple of the learning rate in step 0 … total - 1."""

    def __post_init__(self) -> None:
        ratios = {k: v for k, v in asdict(self).items() if k != "shape"}  # type: ignore[call-overload]
        ratios["warmup_ratio + decay_ratio"] = ratios["warmup_ratio"] + ratios.get("decay_ratio", 0)
        for name, value in ratios.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: give a ratio from 0 to 1")
        if getattr(self, "shape", "linear") not in ("linear", "sqrt"):
            raise ValueError(f"shape={self.shape!r} is not one of ('linear', 'sqrt')")  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Rise over `warmup_ratio` of the steps, stay at 1, fall over the last `decay_ratio` to `final`.

    shape   linear, or sqrt: 1 - sqrt(x), which falls faster at first (Hägele et al. 2024)
    """

    warmup_ratio: float = 0.02
    decay_ratio: float = 0.3
    shape: Literal["linear", "sqrt"] = "linear"
    final: float = 0.0

    def factor(self, step: int, total: int) -> float:
        x = 1 - min(1.0, (total - step) / max(1.0, self.decay_ratio * total))
        fall = 1 - (x if self.shape == "linear" else math.sqrt(x))
        return _rise(step, self.warmup_ratio * total) * (self.final + (1 - self.final) * fall)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Rise over `warmup_ratio` of the steps, then half a cosine down to `final`."""

    warmup_ratio: float = 0.02
    final: float = 0.1

    def factor(self, step: int, total: int) -> float:
        warm = self.warmup_ratio * total
        x = min(1.0, max(0.0, step - warm) / max(1.0, total - warm))
        return _rise(step, warm) * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * x)))


def _rise(step: int, steps: float) -> float:
    return min(1.0, (step + 1) / max(1.0, steps))
