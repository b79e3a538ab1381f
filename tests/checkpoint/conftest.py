"""A small model of real parts, and a run folder that holds it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybridlab import checkpoint
from hybridlab.config import build
from hybridlab.tokenizer import Tokenizer

BLOCK = {
    "_target_": "hybridlab.models.block.Block",
    "_partial_": True,
    "mixer": {"_target_": "hybridlab.models.mixers.retention.Retention", "_partial_": True, "n_heads": 2},
}
MODEL = {
    "_target_": "hybridlab.models.lm.HybridLM",
    "vocab_size": 257,
    "d_model": 16,
    "pattern": ["mix"],
    "n_layers": 2,
    "blocks": {"mix": BLOCK},
    "places": {1: {"mixer": {"n_heads": 4}}},
}


@pytest.fixture
def config() -> dict[str, Any]:
    return {"model": MODEL, "seed": 0}


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(MODEL, "model")


@pytest.fixture
def run(tmp_path: Path, model, config) -> Path:
    """A run folder with checkpoints of steps 1 and 2."""
    Tokenizer.from_bytes().save(tmp_path / "tokenizer.json")
    for step in (1, 2):
        checkpoint.save(
            tmp_path / "run" / "checkpoints" / f"step-{step:08d}",
            model.state_dict(),
            config,
            tokenizer=tmp_path / "tokenizer.json",
            trainer={"step": step, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        )
    return tmp_path / "run"


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"
