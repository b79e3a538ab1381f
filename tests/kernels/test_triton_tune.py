"""The tuner's choice, with a toy op and a clock of our own."""

import json

import pytest
import torch

from hybridlab.kernels import triton_launch, triton_tune
from hybridlab.kernels.op import Op, Version

DEFAULT = {"BLOCK": 1, "num_warps": 4}


def toy(x, scale):
    """Wrong at BLOCK=8, out of memory at 16."""
    chosen = triton_launch.settings("toy", "walk", DEFAULT, width=x.shape[1])
    clock[0] = chosen["BLOCK"]
    if chosen["BLOCK"] == 16:
        raise RuntimeError("out of shared memory")
    return (x * scale * (1.01 if chosen["BLOCK"] == 8 else 1.0),)


clock = [0]
SECONDS = {1: 1.0, 2: 0.99, 4: 0.5, 8: 0.1, 16: 0.1, 32: 0.7}
OPTIONS = {"walk": [{"BLOCK": block} for block in (2, 4, 8, 16, 32)], "unused": [{"BLOCK": 1}]}


@pytest.fixture
def op():
    return Op("toy", toy, {"triton": Version(toy)}, {}, lambda *a: {}, lambda c: 0)


def timer(fn):
    fn()
    return SECONDS[clock[0]]


def find(op, options=OPTIONS):
    args = dict(x=torch.randn(3, 4, requires_grad=True), scale=torch.tensor(2.0, requires_grad=True))
    return [*triton_tune.tune(op, args, options, timer)]


def test_the_fastest_that_agrees_is_chosen_and_the_others_are_named(op):
    found = find(op)
    assert [(kernel, sizes, chosen) for kernel, sizes, chosen, _ in found if chosen] == [
        ("walk", "width=4", {"BLOCK": 4})
    ]
    said = "\n".join(line for *_, line in found)
    assert "{'BLOCK': 8}: refused, 1.0e-02 from the default's results" in said
    assert "{'BLOCK': 16}: refused, RuntimeError: out of shared memory" in said


def test_a_gain_within_the_noise_changes_nothing(op):
    assert [chosen for *_, chosen, _ in find(op, {"walk": [{"BLOCK": 2}]}) if chosen] == []


def test_what_is_written_is_what_launches_read_and_other_entries_stay(tmp_path, op, monkeypatch):
    path = tmp_path / "launch.json"
    path.write_text(json.dumps({"H200": {"walk": {"width=8": {"BLOCK": 2}}}}))
    triton_tune.write(path, "H200", [("walk", "width=4", {"BLOCK": 4})])
    monkeypatch.setattr(triton_launch, "_table", lambda name: json.loads(path.read_text()))
    monkeypatch.setattr(triton_launch, "_gpu", lambda: "H200")
    for width, block in ((4, 4), (8, 2), (5, 1)):
        assert triton_launch.settings("toy", "walk", DEFAULT, width=width) == DEFAULT | {"BLOCK": block}
    assert [p.name for p in tmp_path.iterdir()] == ["launch.json"]


def test_candidates_of_every_op_are_found_and_few():
    for op in triton_tune.OPS:
        if "triton" in op.versions:
            found = triton_tune.candidates(op)
            assert found and all(0 < len(options) <= 8 for options in found.values()), op.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert triton_tune.main(["op=causal_conv"]) == 2
    assert capsys.readouterr().out == "settings of causal_conv are measured on a GPU, and torch sees none\n"
    assert triton_tune.main(["op=nothing"]) == 2
    assert "usage" in capsys.readouterr().out
