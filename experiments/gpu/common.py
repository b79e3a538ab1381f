"""What the stages of `check.sh` share: the machine, the tests' own tools, and a record that survives a stage's end."""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"  # the CPU, in Triton's interpreter, proves the scripts only


def tests_lab() -> ModuleType:
    """tests/kernels/conftest.py, without pytest where there is none."""
    if importlib.util.find_spec("pytest") is None:
        sys.modules["pytest"] = SimpleNamespace(fixture=lambda *a, **k: lambda f: f)  # type: ignore[assignment]
    spec = importlib.util.spec_from_file_location("kernel_lab", ROOT / "tests/kernels/conftest.py")
    assert spec is not None and spec.loader is not None
    lab = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lab)
    return lab


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_properties(0) if CUDA else None
    return {
        "gpu": gpu.name if gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "cuda": torch.version.cuda,
        "driver": smi("driver_version"),
        "clocks": smi("clocks.sm,clocks.max.sm,clocks.mem"),
        "python": platform.python_version(),
        "commit": commit or os.environ.get("COMMIT", "unknown"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {n: installed(n) for n in ("torch", "triton", "flash-linear-attention", "fla-core", "mamba-ssm")},
    }


def smi(query: str) -> str | None:
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def plain(value: Any) -> Any:
    """As JSON can hold it: no NaN, no infinity."""
    if isinstance(value, dict):
        return {name: plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Record:
    """Rows of one stage, on disk after each; past `seconds` no further row is begun, and what was left out is said."""

    def __init__(self, path: str, seconds: float):
        self.path, self.end, self.rows = Path(path), time.monotonic() + seconds, []  # type: ignore[var-annotated]

    def case(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        began = time.monotonic()
        if began > self.end:
            row: dict[str, Any] = {"ok": None, "why": "out of time"}
        else:
            try:
                row = {"ok": True} | work()
            except Exception as error:  # one case that fails must not hide the others
                traceback.print_exc(limit=-4)
                row = {"ok": False, "why": f"{type(error).__name__}: {str(error)[:500]}"}
        row = {"name": name} | plain(row) | {"wall_s": round(time.monotonic() - began, 2)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.rows, indent=1))
        beside.replace(self.path)

    def passed(self) -> bool:
        return all(row["ok"] is not False for row in self.rows)
