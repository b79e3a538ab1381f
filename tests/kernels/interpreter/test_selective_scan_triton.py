"""The laws for the Triton selective scan, in Triton's interpreter, with settings that cut rows into pieces as well."""

from contextlib import ExitStack

import pytest
import torch

from hybridlab.kernels.selective_scan import selective_scan as op
from hybridlab.kernels.triton_launch import using

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
CEILING = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (5e-3, 1e-2)}
CASE = op.cases["tiny"] | dict(batch=1, time=37, d_model=7, n=3)
CUT = dict(LEAST=16, BD=32)  # pieces of one tile, blocks of 32 channels
TIMED = ("x", "delta", "B", "C", "z")


@pytest.fixture
def pieces():
    """`pieces()`: from now on rows and documents are cut into pieces of one tile."""
    with ExitStack() as stack:

        def cut():
            for kernel in ("forward", "backward"):
                stack.enter_context(using(kernel, **CUT))

        yield cut


def run(lab, args, seed=1):
    return lab.evaluate(op.get("triton"), args, lab.draw_upstream(op, args, seed), strange=True)


def agree(lab, args, seed=1):
    dtype = args["x"].dtype
    truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), lab.draw_upstream(op, args, seed))
    ours = run(lab, args, seed)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        assert lab.error(ours[name], value) <= CEILING[dtype][name.startswith("d")], name


def without(args, *names):
    """The arguments with these options off; Δ is then taken as it is, so not negative."""
    off = {name: False if name == "softplus" else None for name in names}
    args = args | off
    if not args["softplus"]:
        args["delta"] = args["delta"].abs() * 0.3 - (0 if args["delta_bias"] is None else args["delta_bias"])
    return args


OPTIONS = (
    (), ("D",), ("z",), ("delta_bias",), ("softplus",), ("state",), ("softplus", "delta_bias", "D", "z", "state")
)  # fmt: skip


@pytest.mark.parametrize("off", OPTIONS, ids=lambda off: "no " + "-".join(off) if off else "all")
def test_every_option_counts_and_may_be_left_out(lab, off):
    agree(lab, without(lab.make(op, CASE | dict(time=18), torch.float32), *off))


FEW, MANY = ((0, 7, 3), (1, 7, 1), (3, 1, 3), (18, 33, 16)), ((18, 7, 33), (37, 33, 33), (37, 1, 16), (18, 7, 256))
SIZES = [*FEW, *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in MANY)]


@pytest.mark.parametrize("time, d, n", SIZES)
@pytest.mark.parametrize("dtype", CEILING, ids=lambda dtype: str(dtype)[6:])
def test_any_size_agrees_with_the_definition(lab, time, d, n, dtype):
    agree(lab, lab.make(op, CASE | dict(time=time, d_model=d, n=n, batch=2 if time < 18 else 1), dtype))


def test_states_beyond_one_block_agree_with_the_definition(lab):
    agree(lab, lab.make(op, CASE | dict(time=5, n=33), torch.float32))


@pytest.mark.parametrize("docs", [None, (20, 0, 1, 16, 0)], ids=["rows", "documents"])
@pytest.mark.parametrize("n", [3, pytest.param(33, marks=pytest.mark.long)])
def test_pieces_of_a_sequence_make_the_sequence(lab, pieces, docs, n):
    pieces()
    agree(lab, lab.make(op, CASE | dict(docs=docs, n=n, batch=2 if docs is None else 1), torch.float32))


def test_states_computed_again_give_the_same_gradients(lab, monkeypatch):
    from hybridlab.kernels.selective_scan import triton_scan

    args = lab.make(op, CASE | dict(docs=(20, 0, 17)), torch.float32)
    kept = run(lab, args)
    monkeypatch.setattr(triton_scan, "KEPT", 0)
    again = run(lab, args)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_sequence_may_be_split_anywhere(lab):
    args = lab.make(op, CASE, torch.float32)
    y, last = op.get("triton")(**args)
    for cut in (0, 1, 16, 23, 37):
        early, late = ({n: args[n][:, part] for n in TIMED} for part in (slice(None, cut), slice(cut, None)))
        y_0, state = op.get("triton")(**args | early)
        y_1, state = op.get("triton")(**args | late | dict(state=state))
        assert lab.error(torch.cat([y_0, y_1], 1), y) <= 1e-6 and lab.error(state, last) <= 1e-6


