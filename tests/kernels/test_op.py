"""The mechanism: which version runs, who decides, and what is refused."""

import logging
from dataclasses import replace

import pytest
import torch

from hybridlab.kernels import op as module
from hybridlab.kernels import trial, triton_launch
from hybridlab.kernels.delta_rule import delta_rule
from hybridlab.kernels.linear_recurrence import linear_recurrence
from hybridlab.kernels.op import Op, Version, lazy
from hybridlab.kernels.ops import OPS
from hybridlab.kernels.selective_scan import selective_scan

TINY = linear_recurrence.cases["tiny"]


@pytest.fixture
def toy(monkeypatch):
    """Three ways to say who ran; `picky` refuses negative numbers, `ordered` is never picked."""
    monkeypatch.setattr(module, "_said", set())
    versions = {
        "ordered": Version(lambda x: (x, "ordered"), ordered=True),
        "picky": Version(lambda x: (x, "picky"), lambda x: f"x={x.item()} < 0" if x < 0 else None),
        "plain": Version(lambda x: (x, "plain")),
    }
    return Op("toy", lambda x: (x, "reference"), versions, {}, lambda *a: {}, lambda c: 0)


def test_auto_picks_the_first_version_that_accepts(toy):
    assert toy(torch.tensor(1.0))[1] == "picky"
    assert toy(torch.tensor(-1.0))[1] == "plain"


def test_argument_and_environment_force_a_version(toy, monkeypatch):
    assert toy(torch.tensor(1.0), version="ordered")[1] == "ordered"
    monkeypatch.setenv(module.VARIABLE, "other=x,toy=reference")
    assert toy(torch.tensor(1.0))[1] == "reference"
    assert toy(torch.tensor(1.0), version="plain")[1] == "plain"


def test_a_version_for_another_device_is_never_picked_and_runs_by_name_in_the_interpreter_only(monkeypatch):
    versions = {"triton": Version(lambda x: (x, "triton"), device="cuda", flops=lambda case: 7)}
    op = Op("toy", lambda x: (x, "reference"), versions, {}, lambda *a: {}, lambda c: 3)
    assert op(torch.tensor(1.0))[1] == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op(torch.tensor(1.0))[1] == "reference" and op(torch.tensor(1.0), version="triton")[1] == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="tensors are on cpu; it needs cuda, or TRITON_INTERPRET=1"):
        op(torch.tensor(1.0), version="triton")
    assert op.flops({}) == 3 and op.flops({}, "triton") == 7


@pytest.mark.parametrize("fault", ["none", "a gradient", "an error"])
def test_a_version_without_a_record_is_picked_after_it_agreed_where_it_runs(lab, fault, monkeypatch, caplog):
    runs = []

    def fast(**args):
        if fault == "an error":
            raise RuntimeError("no kernel image")
        runs.append(1)
        y, state = linear_recurrence.get("chunked")(**args)
        y = y + 1e-3 * (y - y.detach()) if fault == "a gradient" else y
        return y, state

    versions = {"fast": Version(fast, device="cuda", untried=True), "chunked": linear_recurrence.versions["chunked"]}
    op = replace(linear_recurrence, versions=versions)
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(module, "_said", set())
    monkeypatch.setattr(module, "_device", lambda args, kwargs: "cuda")
    caplog.set_level(logging.INFO, "hybridlab.kernels")
    args = lab.make(op, TINY, torch.float32)
    for _ in range(2):
        op(**args)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    if fault == "none":
        assert len(runs) == 4 and not said  # two cases of the trial, two calls
    else:
        assert len(said) == 1 and ("d_" if fault == "a gradient" else "no kernel image") in said[0]
        assert any("runs as 'chunked'" in r.getMessage() for r in caplog.records)
    op(**args | {"v": args["v"].bfloat16(), "q": args["q"].bfloat16(), "k": args["k"].bfloat16()})
    assert len(trial._found) == 2  # each dtype has its own trial


def test_every_triton_version_is_tried_before_it_is_used_until_a_gpu_has_a_record_of_it():
    assert all(op.versions["triton"].untried for op in OPS if "triton" in op.versions)


def test_a_lazy_function_is_imported_when_it_is_called():
    assert lazy("math", "hypot")(3, 4) == 5
    missing = lazy("hybridlab.kernels.no_such_module", "f")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        missing()


