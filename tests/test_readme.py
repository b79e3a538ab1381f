"""The README does what it says: its commands run, shortened as stated here, and its mixer obeys the laws."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COVERED = {
    "make train": "make check-long",
    "make test": ".ci/run",
    "pytest": ".ci/run, through make test",
    "pytest tests/benchmarks": "make check-long",
}
TINY = "optim.tokens=2048 data.seq_len=64 trainer.valid_rows=2 trainer.sample_tokens=4 logger=none "
SMALL = "optim.tokens=8192 trainer.valid_rows=2 trainer.sample_tokens=4 "
EMA = "'~model.blocks.ssm.mixer' '+model.blocks.ssm.mixer={_target_: my_mixer.Ema, _partial_: true}'"
TRAIN_EMA = f"python train.py +config=hybrid_tiny {EMA}"


class Run(NamedTuple):
    shorter: str  # overrides that the test adds
    says: str  # a pattern found in what the command prints
    long: bool = False


RUNS = {
    "python train.py +config=hybrid_small": Run(SMALL, r"bits per byte", long=True),
    "python train.py +config=hybrid_small model.n_layers=8 optim.lr=0.01": Run(
        SMALL, r"\n +7  attn|\n +7  ssm", long=True
    ),
    "python train.py +config=hybrid_small dry_run=true": Run(
        "data=python_tiny data.seq_len=64 model.d_model=64 logger=none", "dry run"
    ),
    "python train.py +config=hybrid_small --cfg job": Run("", r"(?m)^model:$"),
    "python train.py +config=hybrid_tiny --multirun seed=0,1": Run(TINY, r"(?s)\[1/2\].*\[2/2\]", long=True),
    'python -m hybridlab.generate run=runs/NAME prompt="def "': Run("tokens=8 trust=my_mixer", r"def .*tokens/s"),
    "python -m hybridlab.evaluate run=runs/NAME": Run("rows=2 trust=my_mixer", '"bits_per_byte": '),
    "python -m pytest test_my_mixer.py": Run("-q", r"\d\d passed", long=True),
    TRAIN_EMA: Run(TINY, r"0  ssm +Ema "),
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_every_command_is_run_here_or_covered_elsewhere():
    assert sorted(commands()) == sorted([*RUNS, *COVERED])


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder like the root of the repository, with the README's two python blocks as the files it names."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(ROOT / "train.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    mixer, test = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "`my_mixer.py`" in README and "`test_my_mixer.py`" in README
    (folder / "my_mixer.py").write_text(mixer)
    (folder / "test_my_mixer.py").write_text(test)
    return folder


def call(desk: Path, command: str, shorter: str) -> str:
    """What a command prints, run in `desk`; it must succeed."""
    _, *words = shlex.split(f"{command} {shorter}")
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, *words], cwd=desk, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(desk) -> tuple[Path, str]:
    """The run folder of the README's own mixer, and what its training printed."""
    before = set(desk.glob("runs/*"))
    said = call(desk, TRAIN_EMA, RUNS[TRAIN_EMA].shorter)
    (folder,) = set(desk.glob("runs/*")) - before
    return folder.relative_to(desk), said


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.long if run.long else ()) for c, run in RUNS.items()]
)
def test_a_command_of_the_readme_does_what_it_says(request, desk, command):
    run = RUNS[command]
    if command == TRAIN_EMA:
        said = request.getfixturevalue("trained")[1]
    elif "runs/NAME" in command:
        name = str(request.getfixturevalue("trained")[0])
        said = call(desk, command.replace("runs/NAME", name), run.shorter)
    else:
        said = call(desk, command, run.shorter)
    assert re.search(run.says, said, re.DOTALL), said[-3000:]


def test_the_same_command_again_says_that_the_run_is_complete(desk, trained):
    steps = (desk / trained[0] / "metrics.jsonl").read_text()
    assert "complete" in call(desk, TRAIN_EMA, RUNS[TRAIN_EMA].shorter)
    assert (desk / trained[0] / "metrics.jsonl").read_text() == steps


@pytest.mark.long
def test_the_users_own_mixer_is_built_only_when_trusted(desk, trained):
    with pytest.raises(AssertionError, match=r"refused: .*my_mixer\.Ema.*trust"):
        call(desk, f"python -m hybridlab.generate run={trained[0]} prompt=x", "tokens=1")
