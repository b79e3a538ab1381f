"""What a command line means: overrides, places, names and hashes, users' own classes, many runs at once."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from hybridlab.config import ConfigError, build, check, compose, fingerprint, main

ROOT = Path(__file__).resolve().parents[2]
TINY = "+config=hybrid_tiny"
MINE = '''
from hybridlab.models.mixers.attention import Attention

class Mine(Attention):
    """A mixer of the user's own."""
'''


def with_files(tmp_path: Path, **files: str) -> Path:
    """A copy of our configs with files of the user's own."""
    folder = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name, text in files.items():
        (folder / f"{name.replace('__', '/')}.yaml").write_text(text)
    return folder


def built(config):
    return build(config["model"], trusted=None)


@cache
def tiny_name() -> str:
    return compose([TINY])["name"]


def test_a_default_that_stands_in_no_file_can_be_overridden():
    config = compose([TINY, "optim.momentum=0.5", "model.tied=false", "model.blocks.attn.mixer.qk_norm=true"])
    parts = check(config)
    assert parts.optim.momentum == 0.5
    assert parts.model_factory().head is not None and config["model"]["blocks"]["attn"]["mixer"]["qk_norm"] is True


def test_places_override_single_layers_from_a_file_and_from_the_command_line(tmp_path):
    places = "{1: {mixer: {window: 5, sinks: true}}}"
    text = f"# @package _global_\ndefaults: [hybrid_tiny, _self_]\nmodel: {{places: {places}}}\n"
    configs = with_files(tmp_path, config__placed=text)
    line = [
        "+config=placed",
        "model.places.1.mixer.window=7",
        "model.places.3.mixer.window=9",
        "model.places.2.norm=post",
    ]
    config = compose(line, configs)
    assert config["model"]["places"] == {
        1: {"mixer": {"window": 7, "sinks": True}}, 3: {"mixer": {"window": 9}}, 2: {"norm": "post"}
    }  # fmt: skip
    for model in (built(config), built(json.loads(json.dumps(config)))):  # a checkpoint's JSON has the place "1"
        layers = model.by_place()
        assert (layers[1].mixer.window, layers[3].mixer.window) == (7, 9)
        assert layers[1].mixer.sinks is not None and layers[3].mixer.sinks is None
        assert layers[2].around_mixer.norm_sum and not layers[0].around_mixer.norm_sum


def test_a_place_may_hold_another_mixer():
    node = "{_target_: hybridlab.models.mixers.mamba.Mamba, _partial_: true}"
    model = built(compose([TINY, f"model.places={{1: {{mixer: {node}}}}}"]))
    assert [row.mixer for row in model.table()] == ["Mamba2", "Mamba", "Mamba2", "Attention"]


def test_a_choice_within_the_model_can_be_changed():
    node = compose([TINY, "ffn@model.blocks.attn.ffn=geglu"])["model"]["blocks"]["attn"]["ffn"]
    assert node["_target_"].endswith("GeGLU")


@pytest.mark.parametrize(
    "override", ["optim.lr=0.5", "data.seq_len=32", "seed=1", "objective.z_loss=0.1", "model.tied=false"]
)
def test_what_decides_the_result_changes_the_name(override):
    assert tiny_name() != compose([TINY, override])["name"]


def test_limits_and_loggers_do_not():
    limits = ["trainer.max_minutes=1", "logger=csv", "cache=/elsewhere", "resume=never"]
    assert tiny_name() == compose([TINY, *limits])["name"]


def test_the_fingerprint_survives_json_and_the_order_of_overrides():
    one = compose([TINY, "model.places.1.norm=post", "optim.momentum=0.5", "optim.beta1=0.8"])
    other = compose([TINY, "optim.beta1=0.8", "optim.momentum=0.5", "model.places={1: {norm: post}}"])
    assert fingerprint(one) == fingerprint(other) == fingerprint(json.loads(json.dumps(one)))


def test_a_name_and_a_folder_can_be_given():
    assert compose([TINY, "name=mine"])["run_dir"] == "runs/mine"
    assert compose([TINY, "run_dir=/somewhere"])["run_dir"] == "/somewhere"


def test_cfg_job_prints_what_will_run(capsys):
    assert main(lambda *_: 1 / 0, argv=[TINY, "--cfg", "job", "optim.lr=0.5"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == compose([TINY, "optim.lr=0.5"])
    assert printed["model"]["vocab_size"] == printed["data"]["vocab_size"]


def test_help_names_the_configs(capsys):
    with pytest.raises(SystemExit) as left:
        main(lambda *_: 1 / 0, argv=["--help"])
    assert left.value.code == 0 and "transformer_small" in capsys.readouterr().out


def test_a_users_own_module_is_a_target(tmp_path, monkeypatch):
    """A module on the path and a config file, no registration."""
    configs = with_files(tmp_path, mixer__mine="_target_: mine.Mine\n_partial_: true\n")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    line = [TINY, "mixer@model.blocks.attn.mixer=mine"]
    assert main(lambda _, parts: found.append(parts.model_factory().table()[-1].mixer) or 0, configs, line) == 0
    assert found == ["Mine"]


JOBS = """
import json, sys
from pathlib import Path
from hybridlab.config import main
def run(config, parts):
    with Path("jobs.jsonl").open("a") as file:
        print(json.dumps([config[k] for k in ("seed", "name", "run_dir")] + [parts.logger.kind]), file=file)
    return int(config["seed"] == 1)
sys.exit(main(run, Path({configs!r})))
"""


def multirun(tmp_path: Path, *line: str) -> tuple[int, list]:
    (tmp_path / "train.py").write_text(JOBS.format(configs=str(ROOT / "configs")))
    command = [sys.executable, "train.py", TINY, "--multirun", *line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    file = tmp_path / "jobs.jsonl"
    return done.returncode, [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.long
def test_multirun_gives_every_job_its_own_folder_and_logger(tmp_path):
    code, jobs = multirun(tmp_path, "seed=1", "logger=csv,none")
    assert code == 1, "the first exit code that is not 0"
    assert [(job[0], job[3]) for job in jobs] == [(1, "csv"), (1, "none")]
    assert len({job[1] for job in jobs}) == len({job[2] for job in jobs}) == 2


@pytest.mark.long
def test_multirun_runs_every_combination_under_its_own_name(tmp_path):
    code, jobs = multirun(tmp_path, "seed=range(2,4)", "optim.lr=0.001,0.002")
    assert code == 0 and [job[0] for job in jobs] == [2, 2, 3, 3]
    assert len({job[1] for job in jobs}) == 4 and all(job[2] == f"runs/{job[1]}" for job in jobs)


def test_multirun_starts_every_job_under_its_own_name_and_returns_the_first_failure(monkeypatch, capsys):
    started = []

    class Process:
        def __init__(self, command):
            started.append(command[2:])

        def wait(self):
            return len(started) - 1

    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(lambda *_: 1 / 0, argv=[TINY, "--multirun", "seed=3,4", "logger=csv,none"]) == 1
    jobs = [compose(line) for line in started]
    assert [(job["seed"], job["logger"]["kind"]) for job in jobs] == [(3, "csv"), (3, "none"), (4, "csv"), (4, "none")]
    assert len({job["name"] for job in jobs}) == len({job["run_dir"] for job in jobs}) == 4
    started.clear()
    assert main(lambda *_: 1 / 0, argv=[TINY, "--multirun", "seed=2,3", "model.d_model=64,abc"]) == 2 and not started


class Picky:
    def __init__(self, size: int, *, ratio: float = 0.5, sizes: tuple[int, ...] = (), of: dict[str, int] | None = None):
        self.given = (size, ratio, sizes, of)


def test_values_become_what_the_constructor_is_annotated_with(monkeypatch):
    import types

    module = types.ModuleType("picky_module")
    module.Picky, Picky.__module__ = Picky, "picky_module"
    monkeypatch.setitem(sys.modules, "picky_module", module)
    node = {"_target_": "picky_module.Picky", "size": 1, "sizes": [1, 2], "of": {3: 4}}
    assert build(node, "x", None).given == (1, 0.5, (1, 2), {"3": 4})
    for key, value in {"size": True, "ratio": "1", "sizes": [1, "2"], "of": [1]}.items():
        with pytest.raises(ConfigError, match=f"x.{key}"):
            build({**node, key: value}, "x", None)
    partial = build({"_target_": "picky_module.Picky", "_partial_": True, "ratio": 1}, "x", None)
    assert partial(7).given == (7, 1, (), None)
