"""Short training runs through train.py: tokens per second, share of peak, and the loss they reach.

python experiments/gpu/training.py OUT.json [--tokens 4000000] [--seconds 80] [--smoke]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, Record


def train(config: str, tokens: int, seconds: float, more: list[str]) -> dict[str, Any]:
    """One run in a process of its own; raises RuntimeError with the end of what it said when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", f"+config={config}", f"trainer.max_tokens={tokens}", "logger=none"]
        command += ["trainer.valid_rows=1", "trainer.sample_prompts=[]", f"run_dir={folder}/run", f"cache={folder}"]
        run = subprocess.run(command + more, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds))
        if run.returncode:
            raise RuntimeError(f"exit code {run.returncode}: {(run.stdout + run.stderr)[-1500:]}")
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    steps = [step for step in map(json.loads, lines) if "time/tokens_per_second" in step]
    warm = steps[len(steps) // 3 :]  # kernels are compiled in the first ones
    found = {"steps": len(steps), "last": {n: x for n, x in steps[-1].items() if isinstance(x, int | float)}}
    for name in ("time/tokens_per_second", "time/share_of_peak"):
        if name in steps[-1]:
            found[name] = statistics.median(step[name] for step in warm)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    record, end = Record(asked.out, asked.seconds), time.monotonic() + asked.seconds
    configs, tokens, more = ["hybrid_small", "transformer_small"], asked.tokens, []
    if asked.smoke:
        configs, tokens, more = ["hybrid_debug"], 2000, ["trainer.precision=fp32", "trainer.accelerator=cpu"]
    for config in configs:
        record.case(config, lambda c=config: train(c, tokens, end - time.monotonic(), more))
    return 0 if record.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
