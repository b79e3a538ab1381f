"""The selective scan in C++: agreement at odd sizes, the laws, threads, forks, and what it refuses."""

import os
import signal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridlab.kernels.selective_scan import cpp, selective_scan

CASE = selective_scan.cases["tiny"]
SIZES = [(1, 1, 1), (3, 3, 31), (17, 5, 32), (1, 16, 33), (130, 1, 65), (3, 33, 70), (300, 2, 34), (7, 64, 3)]


@pytest.fixture(autouse=True)
def compiled():
    if why := cpp._missing():
        pytest.skip(why)


def agree(lab, args, dtype=torch.float32, strange=True):
    """Values and gradients within three times what float32 loses, or 4 eps: few numbers may be right by luck."""
    upstream = lab.draw_upstream(selective_scan, args, seed=1)
    truth = lab.evaluate(selective_scan.reference, lab.cast(args, torch.float64), upstream)
    ideal = lab.evaluate(selective_scan.reference, lab.cast(args, torch.float32), upstream)
    ours = lab.evaluate(cpp.selective_scan_cpp, args, upstream, strange=strange)
    for name in truth:
        once = lab.error(ideal[name].to(dtype).double(), truth[name])
        assert lab.error(ours[name], truth[name]) <= max(3 * once, 4 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("d, n, time", SIZES)
@pytest.mark.parametrize("rest", [False, True], ids=["bare", "rest"])
def test_odd_sizes_agree_with_the_definition(lab, d, n, time, rest):
    agree(lab, lab.make(selective_scan, CASE | dict(d_model=d, n=n, time=time, rest=rest), torch.float32))


@pytest.mark.parametrize(
    "batch, docs", [(19, None), (1, (3, 0, 40, 1, 33, 0, 0, 32, 64, 5, 1, 1, 2, 7, 0, 3, 4, 50, 2, 1))]
)
def test_more_rows_than_are_summed_apart_agree_with_the_definition(lab, batch, docs):
    case = dict(batch=batch, time=sum(docs) if docs else 37, docs=docs, d_model=20)
    agree(lab, lab.make(selective_scan, CASE | case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_served_with_float32_inside(lab, dtype):
    args = lab.make(selective_scan, CASE, dtype)
    agree(lab, args, dtype)
    assert [t.dtype for t in cpp.selective_scan_cpp(**args)] == [dtype, torch.float32]


def test_inputs_and_upstream_gradients_of_stride_0(lab):
    args = lab.make(selective_scan, CASE | dict(time=40, n=16), torch.float32)
    for name in ("x", "delta", "z"):
        args[name] = args[name][..., :1].detach().expand(args[name].shape)
    args["B"], args["C"] = args["B"][:, :1].expand_as(args["B"]), args["C"][:1].expand_as(args["C"])
    leaves = {n: t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in args.items()}
    tensors = [t for t in leaves.values() if isinstance(t, torch.Tensor)]
    ours, truth = cpp.selective_scan_cpp(**leaves), selective_scan.reference(**leaves)
    for got, want in zip(ours, truth, strict=True):
        assert lab.error(got.double(), want.double()) < 1e-6
    got = torch.autograd.grad(ours[0].sum() + ours[1].sum(), tensors)
    want = torch.autograd.grad(truth[0].sum() + truth[1].sum(), tensors)
    assert all(lab.error(a.double(), b.double()) < 2e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("n", [1, 4, 16, 33])
def test_a_token_without_gradients_equals_the_definition(lab, n):
    for case in (dict(time=1), dict(batch=1, time=5, docs=(1, 0, 1, 2, 1)), dict(time=1, rest=False, state=False)):
        args = lab.make(selective_scan, CASE | case | dict(n=n, d_model=37), torch.float32)
        truth = selective_scan.reference(**lab.cast(args, torch.float64))
        for got, want in zip(cpp.selective_scan_cpp(**args), truth, strict=True):
            assert lab.error(got.double(), want) < 3e-7


def test_no_tokens_pass_the_state_and_its_gradient_through(lab):
    args = lab.make(selective_scan, CASE | dict(time=0), torch.float32)
    state = args["state"].requires_grad_()
    y, last = cpp.selective_scan_cpp(**args)
    assert y.shape == (2, 0, 24) and torch.equal(last, state)
    (last * 3).sum().backward()
    assert torch.equal(state.grad, torch.full_like(state, 3))
    assert not cpp.selective_scan_cpp(**args | dict(state=None))[1].any()


@pytest.mark.parametrize("batch, d", [(1, 513), (3, 512)])
def test_the_number_of_threads_changes_no_bit(lab, batch, d):
    args = lab.make(selective_scan, CASE | dict(batch=batch, time=100, d_model=d, n=16), torch.float32)
    upstream, before, results = lab.draw_upstream(selective_scan, args, seed=2), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(lab.evaluate(cpp.selective_scan_cpp, args, upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_forked_child_computes_the_same(lab):
    args = lab.make(selective_scan, CASE | dict(batch=4, time=100, d_model=512, n=16), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        y = cpp.selective_scan_cpp(**args)[0].numpy().tobytes()
        if (child := os.fork()) == 0:  # where only our threads work: OpenMP's, which torch uses, do not survive a fork
            signal.alarm(60)
            os._exit(0 if cpp.selective_scan_cpp(**args)[0].numpy().tobytes() == y else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3.0])
def test_a_change_in_one_document_reaches_no_other(lab, poison):
    """Bitwise, in values and gradients, of tokens and of the rows of the state."""
    args = lab.make(selective_scan, CASE | dict(batch=1, docs=(9, 0, 73, 12), time=94, d_model=20), torch.float32)
    upstream = lab.draw_upstream(selective_scan, args, seed=5)
    before = lab.evaluate(cpp.selective_scan_cpp, args, upstream)
    changed = {n: args[n].clone() for n in ("x", "delta", "B", "C", "z", "state")}
    for name in ("x", "delta", "B", "C", "z"):
        changed[name][:, 9:82] = poison
    changed["state"][2] = poison
    after = lab.evaluate(cpp.selective_scan_cpp, args | changed, upstream)
    for name in ("out0", "dx", "ddelta", "dB", "dC", "dz"):
        for others in (slice(0, 9), slice(82, 94)):
            assert torch.equal(before[name][:, others], after[name][:, others]), name
    for name in ("out1", "dstate"):
        assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
    assert not torch.equal(before["out0"], after["out0"])


def test_nan_stays_nan_at_its_place_and_later(lab):
    args = lab.make(selective_scan, CASE | dict(time=40), torch.float32)
    for name in ("x", "delta", "B", "C", "z"):
        changed = args[name].clone()
        changed[0, 20] = torch.nan
        y, last = cpp.selective_scan_cpp(**args | {name: changed})
        assert y[0, 20].isnan().all() and not y[0, :20].isnan().any() and not y[1].isnan().any()
        assert last[0].isnan().all() == (name in ("x", "delta", "B")) and not last[1].isnan().any()


@pytest.mark.parametrize("time", [40, 128])
def test_the_future_is_invisible(lab, time):
    args = lab.make(selective_scan, CASE | dict(time=time), torch.float32)
    y = cpp.selective_scan_cpp(**args)[0]
    for t in (1, 31, 32, time - 1):
        changed = {n: args[n].clone() for n in ("x", "delta", "B", "C", "z")}
        for x in changed.values():
            x[:, t] *= 0.5
        again = cpp.selective_scan_cpp(**args | changed)[0]
        assert torch.equal(y[:, :t], again[:, :t]) and not torch.equal(y[:, t], again[:, t])


def test_extreme_steps_decay_to_zero_without_nan_and_denormals_survive_the_call(lab):
    args = lab.make(selective_scan, CASE | dict(time=100, rest=False), torch.float32)
    args["delta"][:, ::3] = 1e30
    args["delta"][:, 1::3] = 40.0
    args["B"][:, 1:] = 0
    tensors = [args[n].requires_grad_() for n in ("x", "A", "B", "C")]
    y, last = cpp.selective_scan_cpp(**args)
    assert y.isfinite().all() and not last.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y[:, 1:].sum(), tensors))
    assert torch.tensor(1e-40).mul(2).item() > 0


def test_states_are_kept_for_every_chunk_only(lab):
    args = lab.make(selective_scan, CASE | dict(batch=1, time=256, d_model=64, n=16, state=False), torch.float32)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        cpp.selective_scan_cpp(**{n: t.requires_grad_() if torch.is_tensor(t) else t for n, t in args.items()})
    kept = sum(t.numel() for t in saved.values()) - sum(t.numel() for t in args.values() if torch.is_tensor(t))
    assert kept == 9 * 64 * 16  # 256 / 32 chunks and one of room, of 64 x 16 states


def test_what_it_cannot_serve_is_refused_with_the_value(lab):
    args = lab.make(selective_scan, CASE, torch.float32)
    assert cpp.refuses(**args) is None
    assert "torch.float64" in cpp.refuses(**args | dict(D=args["D"].double()))
    assert "meta" in cpp.refuses(**{n: t.to("meta") if torch.is_tensor(t) else t for n, t in args.items()})
    assert "state=257 > 256" in cpp.refuses(**args | dict(A=torch.zeros(24, 257)))


def test_a_second_derivative_is_refused(lab):
    args = lab.make(selective_scan, CASE, torch.float32)
    x = args["x"].requires_grad_()
    y = cpp.selective_scan_cpp(**args)[0]
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(first.sum(), x)


def test_flops_are_counted_with_and_without_gradients(lab):
    args = lab.make(selective_scan, CASE, torch.float32)
    for grad in (False, True):
        with FlopCounterMode(display=False) as counter:
            cpp.selective_scan_cpp(**args | dict(x=args["x"].requires_grad_(grad)))
        assert counter.get_total_flops() == selective_scan.flops(CASE)


@pytest.mark.long
@pytest.mark.parametrize("case", ["tiny", "irregular", "packed"])
def test_the_registration_passes_opcheck(lab, case):
    args = lab.make(selective_scan, selective_scan.cases[case], torch.float32)
    names = ("x", "delta", "A", "B", "C", "D", "state", "z", "delta_bias")
    tensors = [None if args[n] is None else args[n].requires_grad_() for n in names]
    offsets = None if args["offsets"] is None else args["offsets"].long()
    torch.library.opcheck(cpp._scan, (*tensors, offsets, args["softplus"], True))


@pytest.mark.long
@pytest.mark.parametrize("case", ["tiny", "irregular", "packed"])
def test_compiled_in_one_graph_equals_eager(lab, case):
    args = lab.make(selective_scan, selective_scan.cases[case], torch.float32)
    upstream = lab.draw_upstream(selective_scan, args, seed=0)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    forced = lambda **given: selective_scan(**given, version="cpp")  # noqa: E731
    eager, got = lab.evaluate(forced, args, upstream), lab.evaluate(compiled, args, upstream)
    assert all(torch.equal(got[name], eager[name]) for name in eager)
