"""Draw the curves of several run folders: python experiments/2026-11-hybrid-small/plot.py runs/A runs/B …

Writes curve.png and results.json beside this file.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main(runs: list[Path]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    results = {}
    for run in runs:
        lines = read(run)
        name = json.loads((run / "run.json").read_text())["config"]["name"].rsplit("-", 1)[0]
        steps = [line for line in lines if "loss" in line]
        window = 10
        smooth = [
            sum(s["loss"] for s in steps[max(0, i - window) : i + 1]) / len(steps[max(0, i - window) : i + 1])
            for i in range(len(steps))
        ]
        left.plot([s["tokens"] / 1000 for s in steps], smooth, label=name)
        scored = [line for line in lines if "valid_bits_per_byte" in line]
        bar = right.bar(name, scored[-1]["valid_bits_per_byte"], width=0.5)  # earlier ones are over a few rows only
        right.bar_label(bar, fmt="%.3f")
        speeds = sorted(s["time/tokens_per_second"] for s in steps)
        results[name] = {
            "tokens": steps[-1]["tokens"],
            "bits_per_byte": scored[-1]["valid_bits_per_byte"],
            "median_tokens_per_second": speeds[len(speeds) // 2],
            "environment": {
                key: value
                for key, value in json.loads((run / "run.json").read_text())["environment"].items()
                if key not in ("host", "git_changes")
            },
        }
    left.set(xlabel="thousand tokens", ylabel="training loss, nats per token", title="mean of 10 steps")
    right.set(ylabel="bits per byte", title="all held-out files, at the end", xlim=(-1, len(runs)), ylim=(0, 1.7))
    for name, value in [("xz -9e", 1.2257), ("gzip -9", 1.4870)]:
        right.axhline(value, color="grey", lw=0.8, ls="--")
        right.annotate(name, (-0.95, value), va="bottom", fontsize=8)
    left.legend()
    figure.tight_layout()
    figure.savefig(HERE / "curve.png", dpi=110)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
