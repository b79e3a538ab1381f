"""What the loop, logging and data add to the bare step (forward, backward, optimizer) of `hybrid_small`'s model."""

import json
import time
from pathlib import Path

from hybridlab.config import main
from hybridlab.training.module import TrainingModule
from hybridlab.training.run import fit

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = 12


def test_lightning_logging_and_data_add_less_than_five_percent(tmp_path, monkeypatch):
    bare = []
    for name in ("_accumulate", "_move"):
        work = getattr(TrainingModule, name)

        def timed(self, *args, work=work):
            began = time.perf_counter()
            out = work(self, *args)
            bare.append(time.perf_counter() - began)
            return out

        monkeypatch.setattr(TrainingModule, name, timed)
    monkeypatch.setenv("WANDB_MODE", "offline")
    small = ["+config=hybrid_small", "data=python_tiny", "data.seq_len=512", "data.batch_size=8"]
    limits = [
        "trainer.precision=fp32",
        f"trainer.max_tokens={STEPS * 8 * 512}",
        "trainer.valid_rows=1",
        "trainer.sample_prompts=[]",
    ]
    assert main(fit, CONFIGS, [*small, *limits, f"run_dir={tmp_path / 'run'}", f"cache={tmp_path}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [a + b for a, b in zip(bare[::2], bare[1::2], strict=True)]
    # validation and checkpoints stand outside of a step's time; the first steps warm up
    ratios = sorted(line["time/seconds"] / step - 1 for line, step in list(zip(lines, steps, strict=True))[2:])
    overhead = ratios[len(ratios) // 2]
    print(f"overhead {overhead:.2%} of a step of {sorted(steps)[STEPS // 2]:.2f} s")
    assert overhead < 0.05
