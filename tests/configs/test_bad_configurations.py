"""Every bad configuration: exit code 2, at most 6 lines, the key, the value, the rule, the nearest valid name."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlab.config import main

ROOT = Path(__file__).resolve().parents[2]
TINY = "+config=hybrid_tiny"
ATTN, SSM = "model.blocks.attn.mixer", "model.blocks.ssm.mixer"
BAD = [  # (command line after +config=hybrid_tiny, what the message must say)
    # names
    ("optim.lrr=1", ["optim.lrr", "1", "nearest valid: lr"]),
    ("data=python_stdlb", ["data", "'python_stdlb'", "nearest valid: python_stdlib"]),
    ("sead=1", ["sead", "1", "nearest valid: seed"]),
    ("model.n_layer=3", ["model.n_layer", "3", "nearest valid: n_layers"]),
    (f"{ATTN}.n_head=2", [f"{ATTN}.n_head", "2", "nearest valid: n_heads"]),
    ("optim.schedule.warmup=0.1", ["optim.schedule.warmup", "0.1", "nearest valid: warmup_ratio"]),
    (f"mixer@{ATTN}=atention", ["mixer", "'atention'", "nearest valid: attention"]),
    (f"mixr@{ATTN}=attention", ["mixr", "'attention'", "nearest valid: mixer"]),
    (f"{ATTN}._target_=hybridlab.models.mixers.attention.Atention", ["Atention", "nearest valid:", ".Attention"]),
    (
        f"{ATTN}._target_=hybridlab.models.mixers.attenton.Attention",
        ["attenton", "nearest valid:", "attention.Attention"],
    ),
    ("~optm", ["optm", "nearest valid: optim"]),
    # types
    ("optim.lr=abc", ["optim.lr", "'abc'", "number"]),
    ("optim.lr=nan", ["optim.lr", "nan", "number"]),
    ("optim.tokens=1e6", ["optim.tokens", "1000000.0", "nearest valid: 1000000"]),
    (f"{ATTN}.qk_norm=1", [f"{ATTN}.qk_norm", "1", "true or false"]),
    ("trainer.precision=fp31", ["trainer.precision", "'fp31'", "nearest valid: fp32"]),
    ("model=3", ["model", "3", "_target_"]),
    (f"{ATTN}=attention", [ATTN, "'attention'", f"GROUP@{ATTN}=NAME"]),
    ("optim.schedule=cosine", ["optim.schedule", "'cosine'", "Cosine"]),
    (f"{ATTN}._partial_=false", [ATTN, "'Attention'", "_partial_: true"]),
    (f"{ATTN}.d_model=64", [f"{ATTN}.d_model", "64", "not to be set"]),
    # ranges
    ("optim.lr=-1", ["optim.lr", "-1", "above 0"]),
    ("seed=-1", ["seed", "-1", "from 0"]),
    (f"{ATTN}.n_heads=5", [f"{ATTN}.n_heads", "5", "64"]),
    # layout
    ("model.pattern=[ssm,atn]", ["model.pattern", "atn", "attn"]),
    ("model.pattern=SA", ["model.pattern", "'SA'", "letters"]),
    ("model.places.9.mixer.window=3", ["model.places", "9", "from 0 to 3"]),
    ("model.places.1.mixer.window=abc", ["model.places.1.mixer.window", "'abc'", "whole number"]),
    ("model.shared={a:[0,1]}", ["model.shared", "[0, 1]", "attn"]),
    ("model.shared={a:[0,2]} model.places.2.mixer.d_state=8", ["model.places", "2", "share"]),
    # clashes
    ("model.vocab_size=100", ["model.vocab_size", "100", "257"]),
    ("trainer.micro_batch_size=3", ["trainer.micro_batch_size", "3", "batch_size=8"]),
    ("resume=banana", ["resume", "'banana'", "auto"]),
    ("init_from=/no/such/folder", ["init_from", "'/no/such/folder'"]),
    # the grammar of the command line
    ("optim.lr", ["optim.lr", "KEY=VALUE"]),
    ("optim.lr=[1", ["optim.lr", "'[1'", "KEY=VALUE"]),
    ("optim.lr=1,2", ["optim.lr", "'1,2'", "--multirun"]),
    ("model.vocab_size=${data.vocabsize}", ["model.vocab_size", "data.vocabsize"]),
    ("model.d_model=???", ["model.d_model", "???", "missing"]),
    ("--multirun optim.lr=1e-3,abc", ["optim.lr", "'abc'", "number"]),
    ("--multirun seed=0,1 run_dir=runs/same", ["run_dir", "'runs/same'", "${name}"]),
]
MORE = [  # of the same kinds
    ("model.places.1.mixer.n_heads=7", ["model.places.1.mixer.n_heads", "7", "64"]),
    ("init_allow=[a]", ["init_allow", "['a']", "init_from"]),
    ("model.pattern=[ssm]", ["model.blocks", "attn"]),
    ("model.n_layers=0", ["model.n_layers", "0"]),
    ("data.batch_size=0", ["data.batch_size", "0"]),
    ("objective.z_loss=-0.1", ["objective.z_loss", "-0.1", "0 or more"]),
    (f"ffn@{ATTN}=swiglu", [ATTN, "swiglu"]),
    ("seed=abc", ["seed", "'abc'", "whole number"]),
    ("optim.lr.value=0.1", ["optim.lr", "{'value': 0.1}", "number"]),
    ("optim=admw", ["optim", "'admw'", "nearest valid: adamw"]),
    ("optin=adamw", ["optin", "'adamw'", "nearest valid: optim"]),
    ("logger=wandbb", ["logger", "'wandbb'", "nearest valid: wandb"]),
    ("dryrun=true", ["dryrun", "True", "nearest valid: dry_run"]),
    (f"{ATTN}.windw=2", [f"{ATTN}.windw", "2", "nearest valid: window"]),
    ("trainer.max_minuts=3", ["trainer.max_minuts", "3", "nearest valid: max_minutes"]),
    ("objective.zloss=0.1", ["objective.zloss", "0.1", "nearest valid: z_loss"]),
    ("data.seqlen=64", ["data.seqlen", "64", "nearest valid: seq_len"]),
    (f"{ATTN}._target_=nowhere.at.all.X", [f"{ATTN}._target_", "'nowhere.at.all.X'"]),
    (f"{ATTN}._target_=attention", [f"{ATTN}._target_", "'attention'", "package.module.Class"]),
    ("optim.lr=true", ["optim.lr", "True", "number"]),
    ("optim.lr=[0.1]", ["optim.lr", "[0.1]", "number"]),
    ("optim.tokens=null", ["optim.tokens", "None", "whole number"]),
    ("name=5", ["name", "5", "text"]),
    ("dry_run=3", ["dry_run", "3", "true or false"]),
    ("model.tied=no_thanks", ["model.tied", "'no_thanks'", "true or false"]),
    ("trainer.sample_prompts=hello", ["trainer.sample_prompts", "'hello'", "list"]),
    ("logger.kind=wanb", ["logger.kind", "'wanb'", "nearest valid: wandb"]),
    ("model.blocks.attn.norm=prr", ["model.blocks.attn.norm", "'prr'", "nearest valid: pre"]),
    ("optim=3", ["optim", "3"]),
    ("model.blocks=[attn]", ["model.blocks", "[attn]"]),
    (f"{ATTN}._partial_=maybe", [f"{ATTN}._partial_", "'maybe'", "true or false"]),
    (f"{ATTN}._args_=[1]", [f"{ATTN}._args_", "[1]"]),
    ("optim.schedule.warmup_ratio=2", ["optim.schedule.warmup_ratio", "2", "from 0 to 1"]),
    ("trainer.save_every=0", ["trainer.save_every", "0", "above 0"]),
    ("data.seq_len=-4", ["data.seq_len", "-4"]),
    ("model.d_model=0", ["model", "0"]),
    (f"{ATTN}.n_heads=0", [f"{ATTN}", "n_heads", "0"]),
    (f"{SSM}.head_dim=48", [SSM, "48"]),
    ("model.pattern=SAX model.letters={S:ssm,A:attn}", ["model.pattern", "X"]),
    ("model.pattern=SS model.letters={S:ssm,A:attn}", ["model.letters", "A"]),
    ("model.letters={S:ssm,A:attn}", ["model.letters", "S"]),
    ("model.pattern=[]", ["model.pattern", "[]"]),
    ("model.places.x.mixer.window=3", ["model.places.x", "3"]),
    ("model.places.1=3", ["model.places.1", "3"]),
    ("model.places.1.mixr.window=3", ["model.places.1.mixr", "3", "nearest valid: mixer"]),
    ("model.shared={a:[0,8]}", ["model.shared", "[0, 8]"]),
    (
        "optim.schedule.warmup_ratio=0.9 optim.schedule.decay_ratio=0.9",
        ["optim.schedule.warmup_ratio", "0.9", "decay_ratio"],
    ),
    ("resume=atuo", ["resume", "'atuo'", "nearest valid: auto"]),
    ("init_from=. resume=..", ["init_from", "'.'", "resume"]),
    ("optim=adamw optim.tokens=???", ["optim.tokens", "???", "missing"]),
    ("~model.d_model", ["model.d_model", "missing"]),
    ("~optim", ["optim", "_target_"]),
    ("hydra.run.dir=x", ["hydra.run.dir", "Hydra"]),
]
CASES = [*BAD, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]
NAMES = [line for line, _ in [*BAD, *MORE]]


def never(config, parts):
    raise AssertionError("a bad configuration was run")


def assert_short(text: str) -> None:
    assert "Traceback" not in text
    assert 1 <= len(text.strip().splitlines()) <= 6, text
    assert "rule: " in text


@pytest.mark.parametrize(("line", "said"), CASES, ids=NAMES)
def test_a_bad_configuration_is_refused_in_few_words(line, said, capsys):
    assert main(never, argv=[TINY, *line.split()]) == 2
    captured = capsys.readouterr()
    assert_short(captured.err)
    assert not captured.out
    for word in said:
        assert word in captured.err, f"{word!r} is not in\n{captured.err}"


def test_without_a_model_the_configs_are_listed(capsys):
    assert main(never, argv=[]) == 2
    text = capsys.readouterr().err
    assert_short(text)
    assert all(word in text for word in ("model", "+config=", "hybrid_small", "transformer_small"))


def test_an_unknown_config_is_refused_with_the_nearest_one(capsys):
    assert main(never, argv=["+config=hybrid_smal"]) == 2
    text = capsys.readouterr().err
    assert_short(text)
    assert "'hybrid_smal'" in text and "nearest valid: hybrid_small" in text


def test_a_config_named_without_plus_is_told_about_it(capsys):
    assert main(never, argv=["config=hybrid_small"]) == 2
    text = capsys.readouterr().err
    assert_short(text)
    assert "nearest valid: +config=hybrid_small" in text


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(never, argv=[TINY, "--mulitrun"])
    assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) <= 6


@pytest.mark.parametrize(
    "mistake", ["model: {d_model: [", "model: !!python/object/apply:os.system [touch canary]", "- a\n- b"]
)
def test_a_broken_file_is_refused_and_runs_nothing(mistake, tmp_path, capsys, monkeypatch):
    configs = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (configs / "config" / "broken.yaml").write_text(f"# @package _global_\n{mistake}\n")
    monkeypatch.chdir(tmp_path)
    assert main(never, configs, argv=["+config=broken"]) == 2
    assert_short(capsys.readouterr().err)
    assert not (tmp_path / "canary").exists()


def test_there_are_at_least_forty_of_them():
    assert len(BAD) >= 40


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param("optim=admw", "nearest valid: adamw", marks=pytest.mark.long),
        pytest.param("optim.lr=abc", "'abc'", marks=pytest.mark.long),
        (f"{ATTN}.n_heads=5", "n_heads = 5"),
    ],
    ids=["hydra's error", "a type", "a constructor's error"],
)
def test_the_command_refuses_within_three_seconds(line, said):
    """In seconds of processor time, which other programs on the machine do not take part in."""

    def seconds(*command: str) -> tuple[float, subprocess.CompletedProcess]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torch_alone, _ = seconds("-c", "import torch")
    for _ in range(3):  # the quickest of three: a busy machine also slows the processor
        taken, done = seconds("train.py", TINY, line)
        assert done.returncode == 2 and said in done.stderr
        assert_short(done.stderr)
        if taken <= max(3.0, torch_alone + 1.0):
            return
    raise AssertionError(f"{taken:.1f} s of processor time, and torch alone takes {torch_alone:.1f} s")


def test_nothing_heavy_is_imported_before_the_check_is_through():
    code = f"""
import sys
from hybridlab.config import main
heavy = {{"lightning", "wandb", "datasets", "transformers", "matplotlib", "tensorboard", "torch._dynamo"}}
main(lambda config, parts: print("loaded", sorted(heavy & set(sys.modules))) or 0, argv=[{TINY!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "loaded []", done.stdout + done.stderr
