"""Random models over bytes, and a checkpoint of one."""

from pathlib import Path

import pytest
import torch

from hybridlab import checkpoint
from hybridlab.config import build
from hybridlab.tokenizer import Tokenizer


def node(mixer: str, **options) -> dict:
    target = {"_target_": f"hybridlab.models.mixers.{mixer}", "_partial_": True, **options}
    block = {"_target_": "hybridlab.models.block.Block", "_partial_": True, "mixer": target}
    model = {"_target_": "hybridlab.models.lm.HybridLM", "vocab_size": 257, "d_model": 16, "pattern": ["mix"]}
    return {**model, "n_layers": 2, "blocks": {"mix": block}}


MODELS = {
    "gated_delta": node("gated_delta.GatedDelta", n_heads=2),
    "mamba2": node("mamba2.Mamba2", head_dim=8, d_state=8),
}


# the decoder asks nothing of a mixer that one of them does not show
@pytest.fixture(params=["gated_delta", pytest.param("mamba2", marks=pytest.mark.long)])
def model(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(MODELS[request.param], "model").eval()


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    Tokenizer.from_bytes().save(folder / "tokenizer.json")
    config = {"model": MODELS["mamba2"]}
    state = build(MODELS["mamba2"], "model").state_dict()
    checkpoint.save(folder / "checkpoints" / "step-00000001", state, config, tokenizer=folder / "tokenizer.json")
    return folder
