"""The laws of a token mixer as a test class: subclass it, say how to build the mixer, and pytest runs them all."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.models.mixer import State, TokenMixer, map_state, state_tensors
from hybridlab.packing import Packing
from hybridlab.testing.laws import ModuleLaws, distance

Run = Callable[[Tensor], Tensor]
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


def random_packing(batch: int, time: int, generator: torch.Generator, docs: int = 4) -> Packing:
    """Up to `docs` documents per row, cut anywhere, some of them empty."""
    cuts = torch.randint(0, time + 1, (batch, docs - 1), generator=generator).sort(1).values
    edges = torch.cat([cuts.new_zeros(batch, 1), cuts, cuts.new_full((batch, 1), time)], 1)
    return Packing.from_lengths(edges.diff(dim=1).flatten().tolist())


def _each_alone(mixer: TokenMixer, lengths: list[int], x: Tensor) -> Tensor:
    return torch.cat([mixer(doc[None])[0] for doc in x.flatten(0, 1).split(lengths)]).view_as(x)


class MixerLaws(ModuleLaws):
    """Sizes and tolerances are class attributes; a subclass may set its own.

    tolerance    relative error allowed between forward, prefill and steps, and in all gradients
    isolated     relative error allowed between packed documents and the same documents alone, and between batch sizes
    low          relative error allowed between bfloat16 and float32
    core_flops   length -> FLOPs beside the `nn.Linear` layers, where a subclass gives it: then `flops` must be exact
    """

    d_model, batch, time, n_packings = 32, 2, 37, 2
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}
    isolated = {torch.float64: 1e-12, torch.float32: 1e-6}
    low = 0.05

    @abstractmethod
    def build(self, d_model: int) -> TokenMixer:
        """The mixer that the laws are about."""

    def fresh(self) -> TokenMixer:
        return self.build(self.d_model)

    def core_flops(self, length: int) -> int | None:
        return None

    def _mixer(self, dtype: torch.dtype = torch.float32) -> TokenMixer:
        torch.manual_seed(0)
        mixer = self.build(self.d_model).to(dtype)
        for p in mixer.parameters():  # what starts at zero or one would hide a part that is left out
            p.detach().add_(0.1 * torch.randn_like(p))
        return mixer

    def _x(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        return torch.randn(*shape, self.d_model, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    def _run(self, mixer: TokenMixer, x: Tensor, state: State, cuts: Sequence[int]) -> tuple[Tensor, State]:
        """Prefill up to each cut, then step through the rest."""
        ys = []
        for start, stop in zip([0, *cuts], cuts, strict=False):
            y, state = mixer.prefill(x[:, start:stop], state)
            ys.append(y)
        y, state = TokenMixer.prefill(mixer, x[:, cuts[-1] if cuts else 0 :], state)
        return torch.cat([*ys, y], 1), state

    def _grads(self, mixer: TokenMixer, x: Tensor, run: Run, seen: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """run(x), and gradients of x and all parameters under a random loss on the outputs at `seen` [batch, time]."""
        x = x.clone().requires_grad_()
        y, upstream = run(x), self._x(*x.shape[:2], dtype=x.dtype, seed=2)
        upstream = upstream if seen is None else upstream * seen[..., None]
        grads = torch.autograd.grad(y, [x, *mixer.parameters()], upstream, materialize_grads=True)
        return y.detach(), list(grads)

    def _check_blind(self, mixer: TokenMixer, x: Tensor, packing: Packing | None, hidden: Tensor, kept: Tensor) -> None:
        """Changing tokens at `hidden` changes nothing at `kept`: outputs, and gradients of a loss on them, bitwise."""
        changed = torch.where(hidden[..., None], self._x(*x.shape[:2], dtype=x.dtype, seed=3), x)
        run = partial(mixer, packing=packing)
        (y, grads), (y2, grads2) = (self._grads(mixer, each, run, kept) for each in (x, changed))
        assert torch.equal(y[kept], y2[kept]), "outputs changed"
        assert grads[0][hidden].abs().sum() == 0, "gradients reach tokens that must be invisible"
        assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True)), "gradients changed"

    def _check_equal(self, mixer: TokenMixer, x: Tensor, run: Run, definition: Run, allowed: float, case: str) -> None:
        """Both runs give the same outputs, within `allowed`, and the same gradients, within `tolerance`."""
        (y, grads), (want, want_grads) = (self._grads(mixer, x, each) for each in (run, definition))
        assert distance(y, want) <= allowed, case
        assert max(map(distance, grads, want_grads)) <= self.tolerance[x.dtype], f"gradients, {case}"

    @in_both_precisions
    def test_the_future_is_invisible(self, dtype: torch.dtype) -> None:
        mixer, index = self._mixer(dtype), torch.arange(self.time).expand(self.batch, -1)
        packing = random_packing(self.batch, self.time, torch.Generator().manual_seed(0))
        for documents in (None, packing):
            for t in (1, self.time // 2 + 1):
                self._check_blind(mixer, self._x(self.batch, self.time, dtype=dtype), documents, index >= t, index < t)

    @in_both_precisions
    def test_prefill_split_anywhere_then_steps_equal_forward(self, dtype: torch.dtype) -> None:
        mixer, x, n = self._mixer(dtype), self._x(self.batch, self.time, dtype=dtype), self.time
        want = mixer(x)
        for cuts in ([], [0, 1, 4], [n // 2, n // 2, n - 1], [n]):
            with torch.no_grad():
                got, _ = self._run(mixer, x, mixer.init_state(len(x), n, dtype=dtype), cuts)
            assert distance(got, want) <= self.tolerance[dtype], f"cuts={cuts}"

    @in_both_precisions
    def test_gradients_flow_through_a_split_prefill(self, dtype: torch.dtype) -> None:
        mixer, x, cuts = self._mixer(dtype), self._x(self.batch, self.time, dtype=dtype), [self.time // 2, self.time]
        run = lambda x: self._run(mixer, x, mixer.init_state(len(x), self.time, dtype=dtype), cuts)[0]  # noqa: E731
        self._check_equal(mixer, x, run, mixer, self.tolerance[dtype], "prefill in two")

    @in_both_precisions
    def test_packed_prefill_continues_each_row_of_the_state(self, dtype: torch.dtype) -> None:
        mixer, rounds = self._mixer(dtype), [[5, 0, 9, 3], [0, 4, 21, 1], [0, 0, 0, 2]]
        totals = [sum(lengths) for lengths in zip(*rounds, strict=True)]
        docs = [self._x(1, n + 1, dtype=dtype, seed=i) for i, n in enumerate(totals)]
        pieces = [doc.split([*lengths, 1], 1) for doc, *lengths in zip(docs, *rounds, strict=True)]
        ys: list[Sequence[Tensor]] = []
        state = mixer.init_state(4, self.time, dtype=dtype)
        with torch.no_grad():
            for lengths, parts in zip(rounds, zip(*pieces, strict=True), strict=False):
                y, state = mixer.prefill(torch.cat(parts, 1), state, Packing.from_lengths(lengths))
                ys.append(y.split(lengths, 1))
            last, _ = mixer.step(torch.cat([d[:, -1] for d in docs]), state)
            for i, doc in enumerate(docs):
                got = torch.cat([*(y[i] for y in ys), last[i : i + 1, None]], 1)
                assert distance(got, mixer(doc)) <= self.tolerance[dtype], f"document {i}"

    @in_both_precisions
    def test_packed_documents_equal_the_same_documents_alone(self, dtype: torch.dtype) -> None:
        mixer, x = self._mixer(dtype), self._x(self.batch, self.time, dtype=dtype)
        for seed in range(self.n_packings):
            packing = random_packing(self.batch, self.time, torch.Generator().manual_seed(seed))
            lengths = [n for n in packing.offsets.diff().tolist() if n]
            alone = partial(_each_alone, mixer, lengths)
            run = partial(mixer, packing=packing)
            self._check_equal(mixer, x, run, alone, self.isolated[dtype], f"documents of {lengths}")

    @in_both_precisions
    def test_a_change_in_one_document_changes_the_others_by_exactly_0(self, dtype: torch.dtype) -> None:
        mixer, x = self._mixer(dtype), self._x(self.batch, self.time, dtype=dtype)
        for seed in range(self.n_packings):
            packing = random_packing(self.batch, self.time, torch.Generator().manual_seed(seed))
            ids = packing.row_ids(self.time)
            hidden = ids == ids.flatten()[seed * 7 % ids.numel()]
            self._check_blind(mixer, x, packing, hidden, ~hidden)

    @in_both_precisions
    def test_a_row_does_not_depend_on_the_batch_it_is_in(self, dtype: torch.dtype) -> None:
        mixer, x = self._mixer(dtype), self._x(8, self.time, dtype=dtype)
        assert distance(mixer(x[2:3]), mixer(x)[2:3]) <= self.isolated[dtype]

    @torch.no_grad()
    def test_sequences_stepped_in_turn_do_not_meet(self) -> None:
        mixer, xs = self._mixer(), [self._x(1, 6), self._x(1, 6, seed=5)]
        states, ys = [mixer.init_state(1, 6) for _ in xs], [x[:, :0] for x in xs]
        for t in range(6):
            for i, x in enumerate(xs):
                y, states[i] = mixer.step(x[:, t], states[i])
                ys[i] = torch.cat([ys[i], y[:, None]], 1)
        assert all(distance(y, mixer(x)) <= self.tolerance[torch.float32] for x, y in zip(xs, ys, strict=True))

    @torch.no_grad()
    def test_room_left_in_the_state_changes_nothing(self) -> None:
        mixer, x = self._mixer(), self._x(self.batch, self.time)
        state, tiny = mixer.init_state(self.batch, 3 * self.time), mixer.init_state(self.batch, 1)
        state = map_state(lambda t, other: t if t.shape == other.shape else torch.full_like(t, 1e3), state, tiny)
        got, _ = self._run(mixer, x, state, [self.time // 2])
        assert distance(got, mixer(x)) <= self.tolerance[torch.float32]

    @torch.no_grad()
    def test_beyond_max_len_the_mixer_is_right_or_refuses(self) -> None:
        mixer, x = self._mixer(), self._x(self.batch, 12)
        for cuts in ([], [12], [6, 12]):
            try:
                got, _ = self._run(mixer, x, mixer.init_state(self.batch, 8), cuts)
            except ValueError:
                continue
            assert distance(got, mixer(x)) <= self.tolerance[torch.float32], f"cuts={cuts}"

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_state_bytes_are_what_is_held(self, dtype: torch.dtype) -> None:
        mixer, x = self._mixer(dtype), self._x(self.batch, self.time).to(dtype)
        state = mixer.init_state(self.batch, self.time, dtype=dtype)
        _, after = self._run(mixer, x, state, [self.time - 2])
        for held in (mixer.init_state(self.batch, self.time, dtype=dtype), after):
            assert sum(t.nbytes for t in state_tensors(held)) == self.batch * mixer.state_bytes(self.time, dtype)

    def test_what_is_summed_over_time_is_kept_in_float32_or_wider(self) -> None:
        mixer = self._mixer(torch.bfloat16)
        states = (mixer.init_state(1, max_len, "meta", torch.bfloat16) for max_len in (1, 4096))
        for short, long in zip(*map(state_tensors, states), strict=True):
            narrow = long.is_floating_point() and long.dtype.itemsize < 4
            assert short.shape != long.shape or not narrow, f"{long.dtype} {list(long.shape)} holds no tokens"

    def test_a_step_costs_more_only_where_the_state_grows(self) -> None:
        mixer, n = self._mixer(), 4096
        cost = {length: mixer.flops(length) - mixer.flops(length - 1) for length in (1, n, 2 * n)}
        grows = mixer.state_bytes(2 * n) > mixer.state_bytes(n)
        assert 0 < cost[1] <= cost[n] <= cost[2 * n] and (cost[n] < cost[2 * n]) == grows, f"{cost}, grows={grows}"

    def test_flops_count_every_projection(self) -> None:
        mixer, n = self._mixer(), self.time
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            mixer(self._x(1, n))
        linear = {name for name, module in mixer.named_modules() if isinstance(module, nn.Linear)}
        counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        projections = sum(counts.get(name, 0) for name in linear)
        assert projections > 0 or not linear
        core, beside = self.core_flops(n), mixer.flops(n) - projections
        assert beside >= 0 and (core is None or beside == core), f"flops={mixer.flops(n)}, projections={projections}"

    def test_bfloat16_and_autocast_stay_close_to_float32(self) -> None:
        mixer, x = self._mixer(), self._x(self.batch, self.time)
        want, packing = mixer(x), Packing.from_lengths([self.time] * self.batch)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = mixer(x, packing)
        mixed.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())
        low = mixer.to(torch.bfloat16)(x.bfloat16())
        assert low.dtype == torch.bfloat16 and mixed.dtype in (torch.float32, torch.bfloat16)
        assert distance(mixed.float(), want) <= self.low and distance(low.float(), want) <= self.low

    def test_what_does_not_fit_is_refused(self) -> None:
        mixer, x, n = self._mixer(), self._x(self.batch, self.time), self.time
        for lengths in ([n * self.batch - 1], [n], [n * self.batch, 1]):
            with pytest.raises(ValueError):
                mixer(x, Packing.from_lengths(lengths))
        with pytest.raises(ValueError):  # two documents, three rows
            mixer.prefill(x[:1], mixer.init_state(3, n), Packing.from_lengths([n - 1, 1]))
        for wrong in (x.double(), x.long(), x[..., 1:]):
            with pytest.raises((ValueError, RuntimeError, TypeError)):
                mixer(wrong)
