"""Whole runs on the tiny model: what they leave, how they continue, when they refuse."""

import json
import os
import random
import signal
import socket
import time

import numpy as np
import pytest
import torch

from hybridlab import checkpoint
from hybridlab.tokenizer import DataError
from hybridlab.training.callbacks import recording
from hybridlab.training.run import fit
from hybridlab.training.session import Stop


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def weights(folder):
    return checkpoint.load_state(checkpoint.find(folder))


def trainer_state(folder):
    state = checkpoint.load_trainer(checkpoint.find(folder))
    rng, states = state["rng"], state["module"].pop("optimizer")["state"]
    return [states, rng["torch"], str([rng["python"], rng["numpy"], state["module"], state["best"]])]


def assert_same(a, b):
    """Weights, optimizer and generators of two runs' newest checkpoints are equal, bit for bit."""
    one, two = trainer_state(a), trainer_state(b)
    assert one.pop() == two.pop()
    torch.testing.assert_close([weights(a), one], [weights(b), two], rtol=0, atol=0)


@pytest.fixture(autouse=True)
def handlers_and_chance_as_before():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_the_same_seed_twice_gives_the_same_bits_and_a_run_leaves_its_records(tiny, capsys):
    for name in "ab":
        assert fit(*tiny.run(moe=True, keys={"run_dir": str(tiny.path / name)})) == 0
    a, b = tiny.path / "a", tiny.path / "b"
    assert lines(a) == lines(b) and [line["step"] for line in lines(a)] == list(range(1, 21))
    assert_same(a, b)
    assert {p.name for p in a.iterdir()} >= {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "report.md",
        "curve.png",
        "samples.txt",
    }
    assert lines(a)[-1]["valid_loss"] < lines(a)[4]["valid_loss"] and "router/layer0.entropy" in lines(a)[0]
    printed = capsys.readouterr().out
    assert "WindowMean" in printed and "held out: loss" in printed and "report.md" in printed
    assert len(list((a / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_three_times_ends_as_if_it_had_not(tiny, workers):
    assert fit(*tiny.run(moe=True, keys={"run_dir": str(tiny.path / "whole")})) == 0
    for limit in (3, 13, 14, 20):  # rows are 50: step 13 crosses the end of an epoch
        assert fit(*tiny.run(moe=True, max_tokens=limit * 64, workers=workers)) == 0
    run, whole = tiny.path / "run", tiny.path / "whole"
    assert_same(run, whole)
    kept = [{k: v for k, v in line.items() if "valid" not in k} for line in lines(run)]
    assert kept == [{k: v for k, v in line.items() if "valid" not in k} for line in lines(whole)]


def test_steps_beyond_the_checkpoint_are_cut_from_the_log_and_repeated(tiny):
    assert fit(*tiny.run(max_tokens=10 * 64)) == 0
    path, expected = tiny.path / "run" / "metrics.jsonl", lines(tiny.path / "run")
    path.write_text(path.read_text() + '{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    assert fit(*tiny.run()) == 0
    assert [line["step"] for line in lines(tiny.path / "run")] == list(range(1, 21))
    assert lines(tiny.path / "run")[:10] == expected and lines(tiny.path / "run")[10]["loss"] != 1.0


def test_a_complete_run_says_so(tiny, capsys):
    assert fit(*tiny.run()) == 0
    before = (tiny.path / "run" / "metrics.jsonl").read_bytes()
    assert fit(*tiny.run()) == 0
    assert "complete" in capsys.readouterr().out
    assert (tiny.path / "run" / "metrics.jsonl").read_bytes() == before


def test_another_configuration_never_and_changed_data_are_refused(tiny, capsys):
    assert fit(*tiny.run(max_tokens=5 * 64)) == 0
    assert fit(*tiny.run(keys={"seed": 7, "optim": {"lr": 3}})) == 2
    said = capsys.readouterr().err
    assert "seed: 0 there, 7 now" in said and "optim.lr: 'not set' there, 3 now" in said
    assert fit(*tiny.run(keys={"resume": "never"})) == 2 and "resume=never" in capsys.readouterr().err
    config, parts = tiny.run()
    parts.data.prepare = lambda folder: type("Other", (type(tiny.corpus),), {"fingerprint": "other"})()
    assert fit(config, parts) == 2 and "data changed" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_data_are_refused_in_one_line(tiny, capsys, monkeypatch, workers):
    def damaged(self, split, indices):
        raise DataError("prepared data train.bin: is damaged")

    monkeypatch.setattr(type(tiny.corpus), "rows", damaged)
    assert fit(*tiny.run(workers=workers)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line and "step/s" not in line]
    assert said == ["prepared data train.bin: is damaged"]


def test_a_folder_in_use_is_refused_naming_its_holder(tiny, capsys):
    pid = in_a_fork(tiny.run(), lambda: setattr(recording, "tqdm", lambda **_: time.sleep(60)))
    until(lambda: (tiny.path / "run" / "run.json").exists())
    assert fit(*tiny.run()) == 2
    assert f"in use by process {pid} on {socket.gethostname()}" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert fit(*tiny.run(max_tokens=64)) == 0


def test_resume_from_a_path_continues_elsewhere(tiny):
    assert fit(*tiny.run(keys={"run_dir": str(tiny.path / "whole")})) == 0
    assert fit(*tiny.run(keys={"run_dir": str(tiny.path / "first")}, max_tokens=7 * 64)) == 0
    assert fit(*tiny.run(keys={"resume": str(tiny.path / "first")})) == 0
    torch.testing.assert_close(weights(tiny.path / "run"), weights(tiny.path / "whole"), rtol=0, atol=0)


def test_init_from_takes_weights_and_starts_anew(tiny):
    assert fit(*tiny.run(keys={"run_dir": str(tiny.path / "old")}, max_tokens=5 * 64)) == 0
    assert fit(*tiny.run(keys={"init_from": str(tiny.path / "old"), "seed": 1}, max_tokens=64)) == 0
    assert [line["step"] for line in lines(tiny.path / "run")] == [1]
    old, new = weights(tiny.path / "old"), weights(tiny.path / "run")
    assert max((old[k] - new[k]).abs().max() for k in old) < 0.05


def test_a_dry_run_prints_the_table_and_leaves_nothing(tiny, capsys):
    assert fit(*tiny.run(keys={"dry_run": True}, logger="csv")) == 0
    assert "WindowMean" in capsys.readouterr().out and not (tiny.path / "run").exists()


def test_the_time_limit_ends_cleanly_and_the_same_command_continues(tiny, monkeypatch, capsys):
    monkeypatch.setattr(Stop, "requested", lambda self: True)
    assert fit(*tiny.run()) == 0
    assert "the same command continues" in capsys.readouterr().out
    monkeypatch.undo()
    assert fit(*tiny.run()) == 0 and len(lines(tiny.path / "run")) == 20


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_loggers_write_beside_the_local_log(tiny, kind):
    assert fit(*tiny.run(logger=kind, max_tokens=64 * 2)) == 0
    assert any((tiny.path / "run" / kind).iterdir())


def test_recomputing_layers_changes_neither_losses_nor_counts(tiny):
    for name, again in (("a", False), ("b", True)):
        assert fit(*tiny.run(moe=True, keys={"run_dir": str(tiny.path / name)}, checkpoint_gradients=again)) == 0
    assert lines(tiny.path / "a") == lines(tiny.path / "b")


def test_a_run_that_is_not_finite_ends_with_a_report(tiny, capsys):
    config, parts = tiny.run()

    objective = parts.objective

    def broken(model, batch, scored, share):
        loss, found, stats = objective(model, batch, scored, share)
        return loss * torch.inf, found, stats

    parts.objective = broken
    assert fit(config, parts) == 1
    assert "5 steps in a row" in capsys.readouterr().err
    assert all(t.isfinite().all() for t in weights(tiny.path / "run").values())


def in_a_fork(arguments, patch):
    """Start `fit` in a child process after `patch`; -> its id. The child has imported everything already."""
    pid = os.fork()
    if pid == 0:
        try:
            patch()
            code = fit(*arguments)
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return pid


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def slow_save(marker, from_step):
    """Make saving stop midway, after the marker file appears."""
    write = checkpoint.save

    def save(folder, *rest, **named):
        if int(folder.name[5:]) >= from_step:
            marker.touch()
            time.sleep(20)
        return write(folder, *rest, **named)

    return lambda: setattr(checkpoint, "save", save)


def test_a_second_interrupt_during_the_save_exits_at_once_and_loses_nothing_before(tiny):
    marker = tiny.path / "saving"
    pid = in_a_fork(tiny.run(), slow_save(marker, 10))
    until(marker.exists)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130 and time.monotonic() - began < 5
    assert checkpoint.find(tiny.path / "run").name == "step-00000005"
    assert fit(*tiny.run()) == 0 and [line["step"] for line in lines(tiny.path / "run")] == list(range(1, 21))


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("validation", signal.SIGTERM, 143),
        ("last validation", signal.SIGTERM, 143),
        ("before step 1", signal.SIGINT, 130),
        ("save", signal.SIGHUP, 129),
    ],
)
def test_a_signal_at_an_awkward_moment_still_saves_the_step_at_hand(tiny, moment, number, code):
    name = {"before step 1": "tqdm", "save": "rng_state"}.get(moment, "validate")
    work = getattr(recording, name)

    def interrupted(*rest, **named):
        if moment != "last validation" or rest[0].step == 20:
            os.kill(os.getpid(), number)
        return work(*rest, **named)

    pid = in_a_fork(tiny.run(), lambda: setattr(recording, name, interrupted))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    saved = int(checkpoint.find(tiny.path / "run").name[5:])
    assert (
        saved
        == {"validation": 5, "last validation": 20, "before step 1": 1, "save": 6}[moment]
        == len(lines(tiny.path / "run"))
    )
    assert fit(*tiny.run()) == 0
    assert fit(*tiny.run(keys={"run_dir": str(tiny.path / "whole")})) == 0
    assert lines(tiny.path / "run") == lines(tiny.path / "whole")
    assert_same(tiny.path / "run", tiny.path / "whole")


def test_chance_continues_where_it_stopped(tiny):
    def noisy(name, **limit):
        config, parts = tiny.run(keys={"run_dir": str(tiny.path / name)}, **limit)
        objective = parts.objective

        def with_noise(*rest):
            loss, found, stats = objective(*rest)
            return loss * (0.5 + torch.rand(()) + random.random() + np.random.rand()), found, stats

        parts.objective = with_noise
        assert fit(config, parts) == 0

    noisy("whole")
    noisy("run", max_tokens=7 * 64)
    noisy("run")
    assert_same(tiny.path / "run", tiny.path / "whole")
