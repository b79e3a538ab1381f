"""Put the parts of the stages together: results.json and report.md.

python experiments/gpu/report.py PARTS OUT
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import machine

Rows = list[dict[str, Any]]


def failures(rows: Rows) -> Rows:
    return [row for row in rows if row["ok"] is False]


def summary(name: str, rows: Rows) -> list[str]:
    skipped = [row for row in rows if row["ok"] is None]
    passed = len(rows) - len(skipped) - len(failures(rows))
    lines = [f"## {name}", "", f"{passed} passed, {len(failures(rows))} failed, {len(skipped)} not run.", ""]
    lines += [f"- FAILED {row['name']}: {row.get('why', row)}" for row in failures(rows)]
    lines += [f"- not run: {row['name']}: {row.get('why')}" for row in skipped]
    return [*lines, ""]


def bench_table(rows: Rows) -> list[str]:
    head = "| case | ours fwd / fwd+bwd ms | of bound | peer fwd / fwd+bwd ms | faster by | worst error ours / peer |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        if "forward_ms" not in row:
            continue
        forward, training, errors = row["forward_ms"], row["training_ms"], row.get("errors")
        worst = {n: max(e.values(), key=float) for n, e in errors.items()} if isinstance(errors, dict) else {}
        ours = f"{forward['ours']} / {training['ours']}"
        of_bound = f"{row['of_bound']['forward']} / {row['of_bound']['training']}"
        for peer in [n for n in forward if n != "ours"] or [None]:
            theirs = f"{peer}: {forward[peer]} / {training[peer]}" if peer else "none ran"
            gain = f"{row['speedup'][peer]['forward']} / {row['speedup'][peer]['training']}" if peer else ""
            wrong = f"{worst.get('ours', '')} / {worst.get(peer, '')}"
            lines.append(f"| {row['name']} | {ours} | {of_bound} | {theirs} | {gain} | {wrong} |")
        lines += [f"| | | | {peer} did not run: {why} | | |" for peer, why in row["peers"].items()]
    return [*lines, ""]


def main(parts: Path, out: Path) -> int:
    stages: dict[str, Rows] = {}
    for path in sorted(parts.glob("*.json")):
        stages.setdefault(path.stem.split("-")[0], []).extend(json.loads(path.read_text()))
    facts = machine()
    (out / "results.json").write_text(json.dumps({"machine": facts} | stages, indent=1) + "\n")
    kind = facts["gpu"] or "no GPU: Triton's interpreter on a CPU, so that times mean nothing"
    text = [f"# {kind}, {facts['date']}", "", "```", json.dumps(facts, indent=1), "```", ""]
    for name, rows in stages.items():
        text += summary(name, rows)
        if name == "bench":
            text += bench_table(rows)
        if name == "train":
            text += [f"- {row['name']}: {row.get('time/tokens_per_second')} tokens/s, share of peak "
                     f"{row.get('time/share_of_peak')}, after {row.get('steps')} steps {row.get('last')}"
                     for row in rows if row["ok"]]  # fmt: skip
    (out / "report.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    return 1 if any(map(failures, stages.values())) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
