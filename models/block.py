"""One residual layer, and mixers side by side within one."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from hybridlab.models.ffn.base import NOTHING, Extras, FeedForward
from hybridlab.models.mixer import Device, Dtype, State, Stateful, TokenMixer
from hybridlab.models.parts.init import Module
from hybridlab.models.parts.norm import RMSNorm
from hybridlab.packing import Packing

MakeMixer = Callable[[int], TokenMixer]  # given d_model
MakeFeedForward = Callable[[int], FeedForward]
Norm = Literal["pre", "post", "output", "sandwich"]
Combine = Literal["sum", "mean", "normalised"]


class Residual(Module):
    """The residual stream around one sublayer f.

    pre       x + f(norm(x))
    post      norm(x + f(x))
    output    x + norm(f(x))             OLMo 2's reordered norm
    sandwich  x + norm(f(norm(x)))
    """

    def __init__(self, d_model: int, *, norm: Norm):
        super().__init__()
        self.norm_sum = norm == "post"
        self.before = RMSNorm(d_model) if norm in ("pre", "sandwich") else nn.Identity()
        self.after = RMSNorm(d_model) if norm != "pre" else nn.Identity()

    def forward(self, x: Tensor, f: Callable[[Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """x [..., d_model] -> x with what f adds, and what f returns beside it."""
        y, beside = f(self.before(x))
        return (self.after(x + y) if self.norm_sum else x + self.after(y)), beside


class Block(Stateful):
    """Mix along time, then transform each token; either sublayer may be left out, not both."""

    def __init__(
        self, d_model: int, *, mixer: MakeMixer | None = None, ffn: MakeFeedForward | None = None, norm: Norm = "pre"
    ):
        super().__init__()
        if mixer is None and ffn is None:
            raise ValueError("mixer=None and ffn=None: a block needs at least one of them")
        if norm not in get_args(Norm):
            raise ValueError(f"norm={norm!r} is not one of {get_args(Norm)}")
        self.d_model = d_model
        self.mixer = mixer(d_model) if mixer else None
        self.ffn = ffn(d_model) if ffn else None
        self.around_mixer, self.around_ffn = (Residual(d_model, norm=norm) if part else None for part in (mixer, ffn))

    def forward(self, x: Tensor, packing: Packing | None = None, tokens: Tensor | None = None) -> tuple[Tensor, Extras]:
        """x [batch, time, d_model], tokens int64 [batch, time] -> x, and what the feed-forward says beside it."""
        return self._run(lambda mixer, x: (mixer(x, packing), ()), x, tokens)[::2]

    def init_state(self, batch: int, max_len: int, device: Device = None, dtype: Dtype = None) -> State:
        """The mixer's state; empty where there is no mixer."""
        return () if self.mixer is None else self.mixer.init_state(batch, max_len, device, dtype)

    def prefill(
        self, x: Tensor, state: State, packing: Packing | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x [batch, time, d_model], as `TokenMixer.prefill`."""
        return self._run(lambda mixer, x: mixer.prefill(x, state, packing), x, tokens)[:2]

    def step(self, x: Tensor, state: State, tokens: Tensor | None = None) -> tuple[Tensor, State]:
        """x [batch, d_model], tokens int64 [batch], as `TokenMixer.step`."""
        return self._run(lambda mixer, x: mixer.step(x, state), x, tokens)[:2]

    def _run(self, mix: Callable[..., tuple[Tensor, State]], x: Tensor, tokens: Tensor | None):
        """`mix(mixer, x)` -> y, state; then x, state, extras."""
        state, extras = (), NOTHING
        if self.mixer is not None and self.around_mixer is not None:
            x, state = self.around_mixer(x, partial(mix, self.mixer))
        if self.ffn is not None and self.around_ffn is not None:
            x, extras = self.around_ffn(x, partial(self.ffn, tokens=tokens))
        return x, state, extras

    def output_weights(self) -> list[Tensor]:
        """The matrices that write into the residual stream."""
        return [w for part in (self.mixer, self.ffn) if part is not None for w in part.output_weights()]

    def flops(self, length: int) -> int:
        return sum(part.flops(length) for part in (self.mixer, self.ffn) if part is not None)


class Parallel(TokenMixer):
    """Several mixers on one input, their outputs combined.

    combine   "sum", "mean", or "normalised": the mean of rms(y_i) · weight_i (Hymba, arXiv 2411.13676, eq. 3)
    scales    a constant factor per mixer (Falcon-H1's multipliers); 1 where not named
    """

    def __init__(
        self, d_model: int, *, mixers: Mapping[str, MakeMixer], combine: Combine = "mean",
        scales: Mapping[str, float] | None = None,
    ):  # fmt: skip
        super().__init__()
        if len(mixers) < 2:
            raise ValueError(f"mixers={sorted(mixers)}: parallel mixers are at least two")
        if combine not in get_args(Combine):
            raise ValueError(f"combine={combine!r} is not one of {get_args(Combine)}")
        if unknown := sorted(set(scales or {}) - set(mixers)):
            raise ValueError(f"scales names {unknown}, but mixers defines {sorted(mixers)}")
        self.d_model, self.combine = d_model, combine
        self.scales = [float((scales or {}).get(name, 1.0)) for name in mixers]
        self.mixers = nn.ModuleDict({name: build(d_model) for name, build in mixers.items()})
        norm = RMSNorm if combine == "normalised" else nn.Identity
        self.norms = nn.ModuleList(norm(d_model) for _ in mixers)

    def _each(self) -> list[TokenMixer]:
        return cast(list[TokenMixer], list(self.mixers.values()))

    def _combine(self, ys: Sequence[Tensor]) -> Tensor:
        total = reduce(torch.add, (c * norm(y) for c, norm, y in zip(self.scales, self.norms, ys, strict=True)))
        return total if self.combine == "sum" else total / len(ys)

    def _advance(self, state: State, advance: Callable[[TokenMixer, State], tuple[Tensor, State]]):
        ys, states = zip(*map(advance, self._each(), state), strict=True)
        return self._combine(ys), states

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return self._combine([mixer(x, packing) for mixer in self._each()])

    def init_state(self, batch: int, max_len: int, device: Device = None, dtype: Dtype = None) -> State:
        return tuple(mixer.init_state(batch, max_len, device, dtype) for mixer in self._each())

    def prefill(self, x: Tensor, state: State, packing: Packing | None = None) -> tuple[Tensor, State]:
        return self._advance(state, lambda mixer, s: mixer.prefill(x, s, packing))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._advance(state, lambda mixer, s: mixer.step(x, s))

    def output_weights(self) -> list[Tensor]:
        return [w for mixer in self._each() for w in mixer.output_weights()]

    def flops(self, length: int) -> int:
        return sum(mixer.flops(length) for mixer in self._each())
