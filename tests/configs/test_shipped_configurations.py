"""Every configuration we ship composes, passes the check, and says the truth in its comments."""

import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from hybridlab.config import build, check, compose

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "config").glob("*.yaml"))
PARTS = sorted(path.relative_to(CONFIGS) for room in ("mixer", "ffn") for path in (CONFIGS / room).glob("*.yaml"))
ALL = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))


@cache
def composed(name: str) -> dict:
    return compose([f"+config={name}"])


@cache
def n_params(name: str) -> int:
    return build(composed(name)["model"]).n_params()[0]


def test_the_promised_ones_are_there():
    promised = {"hybrid_small", "transformer_small", "mamba2_small", "jamba_small", "hybrid_tiny", "hybrid_debug"}
    assert promised <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_check_under_its_own_name(name):
    config = composed(name)
    check(config)
    assert re.fullmatch(rf"{name}-[0-9a-f]{{6}}", config["name"])
    assert config["run_dir"] == f"runs/{config['name']}"


@pytest.mark.parametrize("path", ALL, ids=str)
def test_it_says_what_it_is_for(path):
    lines = (CONFIGS / path).read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ") and len(first) > 20


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_it_claims_are_true(name):
    claimed = re.search(r"params: ([\d,_]+)", (CONFIGS / "config" / f"{name}.yaml").read_text())
    assert claimed or name.endswith("_debug"), "say `# params: N`"
    if claimed:
        assert int(re.sub("[,_]", "", claimed[1])) == n_params(name)


def test_the_transformer_is_as_large_as_the_hybrid():
    assert n_params("transformer_small") == pytest.approx(n_params("hybrid_small"), rel=0.02)


@pytest.mark.parametrize("other", ["transformer_small", "mamba2_small", "jamba_small"])
def test_small_ones_share_data_and_optimizer(other):
    assert all(composed(other)[key] == composed("hybrid_small")[key] for key in ("data", "optim", "objective"))


@pytest.mark.parametrize("path", PARTS, ids=str)
def test_every_mixer_and_feed_forward_file_builds(path):
    node = yaml.safe_load((CONFIGS / path).read_text())
    assert node["_partial_"] is True
    assert build(node)(64).d_model == 64


def test_jamba_has_one_attention_in_eight_and_experts_in_every_second_layer():
    rows = build(composed("jamba_small")["model"]).table()
    assert [row.mixer for row in rows].count("Attention") * 8 == len(rows)
    assert [row.ffn == "MoE" for row in rows] == [place % 2 == 1 for place in range(len(rows))]


@pytest.mark.parametrize("path", [p for p in ALL if p.parts[0] != "config" and len(p.parts) > 1], ids=str)
def test_every_key_stands_in_the_constructor(path):
    node = yaml.safe_load((CONFIGS / path).read_text())
    module, _, name = node.pop("_target_").rpartition(".")
    node.pop("_partial_", None)
    cls = getattr(importlib.import_module(module), name)
    assert node.keys() <= inspect.signature(cls).parameters.keys()
