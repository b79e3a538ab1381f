"""What is special to the convolution's Triton kernels; agreement and fuzz run over all ops elsewhere."""

import pytest
import torch

from hybridlab.kernels import triton_launch
from hybridlab.kernels.causal_conv import causal_conv

TRITON = causal_conv.get("triton")
PACKED = causal_conv.cases["packed"] | dict(d_model=5, time=12, docs=(5, 0, 1, 6, 0))


def test_results_do_not_depend_on_the_order_of_programs_and_every_place_is_stored(lab, in_any_order):
    args = lab.make(causal_conv, PACKED, torch.float32)
    upstream = lab.draw_upstream(causal_conv, args, seed=1)
    with triton_launch.using("forward", TIME=8, CHANNELS=4), triton_launch.using("backward", TIME=8, CHANNELS=4):
        got = in_any_order(lambda: lab.evaluate(TRITON, args, upstream))
    truth = lab.evaluate(causal_conv.reference, lab.cast(args, torch.float64), upstream)
    assert all(lab.error(got[name], truth[name]) < 1e-6 for name in truth)


@pytest.mark.parametrize("state", [True, False], ids=["from a state", "from nothing"])
def test_nan_in_one_document_reaches_no_other_in_values_or_gradients(lab, state):
    args = lab.make(causal_conv, PACKED | dict(state=state), torch.float32)
    upstream = lab.draw_upstream(causal_conv, args, seed=2)
    clean = lab.evaluate(TRITON, args, upstream)
    places = [("x", 3, (0, 6)), ("x", 2, (0, 5))] + [("state", 0, (0,)), ("state", 3, (3,))] * state
    for name, victim, place in places:
        bad = args[name].clone()
        bad[place] = torch.nan
        got = lab.evaluate(TRITON, args | {name: bad}, upstream)
        others = torch.ones(12, dtype=torch.bool)
        others[{0: slice(0, 5), 2: slice(5, 6), 3: slice(6, 12)}[victim]] = False
        rows = [row for row in range(5) if row != victim]
        for out in ("out0", "dx"):
            assert torch.equal(got[out][:, others], clean[out][:, others]), (name, victim, out)
        for out in ("out1", "dstate") if state else ("out1",):
            assert torch.equal(got[out][rows], clean[out][rows]), (name, victim, out)
        assert got["out0"].isnan().any()


def test_tiles_do_not_matter(lab):
    args = lab.make(causal_conv, PACKED | dict(width=5, d_model=3), torch.float32)
    upstream = lab.draw_upstream(causal_conv, args, seed=3)
    plain = lab.evaluate(TRITON, args, upstream)
    with triton_launch.using("forward", TIME=1, CHANNELS=4), triton_launch.using("backward", TIME=4, CHANNELS=2):
        small = lab.evaluate(TRITON, args, upstream)
    assert all(lab.error(small[name], plain[name]) < 1e-6 for name in plain)


def test_what_it_cannot_serve_is_refused_with_its_values(lab):
    args = lab.make(causal_conv, causal_conv.cases["tiny"] | dict(width=9), torch.float32)
    with pytest.raises(ValueError, match="width=9; it unrolls at most 8 taps"):
        causal_conv(**args, version="triton")
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        causal_conv(**lab.cast(args, torch.float64), version="triton")


def test_no_tokens_pass_the_state_and_its_gradient_through(lab):
    args = lab.make(causal_conv, causal_conv.cases["tiny"] | dict(time=0), torch.float32)
    upstream = lab.draw_upstream(causal_conv, args, seed=4)
    got = lab.evaluate(TRITON, args, upstream)
    assert torch.equal(got["out1"], args["state"].double()) and torch.equal(got["dstate"], upstream[1])
    assert not got["dweight"].any() and not got["dbias"].any()


@pytest.mark.long
def test_the_registration_keeps_the_rules_of_torch_library(lab):
    from hybridlab.kernels.causal_conv.triton_conv import _conv

    for case in (PACKED, causal_conv.cases["tiny"] | dict(bias=False, state=False)):
        args = lab.make(causal_conv, case, torch.float32)
        for x in args.values():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_()
        torch.library.opcheck(_conv, tuple(args.values()))


@pytest.mark.long
def test_compiled_in_one_graph_equals_eager(lab):
    args = lab.make(causal_conv, PACKED, torch.float32)
    upstream = lab.draw_upstream(causal_conv, args, seed=5)

    def run(**args):
        return causal_conv(**args, version="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, got = lab.evaluate(run, args, upstream), lab.evaluate(compiled, args, upstream)
    assert all(torch.equal(got[name], eager[name]) for name in eager)
