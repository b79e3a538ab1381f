"""The laws on the Triton kernels of the delta rule, run program by program on a CPU."""

from contextlib import ExitStack

import pytest
import torch

from hybridlab.kernels.delta_rule import delta_rule as op
from hybridlab.kernels.triton_launch import using

triton = pytest.importorskip("triton")
SIZES = dict(batch=1, heads=2, groups=1, key=5, value=7, docs=None, state=True)
SOME = pytest.mark.parametrize(
    "gate",
    [pytest.param(None, marks=pytest.mark.long), "time", pytest.param("channel", marks=pytest.mark.long)],
    ids=["none", "head", "channel"],
)
GATES = pytest.mark.parametrize("gate", [None, "time", "channel"], ids=["none", "head", "channel"])
CEILING = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (5e-3, 1e-2)}
ALONG_TIME = ("q", "k", "v", "beta", "log_decay")
run = op.get("triton")


def draw(lab, gate, time, dtype=torch.float32, seed=0, **sizes):
    return lab.make(op, SIZES | dict(decay=gate, time=time) | sizes, dtype, seed=seed)


def agrees(lab, args, dtype=torch.float32, strange=False):
    """Values and gradients equal the definition, within the ceiling of float32 or the budget of bfloat16."""
    upstream = lab.draw_upstream(op, args, seed=1)
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    ours = lab.evaluate(run, args, upstream, strange=strange)
    assert ours.keys() == truth.keys()
    for name in truth:
        bound = CEILING[dtype][name.startswith("d")]
        if dtype == torch.bfloat16:
            once = lab.error(truth[name].to(dtype).double(), truth[name])
            bound = min(bound, max(2 * once, torch.finfo(dtype).eps / 2))
        lost = lab.error(ours[name], truth[name])
        assert lost <= bound, f"{name}: relative error {lost:.2e}, bound {bound:.2e}"


def times(args):
    return [name for name in ALONG_TIME if args[name] is not None]


@GATES
def test_eigenvalues_near_minus_one_and_shared_keys(lab, gate):
    args = draw(lab, gate, time=21)
    args["beta"] = 2 - 0.05 * args["beta"]
    agrees(lab, args, strange=True)


def test_like_keys_do_not_cost_the_inverse_its_digits(lab):
    """I + low has entries of 2 all over; powers of it reach 1e12, its inverse stays within 2."""
    args = draw(lab, None, time=33, heads=1, key=4)
    args["k"][:] = args["k"][:, :1]
    args["beta"] = torch.full_like(args["beta"], 1.99)
    with using("chunk_float32", size=64):
        agrees(lab, args)


@pytest.mark.parametrize("key, value", [(60, 100), (100, 60), (1, 1)])
def test_sizes_that_are_no_power_of_two(lab, key, value):
    for gate in ("time", "channel"):
        agrees(lab, draw(lab, gate, time=17, dtype=torch.bfloat16, heads=1, key=key, value=value), torch.bfloat16)


@SOME
def test_blocks_of_keys_and_values_do_not_matter(lab, gate):
    with ExitStack() as held:
        for kernel in ("prepare", "prepare_channel", "gradients", "gradients_channel"):
            held.enter_context(using(kernel, BK=16))
        for kernel in ("walk", "walk_back", "gradients"):
            held.enter_context(using(kernel, BV=16, **({} if kernel != "gradients" else {"BK": 16})))
        agrees(lab, draw(lab, gate, time=17, heads=1, key=20, value=20))


@pytest.mark.parametrize("gate", ["time", "channel"])
def test_decays_that_forget_all_at_once(lab, gate):
    args = draw(lab, gate, time=20, low=-0.01)
    args["log_decay"][:, 2::3] = -60.0
    args["log_decay"][:, 7] = -1e30
    agrees(lab, args)


@GATES
def test_products_rounded_as_on_tensor_cores_stay_within_the_budget_of_bfloat16(lab, gate, monkeypatch):
    """On a GPU, bfloat16 inputs let products but the inverse's round their operands to tf32; here they all do."""
    import triton.language as tl

    from hybridlab.kernels.delta_rule import triton_gradients, triton_prepare, triton_tiles, triton_walk

    def product(a, b, LOW):
        return tl.dot(triton_tiles.rounded(a), triton_tiles.rounded(b), input_precision="ieee")

    for module in (triton_gradients, triton_prepare, triton_walk):
        monkeypatch.setattr(module, "product", product)
    args = draw(lab, gate, time=80, heads=1, key=32, value=32, dtype=torch.bfloat16)
    agrees(lab, args, torch.bfloat16)


