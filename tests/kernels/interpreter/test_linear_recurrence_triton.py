"""The laws on the Triton kernels of the linear recurrence, run program by program on a CPU."""

import pytest
import torch

from hybridlab.kernels.linear_recurrence import linear_recurrence as op
from hybridlab.kernels.triton_launch import using

triton = pytest.importorskip("triton")
SIZES = dict(batch=1, heads=2, groups=1, key=5, value=7, docs=None, state=True)
ALL = [None, "head", "time", "channel"]
KINDS = pytest.mark.parametrize("kind", ["time", "channel"])  # the kernels of a decay per head, and per channel
CEILING = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (5e-3, 1e-2)}
run = op.get("triton")


def draw(lab, kind, time, dtype=torch.float32, seed=0, **sizes):
    return lab.make(op, SIZES | dict(decay=kind, time=time) | sizes, dtype, seed=seed)


def agrees(lab, args, dtype=torch.float32, strange=False, upstream=None):
    """Values and gradients are within the budget of their dtype: twice what float32 and one rounding lose."""
    upstream = upstream or lab.draw_upstream(op, args, seed=1)
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    ideal = lab.evaluate(op.reference, lab.cast(args, torch.float32), upstream)
    ours = lab.evaluate(run, args, upstream, strange=strange)
    assert ours.keys() == truth.keys()
    for name in truth:
        once = lab.error(ideal[name].to(dtype).double(), truth[name])
        budget = min(max(2 * once, torch.finfo(dtype).eps / 2), CEILING[dtype][name.startswith("d")])
        lost = lab.error(ours[name], truth[name])
        assert lost <= budget, f"{name}: relative error {lost:.2e}, budget {budget:.2e}"


def times(args):
    per_token = {"q", "k", "v"} | (
        {"log_decay"} if args["log_decay"] is not None and args["log_decay"].dim() > 1 else set()
    )
    return [name for name in args if name in per_token]


@pytest.fixture
def segmented(monkeypatch):
    """Few programs walk: sequences are cut into segments of one or two chunks of 16 tokens."""
    from hybridlab.kernels.linear_recurrence import triton_plan

    monkeypatch.setattr(triton_plan, "SHORTEST", 1)
    with using("chunk", size=16), using("walk", programs=3), using("states", programs=3):
        yield


@pytest.mark.parametrize("key, value", [(60, 100), (100, 17), (2, 9)])
@KINDS
def test_sizes_that_are_no_power_of_two(lab, kind, key, value):
    agrees(lab, draw(lab, kind, time=18, heads=1, key=key, value=value))


@pytest.mark.parametrize("docs", [None, (40, 0, 3, 7)], ids=["row", "packed"])
@KINDS
def test_a_sequence_cut_into_segments_is_the_same_sequence(lab, kind, docs, segmented):
    """Few heads: programs share a sequence, and hand their states on; documents may begin in any of them."""
    agrees(lab, draw(lab, kind, time=50, heads=1, docs=docs))


def test_heads_of_a_group_may_be_summed_in_parts(lab):
    for programs in (1, 2, 1000):
        with using("gradients", programs=programs):
            agrees(lab, draw(lab, "time", time=9, heads=4, groups=1))


@KINDS
def test_decays_that_forget_all_at_once(lab, kind):
    args = draw(lab, kind, time=40, low=-0.01)
    args["log_decay"][:, 2::5] = -100.0
    args["log_decay"][:, 33] = -torch.inf
    agrees(lab, args)


@KINDS
def test_gradients_of_decays_that_leave_almost_nothing(lab, kind):
    """The gradient of a decay of e^-30 is a sum of terms as small; none may come from larger ones that cancel."""
    args = draw(lab, kind, time=40, heads=1)
    args["log_decay"] = args["log_decay"] * 0 - 30.0
    upstream = lab.draw_upstream(op, args, seed=1)
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    lost = lab.error(lab.evaluate(run, args, upstream)["dlog_decay"], truth["dlog_decay"])
    assert truth["dlog_decay"].abs().max() < 1e-11 and lost <= 1e-6


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_upstream_gradients_may_have_any_strides(lab, kind):
    args = draw(lab, kind, time=6, heads=6 if kind == "head" else 1)
    agrees(lab, args, strange=True)
    ones = torch.ones((), dtype=torch.float64)
    agrees(lab, args, upstream=[ones.expand(x.shape) for x in (args["v"], args["state"])])


@KINDS
def test_a_sequence_may_be_split_anywhere(lab, kind):
    args = draw(lab, kind, time=40, heads=1)
    whole = run(**args)
    ys, state = [], args["state"]
    for begin, end in ((0, 0), (0, 7), (7, 23), (23, 23), (23, 40)):
        y, state = run(**args | {name: args[name][:, begin:end] for name in times(args)} | dict(state=state))
        ys.append(y)
    assert lab.error(torch.cat(ys, 1).double(), whole[0].double()) <= 1e-6
    assert lab.error(state.double(), whole[1].double()) <= 1e-6


