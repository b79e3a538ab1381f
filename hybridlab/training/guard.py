"""Which steps are safe to take: finite ones that are no spike. What it remembers is finite and healthy only."""

import math
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn

WINDOW, PATIENCE = 128, 5


class Guard:
    """Judges a step by its loss and gradient norm before the optimizer moves.

    sigmas   skip what lies so many deviations above the last healthy steps; None: skip only what is not finite.
             After five spikes in a row the window starts afresh: the level has moved.
    """

    def __init__(self, sigmas: float | None):
        self.sigmas = sigmas
        self.recent: list[list[float]] = [[], []]  # losses and gradient norms of healthy steps
        self.bad = self.spikes = self.skipped = 0

    def judge(self, loss: float, norm: float, others: float = 0.0) -> str:
        """-> "ok", "spike" or "non-finite" (`others`: whatever else has to be finite)."""
        if not all(map(math.isfinite, (loss, norm, others))):
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
            return "non-finite"
        self.bad = 0
        if self.spikes < PATIENCE and any(map(self._far_above, self.recent, (loss, norm))):
            self.spikes, self.skipped = self.spikes + 1, self.skipped + 1
            return "spike"
        known = self.recent if self.spikes < PATIENCE else [[], []]
        self.recent = [[*series, value][-WINDOW:] for series, value in zip(known, (loss, norm), strict=True)]
        self.spikes = 0
        return "ok"

    def _far_above(self, series: list[float], value: float) -> bool:
        if self.sigmas is None or len(series) < WINDOW // 2:
            return False
        mean = fmean(series)
        # the floor keeps a plateau, whose spread goes to nothing, from calling every ripple a spike
        return value > mean + self.sigmas * max(pstdev(series, mean), 0.02 * abs(mean))

    def state_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "sigmas"}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


@torch.no_grad()
def first_bad(model: nn.Module, tokens: Tensor, packing) -> str:
    """Where non-finite values come from: a parameter, else the first module whose output has one, else a gradient."""

    def bad(x: object) -> bool:
        if isinstance(x, tuple | list):
            return any(map(bad, x))
        return isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all())

    for name, p in model.named_parameters():
        if bad(p):
            return f"parameter {name}"
    found: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: found.append(name) if bad(out) else None)
    model(tokens, packing)  # the run ends here, so the hooks may stay
    grads = [name for name, p in model.named_parameters() if p.grad is not None and bad(p.grad)]
    if found:
        return f"output of module {found[0] or 'the model itself'}"
    return f"gradient of {grads[-1]}" if grads else "the loss (every parameter, output and gradient is finite)"