@SOME
def test_a_sequence_may_be_split_anywhere(lab, gate):
    args = draw(lab, gate, time=35, heads=1)
    whole = run(**args)
    ys, state = [], args["state"]
    for begin, end in ((0, 0), (0, 7), (7, 16), (16, 16), (16, 35)):
        y, state = run(**args | {name: args[name][:, begin:end] for name in times(args)} | dict(state=state))
        ys.append(y)
    assert lab.error(torch.cat(ys, 1).double(), whole[0].double()) <= 1e-6
    assert lab.error(state.double(), whole[1].double()) <= 1e-6


@SOME
def test_packed_documents_equal_the_same_documents_alone(lab, gate):
    lengths = (3, 0, 18, 1, 0)
    args = draw(lab, gate, time=22, heads=1, docs=lengths)
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
@GATES
def test_a_change_in_one_document_reaches_no_other(lab, gate, poison):
    """Bitwise, in values and gradients; a NaN stays where it is."""
    args = draw(lab, gate, time=24, heads=1, docs=(5, 0, 11, 8))
    upstream = lab.draw_upstream(op, args, seed=5)
    before = lab.evaluate(run, args, upstream)
    changed = {name: args[name].clone() for name in (*times(args), "state")}
    for name in times(args):
        changed[name][:, 5:16] = -abs(poison) if name == "log_decay" else poison
    changed["state"][2] = poison
    after = lab.evaluate(run, args | changed, upstream)
    for name in ("out0", *(f"d{n}" for n in times(args))):
        for others in (slice(0, 5), slice(16, 24)):
            assert torch.equal(before[name][:, others], after[name][:, others]), name
    for name in ("out1", "dstate"):
        assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
    assert not torch.equal(before["out0"][:, 5:16], after["out0"][:, 5:16])


@SOME
def test_the_future_is_invisible(lab, gate):
    args = draw(lab, gate, time=33, heads=1)
    y = run(**args)[0]
    for t in (1, 13, 16, 32):
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


@SOME
def test_programs_may_run_in_any_order(lab, gate, in_any_order):
    args = draw(lab, gate, time=20, heads=2, key=17, value=17, docs=(17, 0, 3))
    upstream = lab.draw_upstream(op, args, seed=6)
    with using("walk", BV=16), using("walk_back", BV=16), using("gradients", BK=16, BV=16):
        in_any_order(lambda: lab.evaluate(run, args, upstream))


def test_what_it_cannot_serve_is_refused_with_the_reason(lab):
    assert "float64" in op.unavailable("triton", **draw(lab, "time", time=1, dtype=torch.float64))
    assert "key=257, value=7" in op.unavailable("triton", **draw(lab, "time", time=1, key=257))
    assert "key=5, value=300" in op.unavailable("triton", **draw(lab, "time", time=1, value=300))
    assert op.unavailable("triton", **draw(lab, "channel", time=1, key=256, value=256)) is None


@pytest.mark.long
@GATES
@pytest.mark.parametrize("docs", [None, (3, 0, 17)], ids=["rows", "packed"])
def test_torch_knows_the_operator(lab, gate, docs):
    args = draw(lab, gate, time=20, heads=1, docs=docs)
    for x in args.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    names = ("q", "k", "v", "beta", "log_decay", "state", "offsets")
    torch.library.opcheck(torch.ops.hybridlab.delta_rule_triton.default, tuple(args[name] for name in names))


@pytest.mark.long
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@GATES
def test_chunk_size_does_not_matter(lab, gate, size):
    args = draw(lab, gate, time=200, heads=1)
    upstream = lab.draw_upstream(op, args, seed=2)
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
    with using("chunk_float32", size=size):
        got = lab.evaluate(run, args, upstream)
    for name in truth:
        assert lab.error(got[name], truth[name]) <= 1e-5, f"chunk={size}, {name}"
