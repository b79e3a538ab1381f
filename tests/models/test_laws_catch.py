"""Mixers broken on purpose: the laws must notice every one of them."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hybridlab.models.mixer import TokenMixer
from hybridlab.packing import Packing
from hybridlab.testing.mixer_laws import MixerLaws

fp32 = torch.float32


class SumState(NamedTuple):
    total: Tensor  # [batch, d_model], float32 or wider


class Summing(TokenMixer):
    """A correct mixer, small enough to break in any way: y_t = out(sum over s ≤ t of 0.9^(t - s) x_s)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.d_model = d_model
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.decay = nn.Parameter(torch.empty(d_model))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.decay.fill_(0.9)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            packing.check(*x.shape[:2])
        starts = None if packing is None else packing.row_positions(x.shape[1]) == 0
        total, ys = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            total = total if starts is None else torch.where(starts[:, t, None], torch.zeros_like(total), total)
            total = total * self.decay.to(x.dtype) + x[:, t]
            ys.append(total)
        return self.out(torch.stack(ys, 1))

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SumState:
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        return SumState(torch.zeros(batch, self.d_model, device=device, dtype=wide))

    def step(self, x: Tensor, state: SumState) -> tuple[Tensor, SumState]:
        total = state.total * self.decay + x
        return self.out(total.to(x.dtype)), SumState(total)

    def flops(self, length: int) -> int:
        return (2 * self.d_model**2 + 2 * self.d_model) * length


class TestACorrectMixerPasses(MixerLaws):
    def build(self, d_model: int) -> TokenMixer:
        return Summing(d_model)

    def core_flops(self, length: int) -> int:
        return 2 * self.d_model * length


class LeaksTheFuture(Summing):
    def forward(self, x, packing=None):
        return super().forward(x, packing) + 1e-12 * x.flip(1)


class LeaksTheFutureInGradients(Summing):
    def forward(self, x, packing=None):
        later = x.mean(1, keepdim=True)
        return super().forward(x, packing) + (later - later.detach())


class IgnoresPacking(Summing):
    def forward(self, x, packing=None):
        return super().forward(x)


class IgnoresPackingInOneChannel(Summing):
    def forward(self, x, packing=None):
        y = super().forward(x, packing)
        return torch.cat([super().forward(x)[..., :1], y[..., 1:]], -1)


class AcceptsAnyPacking(Summing):
    def forward(self, x, packing=None):
        fits = packing is None or packing.tokens == x.shape[0] * x.shape[1]
        return super().forward(x, packing if fits else None)


class PrefillForgets(Summing):
    def prefill(self, x, state, packing=None):
        if packing is None and x.shape[1] > 1:
            state = self.init_state(len(x), 0, dtype=x.dtype)
        return super().prefill(x, state, packing)


class PrefillCutsGradients(Summing):
    def prefill(self, x, state, packing=None):
        y, state = super().prefill(x, state, packing)
        return y, SumState(state.total.detach())


class MixesUpRows(Summing):
    def _prefill_documents(self, x, state, packing):
        y, state = super()._prefill_documents(x, state, packing)
        return y, SumState(state.total.flip(0))


class StepDecaysTwice(Summing):
    def step(self, x, state):
        return super().step(x, SumState(state.total * self.decay))


class NarrowState(Summing):
    def init_state(self, batch, max_len, device=None, dtype=None):
        return SumState(torch.zeros(batch, self.d_model, device=device, dtype=dtype))


class OutgrowsItsState(Summing):
    def step(self, x, state):
        y, state = super().step(x, state)
        return y, SumState(state.total.double())


class WrongStateBytes(Summing):
    def state_bytes(self, max_len, dtype=torch.bfloat16):
        return super().state_bytes(max_len, dtype) // 2


class MixesTheBatch(Summing):
    def forward(self, x, packing=None):
        return super().forward(x, packing) + 1e-4 * x.mean(0)


class StashesOnTheModule(Summing):
    def step(self, x, state):
        last = self.__dict__.get("last", 0.0)
        self.__dict__["last"] = x
        return super().step(x + 0.1 * last, state)


class FlopsOfAnotherWidth(Summing):
    def flops(self, length):
        return self.d_model**2 * length


class FlopsForgetTheCore(Summing):
    def flops(self, length):
        return 2 * self.d_model**2 * length


class FlopsGrowWithTheStateConstant(Summing):
    def flops(self, length):
        return super().flops(length) + length**2


