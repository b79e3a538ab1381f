"""R15 and laws 1 to 3, for ops: results do not depend on chunks or splits, on the future, or on other documents."""

import pytest
import torch

from hybridlab.kernels.ops import OPS

RECURRENT = [op for op in OPS if "time" in op.cases["tiny"]]
CHUNKED = [op for op in RECURRENT if op.name != "causal_conv"]
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=lambda d: str(d)[6:])


def each(ops):
    return pytest.mark.parametrize("op", ops, ids=lambda op: op.name)


def along_time(op, args):
    """Names of the arguments that have a time axis."""
    time = next(iter(args.values())).shape[1]
    return [n for n, x in args.items() if isinstance(x, torch.Tensor) and n != "state" and x.shape[1:2] == (time,)]


def variants(op):
    names = ("tiny", "constant", "undecayed", "ungated", "channels", "irregular")
    for name in names:
        if name in op.cases:
            docs = dict(docs=None, state=True)
            yield op.cases[name] | docs | dict(time=128, batch=2)


@DTYPES
@each(CHUNKED)
def test_chunk_size_does_not_matter(lab, op, dtype):
    for case in variants(op):
        args = lab.make(op, case, dtype)
        upstream = lab.draw_upstream(op, args, seed=2)
        truth = lab.evaluate(op.reference, lab.cast(args, torch.float64), upstream)
        for size in (1, 2, 16, 64, 128):
            got = lab.evaluate(op.get("chunked"), args | dict(chunk=size), upstream)
            for name in truth:
                assert lab.error(got[name], truth[name]) <= BOUND[dtype], f"chunk={size}, {name}"


@DTYPES
@each(RECURRENT)
def test_a_sequence_may_be_split_anywhere(lab, op, dtype):
    generator = torch.Generator().manual_seed(3)
    for case in variants(op):
        args = lab.make(op, case, dtype)
        whole = op(**args)
        cuts = sorted({0, 128, *torch.randint(0, 129, (4,), generator=generator).tolist()})
        cuts += [128]  # an empty piece
        ys, state = [], args["state"]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            piece = {n: args[n][:, begin:end] for n in along_time(op, args)}
            y, state = op(**args | piece | dict(state=state))
            ys.append(y)
        assert lab.error(torch.cat(ys, 1).double(), whole[0].double()) <= BOUND[dtype]
        assert lab.error(state.double(), whole[1].double()) <= BOUND[dtype]


@pytest.mark.parametrize("device", ["host may look", "host may not look"])
@DTYPES
@each(RECURRENT)
def test_packed_documents_equal_the_same_documents_alone(lab, op, dtype, device, monkeypatch):
    if device == "host may not look":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    lengths = (40, 0, 1, 70, 17, 0)
    for case in variants(op):
        args = lab.make(op, case | dict(batch=1, docs=lengths, time=128), dtype)
        upstream = lab.draw_upstream(op, args, seed=4)
        packed = lab.evaluate(op, args, upstream)
        begin = 0
        for i, length in enumerate(lengths):
            here = slice(begin, begin + length)
            alone = {n: args[n][:, here] for n in along_time(op, args)} | dict(state=args["state"][i : i + 1])
            got = lab.evaluate(op, args | dict(offsets=None) | alone, [upstream[0][:, here], upstream[1][i : i + 1]])
            for name in ("out0", *(f"d{n}" for n in along_time(op, args))):
                assert lab.error(got[name], packed[name][:, here]) <= BOUND[dtype], f"document {i}, {name}"
            for name in ("out1", "dstate"):
                assert lab.error(got[name], packed[name][i : i + 1]) <= BOUND[dtype], f"document {i}, {name}"
            begin += length


@pytest.mark.parametrize("poison", [3.0, torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("version", ["reference", "chunked", "chunked on a device"])
@each(RECURRENT)
def test_a_change_in_one_document_reaches_no_other(lab, op, version, poison, monkeypatch):
    """Bitwise, in values and gradients; a NaN stays where it is."""
    if version == "chunked on a device":  # where the host may not look at the offsets
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        version = "chunked"
    lengths, victim = (9, 0, 23, 12), slice(9, 32)
    for case in variants(op):
        args = lab.make(op, case | dict(batch=1, docs=lengths, time=44), torch.float32)
        upstream = lab.draw_upstream(op, args, seed=5)
        before = lab.evaluate(op.get(version), args, upstream)
        changed = {}
        for name in along_time(op, args):
            changed[name] = args[name].clone()
            changed[name][:, victim] = -abs(poison) if name == "log_decay" else poison
        changed["state"] = args["state"].clone()
        changed["state"][2] = poison
        after = lab.evaluate(op.get(version), args | changed, upstream)
        for name in ("out0", *(f"d{n}" for n in along_time(op, args))):
            for others in (slice(0, 9), slice(32, 44)):
                assert torch.equal(before[name][:, others], after[name][:, others]), name
        for name in ("out1", "dstate"):
            assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
        assert not torch.equal(before["out0"], after["out0"])


@pytest.mark.parametrize("version", ["reference", "chunked"])
@each(RECURRENT)
def test_the_future_is_invisible(lab, op, version):
    """Changing token t leaves outputs before t bitwise unchanged."""
    for case in variants(op):
        args = lab.make(op, case, torch.float32)
        y = op.get(version)(**args)[0]
        for t in (1, 37, 64, 127):
            changed = {n: args[n].clone() for n in along_time(op, args)}
            for x in changed.values():
                x[:, t] *= 0.5
            again = op.get(version)(**args | changed)[0]
            assert torch.equal(y[:, :t], again[:, :t]) and not torch.equal(y[:, t], again[:, t])
