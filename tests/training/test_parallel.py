"""Two gloo processes on a CPU do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hybridlab import checkpoint
from hybridlab.training.data import StepLoader
from hybridlab.training.module import TrainingModule
from hybridlab.training.objectives.next_token import NextToken
from hybridlab.training.optimizers import Muon
from hybridlab.training.parallel import gather
from hybridlab.training.settings import TrainerSettings

ROOT = Path(__file__).resolve().parents[2]
TINY = ["+config=hybrid_tiny", "optim.tokens=4096", "data.seq_len=64", "trainer.precision=fp32", "logger=none"]


def one_step(model, corpus, micro):
    """Gradients, loss and rows of the third step of a global batch of 6 rows."""
    module = TrainingModule(
        model, Muon(tokens=1), NextToken(), TrainerSettings(micro_batch_size=micro, clip_norm=None), total_steps=9,
        bf16=False,
    )  # fmt: skip
    optimizer, found = module.configure_optimizers(), {}
    module.optimizers = lambda use_pl_optimizer=True: optimizer
    module._move = lambda params, lr, scale: found.update({n: p.grad.clone() for n, p in model.named_parameters()})
    batch = StepLoader(corpus, seed=0, batch_size=6, steps=9)[2]
    module.training_step(batch, 0)
    return found, module.record["loss"], gather(batch.rows)


def worker(rank, folder, model, corpus, micro):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(one_step(model, corpus, micro[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("moe", [False, True])
def test_two_processes_have_the_gradients_and_rows_of_one(tiny, moe):
    model = tiny.model(moe)
    expected, loss, rows = one_step(model, tiny.corpus, None)
    # micro-batches differ between the ranks, as after running out of memory on one of them
    mp.start_processes(worker, (str(tiny.path), model, tiny.corpus, (1, None)), 2, start_method="fork")
    for rank in range(2):
        found, other_loss, other_rows = torch.load(tiny.path / f"{rank}.pt")
        assert other_rows.tolist() == rows.tolist() and other_loss == pytest.approx(loss, rel=1e-6)
        for name, g in expected.items():
            assert (found[name] - g).norm() <= 1e-6 * g.norm() + 1e-9, name


def train(folder, *overrides):
    command = [
        sys.executable,
        ROOT / "train.py",
        *TINY,
        f"cache={folder.parent / 'cache'}",
        f"run_dir={folder}",
        *overrides,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, lines, checkpoint.load_state(checkpoint.find(folder))


@pytest.mark.long
def test_a_run_on_two_processes_and_one_continued_on_another_count_equal_one(tmp_path):
    _, alone, weights = train(tmp_path / "one")
    _, together, found = train(tmp_path / "two", "trainer.devices=2")
    _, _, _ = train(tmp_path / "mixed", "trainer.max_tokens=2000")
    said, mixed, last = train(tmp_path / "mixed", "trainer.devices=2")
    assert "1 processes before, 2 now" in said
    for lines, state in ((together, found), (mixed, last)):
        assert [line["rows"] for line in lines] == [line["rows"] for line in alone]
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone], rel=1e-4)
        for name, w in weights.items():
            torch.testing.assert_close(state[name], w, rtol=1e-3, atol=1e-4)