def test_packed_documents_equal_the_same_documents_alone(lab, pieces):
    pieces()
    lengths, begin = (20, 0, 1, 16), 0
    args = lab.make(op, CASE | dict(docs=lengths), torch.float32)
    upstream = lab.draw_upstream(op, args, 2)
    packed = lab.evaluate(op.get("triton"), args, upstream)
    for i, length in enumerate(lengths):
        here, row = slice(begin, begin + length), slice(i, i + 1)
        alone = args | {n: args[n][:, here] for n in TIMED} | dict(state=args["state"][row], offsets=None)
        got = lab.evaluate(op.get("triton"), alone, [upstream[0][:, here], upstream[1][row]])
        for name in ("out0", *(f"d{n}" for n in TIMED)):
            assert torch.equal(got[name], packed[name][:, here]), f"document {i}, {name}"
        for name in ("out1", "dstate"):
            assert torch.equal(got[name], packed[name][row]), f"document {i}, {name}"
        begin += length


@pytest.mark.parametrize("poison", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "pieces"])
def test_a_change_in_one_document_reaches_no_other(lab, pieces, poison, cut):
    if cut:
        pieces()
    lengths, victim = (9, 0, 20, 8), slice(9, 29)
    args = lab.make(op, CASE | dict(docs=lengths), torch.float32)
    upstream = lab.draw_upstream(op, args, 3)
    before = lab.evaluate(op.get("triton"), args, upstream)
    changed = {n: args[n].clone() for n in (*TIMED, "state")}
    for name, x in changed.items():
        x[(2,) if name == "state" else (slice(None), victim)] = poison
    after = lab.evaluate(op.get("triton"), args | changed, upstream)
    for name in ("out0", *(f"d{n}" for n in TIMED)):
        for others in (slice(0, 9), slice(29, 37)):
            assert torch.equal(before[name][:, others], after[name][:, others]), name
    for name in ("out1", "dstate"):
        assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
    assert not torch.equal(before["out0"], after["out0"])


def test_the_future_is_invisible(lab):
    args = lab.make(op, CASE, torch.float32)
    y = op.get("triton")(**args)[0]
    for t in (0, 5, 16, 36):
        changed = {n: args[n].clone() for n in TIMED}
        for x in changed.values():
            x[:, t] = torch.nan
        again = op.get("triton")(**args | changed)[0]
        assert torch.equal(y[:, :t], again[:, :t]) and again[:, t].isnan().all()


ROWS = pytest.param(None, id="rows", marks=pytest.mark.long)


@pytest.mark.parametrize("docs", [ROWS, pytest.param((20, 0, 1), id="documents")])
def test_programs_may_run_in_any_order(lab, pieces, in_any_order, docs):
    pieces()  # and two blocks of channels, so that programs share tokens
    args = lab.make(op, CASE | dict(docs=docs, time=21, d_model=33), torch.float32)
    in_any_order(lambda: run(lab, args))


@pytest.mark.parametrize("shift", [-40.0, -12.0, 0.0, 30.0])
def test_softplus_keeps_its_digits_at_both_ends(lab, shift):
    args = lab.make(op, CASE | dict(time=5), torch.float32)
    agree(lab, args | dict(delta_bias=args["delta_bias"] + shift))


@pytest.mark.long
@pytest.mark.parametrize("docs", [None, (20, 0, 17)], ids=["rows", "documents"])
def test_torch_accepts_the_operator(lab, docs):
    from hybridlab.kernels.selective_scan.triton_scan import _scan

    args = lab.make(op, CASE | dict(docs=docs), torch.float32)
    names = ("x", "delta", "A", "B", "C", "D", "state", "offsets", "z", "delta_bias", "softplus")
    given = [args[n].requires_grad_() if n not in ("offsets", "softplus") else args[n] for n in names]
    torch.library.opcheck(_scan, (*given, True))


@pytest.mark.long
def test_it_compiles_into_one_graph(lab):
    args = lab.make(op, CASE, torch.float32)
    args = {n: x.requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in args.items()}
    compiled = torch.compile(op.get("triton"), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(**args), op.get("triton")(**args), strict=True):
        assert torch.equal(got, want)


def test_what_it_cannot_serve_is_refused(lab):
    args = lab.make(op, CASE | dict(time=2), torch.float64)
    with pytest.raises(ValueError, match="float64"):
        op(**args, version="triton")
    args = lab.make(op, CASE | dict(time=2, n=257), torch.float32)
    with pytest.raises(ValueError, match="257"):
        op(**args, version="triton")
