"""The first losses of the debug configurations, as recorded in golden.json; run as a script, this file records anew.

Without compiled kernels, whose last bits also depend on the system's compiler.
"""

import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hybridlab.config import main
from hybridlab.kernels.native import VARIABLE
from hybridlab.training.run import fit

CONFIGS, GOLDEN = Path(__file__).resolve().parents[2] / "configs", Path(__file__).with_name("golden.json")
QUICK = ["hybrid_debug", "jamba_debug"]
NAMES = sorted(path.stem for path in (CONFIGS / "config").glob("*_debug.yaml"))
STEPS, TOKENS = 5, 4 * 64  # per step, in all debug configurations
FLAGS = ("fma", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16")


def machine() -> dict[str, object]:
    """All that the last bits depend on, beside the code."""
    info, path = {}, Path("/proc/cpuinfo")
    for line in path.read_text().split("\n\n")[0].splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        info[key.strip().lower()] = value.strip()
    flags = set(info.get("flags", info.get("features", "")).split())
    return {
        "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "threads": 1,
        "cpu": info.get("vendor_id", platform.machine()), "flags": [flag for flag in FLAGS if flag in flags],
    }  # fmt: skip


def first_losses(name: str, folder: Path) -> list[float]:
    """Of a run in `folder`, on one thread, all of it in plain torch."""
    native = os.environ.pop(VARIABLE, None)
    os.environ[VARIABLE] = "0"
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (1, 2, 15)}
    torch.set_num_threads(1)
    try:
        limits = [
            f"trainer.max_tokens={STEPS * TOKENS}",
            "data.valid_seq_len=64",
            f"run_dir={folder / name}",
            f"cache={folder}",
        ]
        assert main(fit, CONFIGS, [f"+config={name}", *limits]) == 0
    finally:
        os.environ.pop(VARIABLE)
        os.environ |= {VARIABLE: native} if native is not None else {}
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in NAMES])
def test_the_first_losses_are_the_recorded_ones(name, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    found, expected = first_losses(name, tmp_path), golden["losses"][name]
    if golden["machine"] == machine():
        assert found == expected
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == STEPS


def test_the_recorded_losses_are_of_the_debug_configurations():
    assert sorted(json.loads(GOLDEN.read_text())["losses"]) == NAMES


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: first_losses(name, Path(folder)) for name in NAMES}
    GOLDEN.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")
    print(f"recorded {', '.join(losses)} in {GOLDEN}", file=sys.stderr)