@KINDS
def test_packed_documents_equal_the_same_documents_alone(lab, kind):
    lengths = (3, 0, 18)
    args = draw(lab, kind, time=21, heads=1, docs=lengths)
    upstream = lab.draw_upstream(op, args, seed=4)
    packed = lab.evaluate(run, args, upstream)
    begin = 0
    for i, length in enumerate(lengths):
        here, row = slice(begin, begin + length), slice(i, i + 1)
        alone = {n: args[n][:, here] for n in times(args)} | dict(state=args["state"][row], offsets=None)
        got = lab.evaluate(run, args | alone, [upstream[0][:, here], upstream[1][row]])
        for name in got:
            place = row if name in ("out1", "dstate") else (slice(None), here)
            assert lab.error(got[name], packed[name][place]) <= 1e-6, f"document {i}, {name}"
        begin += length


@pytest.mark.parametrize("poison", [pytest.param(3.0, marks=pytest.mark.long), torch.nan], ids=str)
@KINDS
def test_a_change_in_one_document_reaches_no_other(lab, kind, poison, segmented):
    """Bitwise, in values and gradients, and across segments; a NaN stays where it is."""
    args = draw(lab, kind, time=28, heads=1, docs=(5, 0, 20, 3))
    upstream = lab.draw_upstream(op, args, seed=5)
    changed = {name: args[name].clone() for name in (*times(args), "state")}
    for name in times(args):
        changed[name][:, 5:25] = -abs(poison) if name == "log_decay" else poison
    changed["state"][2] = poison
    before, after = (lab.evaluate(run, x, upstream) for x in (args, args | changed))
    for name in ("out0", *(f"d{n}" for n in times(args))):
        for others in (slice(0, 5), slice(25, 28)):
            assert torch.equal(before[name][:, others], after[name][:, others]), name
    for name in ("out1", "dstate"):
        assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
    assert not torch.equal(before["out0"][:, 5:25], after["out0"][:, 5:25])


@KINDS
def test_the_future_is_invisible(lab, kind, segmented):
    args = draw(lab, kind, time=37, heads=1)
    y = run(**args)[0]
    for t in (1, 16, 36):
        changed = {name: args[name].clone() for name in times(args)}
        for x in changed.values():
            x[:, t] *= 0.5
        again = run(**args | changed)[0]
        assert torch.equal(y[:, :t], again[:, :t]) and not torch.equal(y[:, t], again[:, t])


def test_no_tokens_and_empty_documents_pass_the_state_through(lab):
    for case in (dict(time=0), dict(time=0, docs=(0, 0)), dict(time=0, state=False), dict(time=1, docs=(0, 1, 0))):
        args = draw(lab, "time", **case)
        agrees(lab, args)
    upstream = lab.draw_upstream(op, args, seed=1)
    assert torch.equal(lab.evaluate(run, args, upstream)["dstate"][[0, 2]], upstream[1][[0, 2]])


@KINDS
def test_programs_may_run_in_any_order(lab, kind, in_any_order, segmented):
    args = draw(lab, kind, time=21, heads=1, key=17, value=3, docs=(17, 0, 4))
    upstream = lab.draw_upstream(op, args, seed=6)
    with using("gradients", BLOCK_K=16), using("channel_gradients", BLOCK_K=16), using("scores", BLOCK_K=16):
        in_any_order(lambda: lab.evaluate(run, args, upstream))


def test_what_it_cannot_serve_is_refused_with_the_reason(lab):
    assert "float64" in op.unavailable("triton", **draw(lab, "time", time=1, dtype=torch.float64))
    assert "key=257, value=7" in op.unavailable("triton", **draw(lab, "time", time=1, key=257))
    assert op.unavailable("triton", **draw(lab, "channel", time=1, key=256, value=256)) is None


@pytest.mark.long
@pytest.mark.parametrize("kind", ALL, ids=str)
@pytest.mark.parametrize("docs", [None, (3, 0, 17)], ids=["row", "packed"])
def test_torch_knows_the_operator(lab, kind, docs):
    from hybridlab.kernels.linear_recurrence import triton_op

    args = draw(lab, kind, time=20, heads=1, docs=docs)
    for x in args.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    names = ("q", "k", "v", "log_decay", "state", "offsets")
    torch.library.opcheck(triton_op.forward, tuple(args[name] for name in names))


@pytest.mark.long
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@KINDS
def test_chunk_size_does_not_matter(lab, kind, size):
    with using("chunk", size=size):
        agrees(lab, draw(lab, kind, time=150, heads=1))
