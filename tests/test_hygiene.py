"""What importing us does to others, and what nobody may do: reach the network."""

import importlib.util
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


@pytest.mark.long
def test_transformers_peft_and_trl_import_from_the_root_beside_the_real_package():
    """With Hugging Face's `kernels` installed; reported as skipped where one of the four is not."""
    needed = ("transformers", "peft", "trl", "kernels")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"not installed: {missing}")
    code = (
        "import sys; sys.path.insert(0, ''); import hybridlab.kernels.ops, transformers.modeling_utils, peft, trl;"
        "import kernels; print(kernels.__file__, kernels.get_kernel)"
    )
    assert "site-packages" in run(code, ROOT)


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
