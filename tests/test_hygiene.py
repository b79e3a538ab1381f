"""What importing us does to others, and what nobody may do: reach the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, cwd: Path, *paths: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_package_called_kernels_is_not_hidden_from_the_root(tmp_path):
    """Hugging Face publishes one, and transformers imports it by that bare name, also from our root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("class CUDAProperties: pass\n")
    code = "import sys; sys.path.insert(0, ''); import hybridlab.kernels.ops; from kernels import CUDAProperties"
    run(code, ROOT, tmp_path)


def test_importing_us_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, hybridlab, hybridlab.config, hybridlab.models.lm, hybridlab.kernels.ops, hybridlab.data.text;"
        "heavy = {'lightning', 'wandb', 'datasets', 'transformers', 'triton', 'matplotlib', 'hydra', 'pandas'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run(code, tmp_path).strip() == "[]"


def test_importing_us_costs_little_beyond_torch(tmp_path):
    code = (
        "import time, torch; start = time.process_time();"
        "import hybridlab, hybridlab.models.lm, hybridlab.kernels.ops; print(time.process_time() - start)"
    )
    assert float(run(code, tmp_path)) < 2


@pytest.mark.long
def test_the_wheel_holds_the_rooms_and_no_bare_names(tmp_path):
    import zipfile

    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "hybridlab/models/lm.py" in names and "hybridlab/kernels/linear_recurrence/chunked.py" in names
    assert not [name for name in names if name.startswith(("models/", "kernels/", "tests/"))]


def test_no_test_and_nothing_it_starts_reaches_the_network(tmp_path):
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    with pytest.raises(OSError, match="NETWORK REACHED"):
        exec(code)
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "NETWORK REACHED" in started.stderr
