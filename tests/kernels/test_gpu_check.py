"""The script for machines with a GPU runs from end to end; here in Triton's interpreter, on tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments/gpu/check.sh"


def check(folder, *words):
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, env=environment)


@pytest.mark.long
def test_the_check_for_gpus_runs_every_stage(tmp_path):
    run = check(tmp_path, "--smoke")
    assert run.returncode == 0, run.stdout + (tmp_path / "log.txt").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"machine", "agree", "laws", "bench", "train"}
    for stage in ("agree", "laws", "bench", "train"):
        assert any(row["ok"] for row in results[stage]) and not [row for row in results[stage] if row["ok"] is False]
    assert "times mean nothing" in (tmp_path / "report.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "report.md", "results.json"]


def test_an_unknown_stage_is_refused_with_those_there_are(tmp_path):
    run = check(tmp_path, "agreement")
    assert run.returncode == 2 and "[agree] [laws] [bench] [train]" in run.stdout
