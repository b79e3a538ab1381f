"""The definitions and the chunked versions against numbers computed by published code (`make oracles`)."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hybridlab.kernels.ops import OPS

FOLDER = Path(__file__).parent.parent / "oracles"
OP = {op.name: op for op in OPS}
TOLERANCE = 1e-10  # the numbers are float64 throughout, and tens of steps long


def read(path):
    """(op or None, tensors by group: arg, up, out, grad)"""
    groups = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = file.get_tensor(name)
        return json.loads(file.metadata()["about"]).get("op"), groups


def options(op, groups):
    """What no tensor says: Mamba's scan passes its step sizes through softplus when it gives them a bias."""
    return {"softplus": True} if op == "selective_scan" and "delta_bias" in groups["arg"] else {}


FOUND = {path.stem: read(path) for path in sorted(FOLDER.glob("*.safetensors"))}
RUNS = [
    pytest.param(OP[op], groups, version, id=f"{name}-{version}")
    for name, (op, groups) in FOUND.items()
    if op is not None
    for version in ("reference", "chunked")
]


def test_there_are_oracles_for_every_recurrence():
    counts = Counter(op for op, _ in FOUND.values())
    assert counts == {"linear_recurrence": 7, "delta_rule": 6, "selective_scan": 2, None: 2}  # Mamba-3 is a mixer


@pytest.mark.parametrize("op, groups, version", RUNS)
def test_op_equals_published_code(lab, op, groups, version):
    args = {name: x.clone().requires_grad_(name in groups["grad"]) for name, x in groups["arg"].items()}
    outs = dict(zip(("y", "state"), op(**args, **options(op.name, groups), version=version), strict=True))
    for name, want in groups["out"].items():
        assert lab.error(outs[name].detach(), want) <= TOLERANCE, name
    pairs = [(outs[name], groups["up"][name]) for name in groups["out"]]
    compared, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(compared, [args[name] for name in groups["grad"]], upstream)
    for (name, want), got in zip(groups["grad"].items(), grads, strict=True):
        assert lab.error(got, want) <= TOLERANCE, f"d{name}"
