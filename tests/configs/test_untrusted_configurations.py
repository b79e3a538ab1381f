"""A configuration from somebody else chooses no code: only classes of hybridlab, or of packages named as trusted."""

import json
import sys

import pytest

from hybridlab.config import ConfigError, build, compose

CANARY = (
    "from pathlib import Path\nPath({path!r}).write_text('ran')\nclass Model:\n    def __init__(self):\n        pass\n"
)
ATTACKS = [
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "subprocess.Popen",
    "torch.load",
    "torch.nn.Linear",
    "pickle.loads",
    "functools.partial",
    "hydra.utils.instantiate",
    "hybridlab.config.compose.subprocess.Popen",
    "hybridlab.config.compose.os.system",
    "hybridlab.config.compose.Path",
    "hybridlab.config.nodes.functools.partial",
    "hybridlab.config.nodes.fit",
    "hybridlab.models.lm.Tensor",
    "hybridlab.models.lm.nn.Linear",
    "hybridlab..models.lm.HybridLM",
    ".os.system",
    "hybridlab",
    "hybridlab_evil.Model",
    "os",
    "",
    None,
    ["os.system"],
    {"_target_": "os.system"},
]


@pytest.fixture(scope="module")
def text() -> str:
    """A model's configuration as a checkpoint holds it."""
    return json.dumps(compose(["+config=hybrid_tiny"])["model"])


@pytest.fixture
def model(text) -> dict:
    return json.loads(text)


@pytest.mark.parametrize("target", ATTACKS, ids=str)
@pytest.mark.parametrize("place", ["the model", "a mixer", "an option"])
def test_no_class_from_elsewhere_is_built(target, place, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = {"_target_": target, "args": "touch canary", "command": "touch canary", "_args_": ["touch canary"]}
    if place == "a mixer":
        model["blocks"]["attn"]["mixer"] = {**node, "_partial_": True}
    elif place == "an option":
        model["d_model"] = node
    with pytest.raises(ConfigError):
        build(node if place == "the model" else model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trusted", [(), ("otherpkg",)])
def test_a_foreign_module_is_not_even_imported(trusted, tmp_path, monkeypatch):
    (tmp_path / "canarypkg.py").write_text(CANARY.format(path=str(tmp_path / "canary")))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="trust"):
        build({"_target_": "canarypkg.Model"}, trusted=trusted)
    assert "canarypkg" not in sys.modules and not (tmp_path / "canary").exists()


def test_a_trusted_package_is_built(tmp_path, monkeypatch):
    (tmp_path / "trustedpkg.py").write_text("class Model:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(build({"_target_": "trustedpkg.Model"}, trusted=("trustedpkg",))).__name__ == "Model"
    sys.modules.pop("trustedpkg")


def test_places_are_no_way_in(model):
    model["places"] = {"1": {"mixer": {"_target_": "os.system", "_partial_": True}}}
    with pytest.raises(ConfigError, match="trust"):
        build(model)


def test_an_honest_configuration_is_built(model):
    assert type(build(model)).__name__ == "HybridLM"
