"""Real runs of `hybrid_tiny`, killed and signalled at random moments: they end as if nothing had happened."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hybridlab import checkpoint

DRIVER = Path(__file__).resolve().parents[1] / "drills" / "driver.py"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORT = ["+config=hybrid_tiny", "trainer.save_every=6", "trainer.valid_every=10", "trainer.valid_rows=2", "logger=none"]
SHORT += ["data.valid_seq_len=512", "trainer.sample_tokens=4"]
SHORT += ["trainer.precision=fp32", "trainer.accelerator=cpu", "optim.tokens=16384", "data.seq_len=64"]


class Runs:
    """A server that has imported everything, and runs the training command in forks."""

    def __init__(self, folder: Path):
        env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.folder, pipe = folder, subprocess.PIPE
        self.server = subprocess.Popen([sys.executable, DRIVER], stdin=pipe, stdout=pipe, text=True, env=env)
        self.log = folder / "log.txt"

    def __call__(self, name, *overrides, after=None, number=None):
        """Exit status of a run in folder `name`, sent signal `number` after so many seconds; below 0 if killed."""
        command = [*SHORT, f"run_dir={self.folder / name}", f"cache={self.folder / 'cache'}", *overrides]
        self.server.stdin.write(json.dumps([command, str(self.log)]) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        timer = threading.Timer(after, os.kill, (pid, number)) if number else None
        if timer:
            timer.start()
        status = int(self.server.stdout.readline())
        if timer:
            timer.cancel()
        return status


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    yield runs
    runs.server.stdin.close()
    runs.server.wait(30)


@pytest.fixture(scope="module")
def whole(runs):
    return uninterrupted(runs, "whole")


def uninterrupted(runs, name, *overrides):
    """A run that nothing disturbs: its folder, and its duration in seconds."""
    assert runs("prepare", "dry_run=true", *overrides) == 0, runs.log.read_text()[-3000:]
    began = time.monotonic()
    assert runs(name, *overrides) == 0, runs.log.read_text()[-3000:]
    return runs.folder / name, time.monotonic() - began


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def digest(folder):
    """SHA-256 of the newest checkpoint's weights, optimizer, guard, data position and random generators."""
    newest, sha = checkpoint.find(folder), hashlib.sha256()

    def add(node):
        if isinstance(node, torch.Tensor):
            sha.update(node.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(node, dict | list | tuple):
            for part in [x for pair in node.items() for x in pair] if isinstance(node, dict) else node:
                add(part)
        else:
            sha.update(repr(node).encode())

    add(checkpoint.load_state(newest))
    add(checkpoint.load_trainer(newest))
    return newest.name, sha.hexdigest()


def assert_unscathed(folder, whole):
    assert digest(folder) == digest(whole)
    assert lines(folder) == lines(whole)
    assert [line["step"] for line in lines(folder)] == list(range(1, len(lines(folder)) + 1))


def kill_and_resume(runs, whole, name, kills, *overrides, seed=0):
    chance, (reference, seconds), done = random.Random(seed), whole, 0
    while done < kills:
        before = newest_step(runs.folder / name)
        status = runs(name, *overrides, after=chance.uniform(0.05, 0.9) * seconds, number=signal.SIGKILL)
        assert status in (0, -signal.SIGKILL), runs.log.read_text()[-3000:]
        done += status != 0
        if status == 0:  # it was quicker: start anew
            assert_unscathed(runs.folder / name, reference)
            name += "x"
        else:
            assert newest_step(runs.folder / name) >= before
    assert runs(name, *overrides) == 0, runs.log.read_text()[-3000:]
    assert_unscathed(runs.folder / name, reference)


def newest_step(folder):
    try:
        return int(checkpoint.find(folder, say=lambda line: None).name[5:])
    except checkpoint.CheckpointError:
        return 0


def test_three_kills_at_random_moments_leave_no_trace(runs, whole):
    kill_and_resume(runs, whole, "killed", 3)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_at_random_moments_leave_no_trace(runs, whole, workers):
    kill_and_resume(runs, whole, f"killed{workers}", 20, f"trainer.workers={workers}", seed=1 + workers)


def two_layers(mixer, *overrides):
    """`hybrid_tiny` of two layers: a mixer as its shipped file makes it, then attention."""
    block = "model.blocks.ssm.mixer"
    return [f"mixer@{block}={mixer}", f"~{block}.head_dim", f"~{block}.d_state", "model.n_layers=2", *overrides]


MIXERS = sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))
EXPERTS = ["ffn@model.blocks.ssm.ffn=moe", "model.blocks.ssm.ffn.d_hidden=32"]


@pytest.mark.long
@pytest.mark.parametrize("mixer", MIXERS)
def test_three_kills_leave_no_trace_on_each_mixer(runs, mixer):
    overrides = two_layers(mixer)
    kill_and_resume(runs, uninterrupted(runs, f"whole_{mixer}", *overrides), f"killed_{mixer}", 3, *overrides, seed=7)


@pytest.mark.long
def test_twenty_kills_leave_no_trace_on_mamba_attention_and_experts(runs):
    overrides = two_layers("mamba", *EXPERTS)
    kill_and_resume(runs, uninterrupted(runs, "whole_moe", *overrides), "killed_moe", 20, *overrides, seed=8)


CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def interrupt_and_resume(runs, whole, name, moments, *overrides):
    reference, seconds = whole
    for i, moment in enumerate(moments):
        number = list(CODES)[i % 3]
        began = time.monotonic()
        status = runs(name, *overrides, after=moment * seconds, number=number)
        # a signal before training, which nothing handles yet, ends the process by itself
        assert status in (0, CODES[number], -number), runs.log.read_text()[-3000:]
        assert time.monotonic() - began < moment * seconds + 8
        if status and (runs.folder / name / "checkpoints").exists():
            assert newest_step(runs.folder / name) == len(lines(runs.folder / name))
    assert runs(name, *overrides) == 0, runs.log.read_text()[-3000:]
    assert_unscathed(runs.folder / name, reference)


def test_signals_save_the_step_at_hand_and_the_same_command_resumes(runs, whole):
    interrupt_and_resume(runs, whole, "signalled", [0.02, 0.5, 0.35])


@pytest.mark.long
def test_twenty_signals_save_the_step_at_hand(runs, whole):
    chance = random.Random(0)
    interrupt_and_resume(runs, whole, "signalled20", [chance.uniform(0, 0.5) for _ in range(20)])