def test_launch_settings_come_from_the_table_of_the_gpu_and_may_be_forced(monkeypatch):
    table = {"H200": {"walk": {"key=64,value=64": {"num_warps": 8}}}}
    monkeypatch.setattr(triton_launch, "_table", lambda op: table)
    default = {"num_warps": 4, "num_stages": 2}
    assert triton_launch.settings("toy", "walk", default, key=64, value=64) == default
    monkeypatch.setattr(triton_launch, "_gpu", lambda: "H200")
    assert triton_launch.settings("toy", "walk", default, key=64, value=64) == {"num_warps": 8, "num_stages": 2}
    assert triton_launch.settings("toy", "walk", default, key=64, value=128) == default
    with triton_launch.using("walk", num_stages=1):
        assert triton_launch.settings("toy", "walk", default, key=64, value=64) == {"num_warps": 8, "num_stages": 1}
        assert triton_launch.settings("toy", "other", default, key=64, value=64) == default
    assert triton_launch.settings("toy", "walk", default, key=1, value=1) == default


def test_unknown_and_refusing_versions_raise(toy, monkeypatch):
    with pytest.raises(ValueError, match=r"no version 'fast'; it has \['reference', 'ordered', 'picky', 'plain'\]"):
        toy(torch.tensor(1.0), version="fast")
    with pytest.raises(ValueError, match="version='picky' refuses this call: x=-2.0 < 0"):
        toy(torch.tensor(-2.0), version="picky")
    monkeypatch.setenv(module.VARIABLE, "toy")
    with pytest.raises(ValueError, match="HYBRIDLAB_KERNELS='toy': write op=version"):
        toy(torch.tensor(1.0))


def test_the_choice_is_logged_once(toy, caplog):
    caplog.set_level(logging.INFO, "hybridlab.kernels")
    for _ in range(3):
        toy(torch.tensor(-1.0))
    assert [r.getMessage() for r in caplog.records] == ["toy runs as 'plain' (picky refused: x=-1.0 < 0)"]


def test_autocast_does_not_reach_inside(lab):
    args = lab.make(linear_recurrence, TINY, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_recurrence(**args, version="chunked")
    plain = linear_recurrence.get("chunked")(**args)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


BAD = [
    (dict(k=torch.zeros(4, 5, 2, 7)), r"k has shape \[4, 5, 2, 7\], but must be \[b t g k\].*k=8"),
    (dict(v=torch.zeros(4, 5, 3, 4), log_decay=None), r"2 groups of q and k do not divide 3 heads of v"),
    (dict(log_decay=torch.full((4, 5, 8), 0.5)), r"log_decay ranges over 0.5 to 0.5, but must stay within -inf to 0"),
    (dict(state=torch.zeros(1, 8, 8, 16)), r"state has shape \[1, 8, 8, 16\].*\[4, 8, 8, 16\]"),
    (dict(offsets=torch.tensor([0, 10])), r"batch=4 with offsets; flatten the batch to one row of 20 tokens"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[next(iter(c)) for c, _ in BAD])
def test_arguments_that_do_not_fit_are_refused_with_their_values(lab, change, message):
    with pytest.raises(ValueError, match=message):
        linear_recurrence(**lab.make(linear_recurrence, TINY, torch.float32) | change)


@pytest.mark.parametrize("offsets", [[0, 4], [1, 5], [0, 3, 2, 5], [0.0, 5.0], [0]], ids=str)
def test_offsets_that_do_not_cover_the_tokens_are_refused(lab, offsets):
    args = lab.make(linear_recurrence, TINY | dict(batch=1, state=False), torch.float32)
    with pytest.raises(ValueError, match="offsets"):
        linear_recurrence(**args | dict(offsets=torch.tensor(offsets)))


def test_step_sizes_and_poles_out_of_range_are_refused(lab):
    args = lab.make(delta_rule, delta_rule.cases["tiny"])
    with pytest.raises(ValueError, match="beta ranges over .* within 0 to 2"):
        delta_rule(**args | dict(beta=args["beta"] + 2))
    args = lab.make(selective_scan, selective_scan.cases["irregular"])
    with pytest.raises(ValueError, match="A ranges over .* within -inf to 0"):
        selective_scan(**args | dict(A=-args["A"]))
    with pytest.raises(ValueError, match="delta ranges over .* within 0 to inf"):
        selective_scan(**args | dict(delta=-args["delta"]))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_costs_are_positive_and_grow_with_the_case(op):
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < op.bytes(op.cases["tiny"], dtype) < op.bytes(op.cases["long"], dtype)
    assert 0 < op.flops(op.cases["tiny"]) < op.flops(op.cases["long"])


@pytest.mark.long
@pytest.mark.parametrize("op", [op for op in OPS if "chunked" in op.versions], ids=lambda op: op.name)
def test_compiled_in_one_graph_equals_eager(lab, op):
    for case in ("tiny", "packed"):
        args = lab.make(op, op.cases[case], torch.float32)
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        upstream = lab.draw_upstream(op, args, seed=0)
        eager, got = lab.evaluate(op, args, upstream), lab.evaluate(compiled, args, upstream)
        assert all(lab.error(got[name], eager[name]) < 1e-6 for name in eager)
