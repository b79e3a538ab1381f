"""One residual layer, and mixers side by side within one."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hybridlab.models.ffn.base import NOTHING, Extras, FeedForward
from hybridlab.models.mixer import State, TokenMixer
from hybridlab.models.parts.init import Module
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing

NORMS = ("pre", "post", "output", "sandwich")


class Residual(Module):
    """The residual stream around one sublayer f.

    pre       x + f(norm(x))
    post      norm(x + f(x))
    output    x + norm(f(x))             OLMo 2's reordered norm
    sandwich  x + norm(f(norm(x)))
    """

    def __init__(self, d_model: int, *, norm: str):
        super().__init__()
        self.norm_sum = norm == "post"
        self.before = RMSNorm(d_model) if norm in ("pre", "sandwich") else None
        self.after = RMSNorm(d_model) if norm != "pre" else None

    def enter(self, x: Tensor) -> Tensor:
        return x if self.before is None else self.before(x)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        if self.after is None:
            return x + y
        return self.after(x + y) if self.norm_sum else x + self.after(y)


class Block(Module):
    """Mix along time, then transform each token; either sublayer may be left out, not both."""

    def __init__(
        self,
        d_model: int,
        *,
        mixer: Callable[[int], TokenMixer] | None = None,
        ffn: Callable[[int], FeedForward] | None = None,
        norm: Literal["pre", "post", "output", "sandwich"] = "pre",
    ):
        super().__init__()
        if mixer is None and ffn is None:
            raise ValueError("mixer=None and ffn=None: a block needs at least one of them")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r} is not one of {NORMS}")
        self.d_model = d_model
        self.mixer = mixer(d_model) if mixer else None
        self.ffn = ffn(d_model) if ffn else None
        self.around_mixer = Residual(d_model, norm=norm) if mixer else None
        self.around_ffn = Residual(d_model, norm=norm) if ffn else None

    def forward(self, x: Tensor, packing: Packing | None = None, tokens: Tensor | None = None) -> tuple[Tensor, Extras]:
        """x [batch, time, d_model], tokens int64 [batch, time] -> x, and what the feed-forward says beside it."""
        if self.mixer is not None:
            x = self.around_mixer.leave(x, self.mixer(self.around_mixer.enter(x), packing))
        return self._transform(x, tokens)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The mixer's state; empty where there is no mixer."""
        return () if self.mixer is None else self.mixer.init_state(batch, max_len, device, dtype)

    def prefill(
        self, x: Tensor, state: State, packing: Packing | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [batch, time, d_model], as `TokenMixer.prefill`."""
        if self.mixer is not None:
            y, state = self.mixer.prefill(self.around_mixer.enter(x), state, packing)
            x = self.around_mixer.leave(x, y)
        return self._transform(x, tokens)[0], state

    def step(self, x: Tensor, state: State, tokens: Tensor | None = None) -> tuple[Tensor, State]:
        """x [batch, d_model], tokens int64 [batch], as `TokenMixer.step`."""
        if self.mixer is not None:
            y, state = self.mixer.step(self.around_mixer.enter(x), state)
            x = self.around_mixer.leave(x, y)
        return self._transform(x, tokens)[0], state

    def _transform(self, x: Tensor, tokens: Tensor | None) -> tuple[Tensor, Extras]:
        if self.ffn is None:
            return x, NOTHING
        y, extras = self.ffn(self.around_ffn.enter(x), tokens)
        return self.around_ffn.leave(x, y), extras

    def output_weights(self) -> list[nn.Parameter]:
        """The matrices that write into the residual stream."""
        return [w for part in (self.mixer, self.ffn) if part is not None for w in part.output_weights()]

    def flops(self, length: int) -> int:
        return sum(part.flops(length) for part in (self.mixer, self.ffn) if part is not None)

    def state_bytes(self, max_len: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return 0 if self.mixer is None else self.mixer.state_bytes(max_len, dtype)


class Parallel(TokenMixer):
    """Several mixers on one input, their outputs combined.

    combine   "sum", "mean", or "normalised": the mean of rms(y_i) · weight_i (Hymba, arXiv 2411.13676, eq. 3)
    scales    a constant factor per mixer (Falcon-H1's multipliers); 1 where not named
    """

    def __init__(
        self,
        d_model: int,
        *,
        mixers: Mapping[str, Callable[[int], TokenMixer]],
        combine: Literal["sum", "mean", "normalised"] = "mean",
        scales: Mapping[str, float] | None = None,
    ):
        super().__init__()
        if len(mixers) < 2:
            raise ValueError(f"mixers={sorted(mixers)}: parallel mixers are at least two")
        if combine not in ("sum", "mean", "normalised"):
            raise ValueError(f"combine={combine!r} is not one of ('sum', 'mean', 'normalised')")
        if unknown := sorted(set(scales or {}) - set(mixers)):
            raise ValueError(f"scales names {unknown}, but mixers defines {sorted(mixers)}")
        self.d_model, self.combine = d_model, combine
        self.scales = [float((scales or {}).get(name, 1.0)) for name in mixers]
        self.mixers = nn.ModuleDict({name: build(d_model) for name, build in mixers.items()})
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in mixers) if combine == "normalised" else None

    def _combine(self, ys: list[Tensor]) -> Tensor:
        if self.norms is not None:
            ys = [norm(y) for norm, y in zip(self.norms, ys, strict=True)]
        total = sum(scale * y for scale, y in zip(self.scales, ys, strict=True))
        return total if self.combine == "sum" else total / len(ys)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return self._combine([mixer(x, packing) for mixer in self.mixers.values()])

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return tuple(mixer.init_state(batch, max_len, device, dtype) for mixer in self.mixers.values())

    def prefill(self, x: Tensor, state: State, packing: Packing | None = None) -> tuple[Tensor, State]:
        pairs = [mixer.prefill(x, s, packing) for mixer, s in zip(self.mixers.values(), state, strict=True)]
        return self._combine([y for y, _ in pairs]), tuple(s for _, s in pairs)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        pairs = [mixer.step(x, s) for mixer, s in zip(self.mixers.values(), state, strict=True)]
        return self._combine([y for y, _ in pairs]), tuple(s for _, s in pairs)

    def output_weights(self) -> list[nn.Parameter]:
        return [w for mixer in self.mixers.values() for w in mixer.output_weights()]

    def flops(self, length: int) -> int:
        return sum(mixer.flops(length) for mixer in self.mixers.values())
