"""Scores are sums that do not depend on how rows are batched, and the command measures what it is told to."""

import json
import math
from typing import Any

import pytest
import torch

from hybridlab import checkpoint
from hybridlab import evaluate as cli
from hybridlab.config import ConfigError, build
from hybridlab.data.batch import Batch
from hybridlab.evaluation.score import evaluate, figures, score
from hybridlab.generation.command import command
from hybridlab.packing import Packing
from hybridlab.tokenizer import Tokenizer

BLOCK = {
    "_target_": "hybridlab.models.block.Block",
    "_partial_": True,
    "mixer": {"_target_": "hybridlab.models.mixers.retention.Retention", "_partial_": True, "n_heads": 2},
}
MODEL = {
    "_target_": "hybridlab.models.lm.HybridLM", "vocab_size": 257, "d_model": 16, "pattern": ["mix"], "n_layers": 2,
    "blocks": {"mix": BLOCK},
}  # fmt: skip


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(MODEL, "model")


class Rows:
    """Two documents per row, at random; the last row is short."""

    token_bytes = Tokenizer.from_bytes().token_bytes

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(256, (5, 13), generator=draw)
        self.tokens[:, 6] = 256
        self.targets = self.tokens.roll(-1, 1)
        self.targets[:, -1] = self.targets[4, 3:] = -100

    def n_rows(self, split: str) -> int:
        return 5

    def rows(self, split: str, indices: Any) -> Batch:
        tokens = self.tokens[indices]
        return Batch(tokens, self.targets[indices], Packing.from_starts(tokens == 256), torch.as_tensor(indices))


def test_score_is_the_loss_of_each_document_alone(model):
    model, data = model.double(), Rows()
    nats = torch.zeros(()).double()
    tokens, right, size = 0, 0, 0
    for row, targets in zip(data.tokens, data.targets, strict=True):
        for part in (slice(0, 6), slice(6, 13)):
            logp = model(row[None, part]).logits[0].log_softmax(-1)
            for i, target in enumerate(targets[part].tolist()):
                if target != -100:
                    nats -= logp[i, target]
                    tokens, right = tokens + 1, right + int(logp[i].argmax() == target)
                    size += target != 256
    found = score(model, data.rows("valid", torch.arange(5)), data.token_bytes)
    assert found[1:].tolist() == [tokens, right, size]
    assert abs(found[0] - nats) < 1e-9 * nats
    expected = {"loss": nats / tokens, "accuracy": right / tokens, "bits_per_byte": nats / math.log(2) / size}
    for batch_size in (1, 2, 5, 8):
        figures_found = evaluate(model, data, batch_size=batch_size)
        assert all(abs(figures_found[k] - v) < 1e-9 for k, v in expected.items()) and figures_found["rows"] == 5
    assert evaluate(model, data, rows=2)["tokens"] == 24


def test_without_known_bytes_there_are_no_bits_per_byte(model):
    data = Rows()
    assert "bits_per_byte" not in figures(score(model, data.rows("valid", [0, 1])))
    data.n_rows = lambda split: 0
    with pytest.raises(ValueError, match="no held-out rows"):
        evaluate(model, data)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"text {i} " * 30)
    return folder


def source(texts, tokenizer="bytes", vocab_size=257):
    return {
        "_target_": "hybridlab.data.text.TextFiles", "paths": [str(texts)], "tokenizer": tokenizer,
        "valid_ratio": 0.15, "vocab_size": vocab_size, "seq_len": 16, "batch_size": 4,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path, model, texts):
    Tokenizer.from_bytes().save(tmp_path / "tokenizer.json")
    config = {"model": MODEL, "data": source(texts)}
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    checkpoint.save(folder, model.state_dict(), config, tokenizer=tmp_path / "tokenizer.json")
    return tmp_path / "run"


@pytest.fixture
def call(capsys, tmp_path):
    def call(*args: str):
        code = command(cli.evaluate_run, cli.__doc__, [*args, f"cache={tmp_path / 'cache'}"], ConfigError)
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.err.strip().splitlines()[-1]

    return call


def test_the_command_scores_the_runs_own_data_and_others(call, run, texts):
    code, own = call(f"run={run}")
    assert code == 0 and own["bytes"] == 210 and 7 < own["bits_per_byte"] < 11
    code, fewer = call(f"run={run}", "rows=2", "batch_size=1")
    assert code == 0 and fewer["rows"] == 2 and fewer["tokens"] == 32
    paths = [f"data.paths=[{texts}/0.txt,{texts}/2.txt]", "data.valid_ratio=0.5"]
    code, other = call(f"run={run}", "data=text", *paths, "data.seq_len=32")
    assert code == 0 and other["bytes"] == 210 and other["data"] != own["data"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["dta=text"], "nearest: data"),
        (["data=txet"], "text"),
        (["data.seq_len=3"], "data=NAME"),
        (["data=text", "data.tokenizer=bpe"], "tokenized as the run was"),
        (["data=text", "data.pahts=[x]"], "paths"),
        (["rows=0"], "rows=0"),
        (["batch_size=-1"], "batch_size=-1"),
        (["run=nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(call, run, args, said):
    code, err = call(f"run={run}", *args)
    assert code == 2 and said in err


def test_data_in_other_tokens_are_refused(call, run, model, texts, tmp_path):
    config = {"model": MODEL, "data": source(texts, "bpe", 260)}
    checkpoint.save(run / "checkpoints" / "step-2", model.state_dict(), config, tokenizer=tmp_path / "tokenizer.json")
    code, err = call(f"run={run}")
    assert code == 2 and "tokens" in err
    code, anew = call(f"run={run}", "data=text", f"data.paths=[{texts}]", "data.valid_ratio=0.5", "data.seq_len=32")
    assert code == 0, anew


def test_recall_is_scored_by_its_answers(call, tmp_path, model):
    data = {"_target_": "hybridlab.data.recall.Recall", "vocab_size": 64, "seq_len": 24, "batch_size": 4}
    folder = checkpoint.save(tmp_path / "recall" / "step-1", model.state_dict(), {"model": MODEL, "data": data})
    code, found = call(f"run={folder}", "rows=10")
    assert code == 0 and found["tokens"] == 80 and 0 <= found["accuracy"] < 0.3 and "bits_per_byte" not in found