class ForgetsToReset(Summing):
    def reset_parameters(self):
        TokenMixer.reset_parameters(self)


class ComputesInInit(Summing):
    def __init__(self, d_model):
        super().__init__(d_model)
        self.register_buffer("scale", torch.linspace(1, 2, d_model))


class NarrowDecay(Summing):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class ReturnsFloat32(Summing):
    def forward(self, x, packing=None):
        return super().forward(x, packing).float()


class WrapsSilently(Summing):
    def init_state(self, batch, max_len, device=None, dtype=None):
        return (*super().init_state(batch, max_len, device, dtype), torch.zeros(batch, max_len, device=device))

    def step(self, x, state):
        if state[1].sum(1).max() >= state[1].shape[1]:
            state = self.init_state(len(x), state[1].shape[1])
        state[1][:, int(state[1][0].sum())] = 1
        y, new = super().step(x, SumState(state[0]))
        return y, (new.total, state[1])


class ReadsUnwrittenSlots(WrapsSilently):
    def init_state(self, batch, max_len, device=None, dtype=None):
        return (
            *SumState(Summing.init_state(self, batch, max_len, device, dtype).total),
            *[torch.zeros(batch, max_len)],
        )

    def step(self, x, state):
        y, new = Summing.step(self, x + state[1].sum(1, keepdim=True), SumState(state[0]))
        return y, (new.total, state[1])


ALONE = "packed_documents_equal_the_same_documents_alone"
ISOLATED = "a_change_in_one_document_changes_the_others_by_exactly_0"
BROKEN: dict[type[Summing], tuple[str, ...]] = {
    LeaksTheFuture: ("the_future_is_invisible",),
    LeaksTheFutureInGradients: ("the_future_is_invisible",),
    IgnoresPacking: (ALONE, ISOLATED, "what_does_not_fit_is_refused"),
    IgnoresPackingInOneChannel: (ALONE, ISOLATED),
    AcceptsAnyPacking: ("what_does_not_fit_is_refused",),
    PrefillForgets: ("prefill_split_anywhere_then_steps_equal_forward",),
    PrefillCutsGradients: ("gradients_flow_through_a_split_prefill",),
    MixesUpRows: ("packed_prefill_continues_each_row_of_the_state",),
    StepDecaysTwice: ("prefill_split_anywhere_then_steps_equal_forward",),
    NarrowState: ("what_is_summed_over_time_is_kept_in_float32_or_wider",),
    OutgrowsItsState: ("state_bytes_are_what_is_held",),
    WrongStateBytes: ("state_bytes_are_what_is_held",),
    MixesTheBatch: ("a_row_does_not_depend_on_the_batch_it_is_in",),
    StashesOnTheModule: ("sequences_stepped_in_turn_do_not_meet",),
    FlopsOfAnotherWidth: ("flops_count_every_projection",),
    FlopsForgetTheCore: ("flops_count_every_projection",),
    FlopsGrowWithTheStateConstant: ("a_step_costs_more_only_where_the_state_grows",),
    ForgetsToReset: ("a_module_built_on_meta_comes_to_life",),
    ComputesInInit: ("a_module_built_on_meta_comes_to_life",),
    NarrowDecay: ("bfloat16_narrows_matrices_and_no_parameter_of_a_module",),
    ReturnsFloat32: ("bfloat16_and_autocast_stay_close_to_float32",),
    WrapsSilently: ("beyond_max_len_the_mixer_is_right_or_refuses",),
    ReadsUnwrittenSlots: ("room_left_in_the_state_changes_nothing",),
}  # fmt: skip
CASES = [(mixer, law) for mixer, laws in BROKEN.items() for law in laws]


@pytest.mark.parametrize(("mixer", "law"), CASES, ids=[f"{mixer.__name__}-{law}" for mixer, law in CASES])
def test_a_broken_mixer_breaks_its_law(mixer: type[Summing], law: str) -> None:
    class Laws(TestACorrectMixerPasses):
        def build(self, d_model: int) -> TokenMixer:
            return mixer(d_model)

    run: Callable[..., None] = getattr(Laws(), f"test_{law}")
    needs_dtype = "dtype" in inspect.signature(run).parameters
    # pytest.raises inside a law fails by its own exception
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(fp32) if needs_dtype else run()


def test_every_law_is_caught_breaking_at_least_once() -> None:
    caught = {f"test_{law}" for _, law in CASES}
    assert caught == {name for name in dir(MixerLaws) if name.startswith("test_")}
