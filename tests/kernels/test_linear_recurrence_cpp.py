"""The C++ version: bits that do not depend on threads, documents that do not meet, segments, torch.library's checks."""

import pytest
import torch

from hybridlab.kernels.linear_recurrence import cpp, linear_recurrence

pytestmark = pytest.mark.skipif(cpp.native.missing(cpp.SOURCE) is not None, reason="no C++ compiler")
RUN = linear_recurrence.get("cpp")
CASE = linear_recurrence.cases["tiny"] | dict(time=100, heads=8, groups=1, key=20, value=24, decay="time")


def bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", [dict(), dict(docs=(33, 0, 60, 7), batch=1), dict(decay="head", groups=4)], ids=str)
def test_the_number_of_threads_changes_no_bit(lab, case):
    args = lab.make(linear_recurrence, CASE | case, torch.float32)
    upstream, threads = lab.draw_upstream(linear_recurrence, args, 0), torch.get_num_threads()
    found = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(lab.evaluate(RUN, args, upstream))
    torch.set_num_threads(threads)
    assert bits(found[0], found[1]) and bits(found[0], found[2])


@pytest.mark.parametrize("time", [1023, 1024, 1025, 2100])
def test_states_saved_between_segments_lead_to_the_same_gradients(lab, time):
    case = CASE | dict(batch=1, time=time, heads=2, key=3, value=4)
    args = lab.make(linear_recurrence, case, torch.float32)
    upstream = lab.draw_upstream(linear_recurrence, args, 1)
    truth = lab.evaluate(linear_recurrence.get("chunked"), lab.cast(args, torch.float64), upstream)
    got = lab.evaluate(RUN, args, upstream)
    assert all(lab.error(got[name], truth[name]) < 2e-6 for name in truth)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 5.0], ids=str)
def test_a_document_reaches_no_other_and_no_batch_row_another(lab, poison):
    args = lab.make(linear_recurrence, CASE | dict(batch=1, docs=(40, 0, 37, 23)), torch.float32)
    upstream = lab.draw_upstream(linear_recurrence, args, 2)
    changed = {name: args[name].clone() for name in ("q", "k", "v", "log_decay")}
    for name, x in changed.items():
        x[:, 40:77] = -abs(poison) if name == "log_decay" else poison
    changed["state"] = args["state"].index_fill(0, torch.tensor([2]), poison)
    before, after = (lab.evaluate(RUN, a, upstream) for a in (args, args | changed))
    for name in ("out0", "dq", "dk", "dv", "dlog_decay"):
        for others in (slice(0, 40), slice(77, 100)):
            assert torch.equal(before[name][:, others], after[name][:, others]), name
    for name in ("out1", "dstate"):
        assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
    assert not torch.equal(before["out0"], after["out0"])


def test_the_future_is_invisible(lab):
    args = lab.make(linear_recurrence, CASE, torch.float32)
    y = RUN(**args)[0]
    for t in (1, 31, 32, 70):
        later = {n: args[n].index_fill(1, torch.tensor([t]), -0.5) for n in ("q", "k", "v", "log_decay")}
        again = RUN(**args | later)[0]
        assert torch.equal(y[:, :t], again[:, :t]) and not torch.equal(y[:, t], again[:, t])


def test_a_nan_decay_stays_visible(lab):
    args = lab.make(linear_recurrence, CASE, torch.float32)
    args["log_decay"][0, 50] = torch.nan
    y, state = RUN(**args)
    assert y[0, 50:].isnan().all() and state[0].isnan().all() and not y[0, :32].isnan().any()
    assert not y[1:].isnan().any()


@pytest.mark.parametrize("change, why", [(dict(decay="channel"), "is per channel"), (dict(), "float64")], ids=str)
def test_what_it_does_not_serve_is_refused(lab, change, why):
    args = lab.make(linear_recurrence, CASE | change, torch.float32 if change else torch.float64)
    assert why in linear_recurrence.unavailable("cpp", **args)
    assert linear_recurrence.unavailable("cpp", **lab.make(linear_recurrence, CASE, torch.bfloat16)) is None


@pytest.mark.long
@pytest.mark.parametrize("case", [dict(), dict(docs=(33, 0, 60, 7), batch=1), dict(decay=None, state=False)], ids=str)
def test_registered_as_torch_library_asks(lab, case):
    args = lab.make(linear_recurrence, CASE | case, torch.float32)
    leaves = [args[n] for n in ("q", "k", "v", "log_decay", "state")]
    leaves = [x if x is None else x.requires_grad_() for x in leaves]
    offsets = None if args["offsets"] is None else args["offsets"].long()
    torch.library.opcheck(torch.ops.hybridlab.linear_recurrence_cpp.default, (*leaves, offsets))
