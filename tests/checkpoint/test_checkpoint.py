"""What is saved comes back, what is damaged is found out, and a stop at any moment costs nothing saved before."""

import collections
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hybridlab
from hybridlab import checkpoint
from hybridlab.checkpoint import CheckpointError
from hybridlab.config import build

FILES = ["model.safetensors", "config.json", "tokenizer.json", "trainer.pt", "manifest.json"]


def test_weights_config_and_trainer_come_back(tmp_path):
    w = torch.randn(4, 3)
    state = {
        "a": w, "b": w, "view": torch.randn(100, 10)[2:4], "scalar": torch.tensor(3), "turned": torch.randn(3, 5).T,
        "empty": torch.zeros(0, 2), "half": torch.randn(2).bfloat16(), "same_storage": w.view(12),
    }  # fmt: skip
    trainer = {"rng": [b"x", 1.5, None, True], 3: (1, torch.arange(4)), "view": torch.zeros(10**5)[:2]}
    folder = checkpoint.save(tmp_path / "step-1", state, {"model": {"l": [1, "a"], "x": None}}, trainer=trainer)
    back = checkpoint.load_state(folder)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n]) and back[n].dtype == state[n].dtype for n in state)
    assert checkpoint.load_config(folder) == {"model": {"l": [1, "a"], "x": None}}
    again = checkpoint.load_trainer(folder)
    assert again["rng"] == trainer["rng"] and torch.equal(again[3][1], trainer[3][1])
    assert (folder / "model.safetensors").stat().st_size < 3000, "only the bytes of a view are stored"
    assert (folder / "trainer.pt").stat().st_size < 5000, "only the bytes of a view are stored"


@pytest.mark.parametrize(
    "value", [torch.Generator(), collections.Counter, Path("x"), torch.float32, {1, 2}, {"a": object()}]
)
def test_a_value_that_is_not_plain_is_refused_with_its_key(tmp_path, value):
    with pytest.raises(TypeError, match=r"trainer\.loop\[1\]"):
        checkpoint.save(tmp_path / "step-1", {}, {}, trainer={"loop": [0, value]})
    with pytest.raises(TypeError, match=r"config\.x|serializable"):
        checkpoint.save(tmp_path / "step-1", {}, {"x": value})
    assert not list(tmp_path.iterdir())


def test_a_model_comes_back_by_itself(run, model, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", _only_on_meta(torch.nn.init.normal_))
    again, tokenizer = hybridlab.load(run)
    tokens = torch.randint(0, 257, (2, 9))
    assert torch.equal(again(tokens).logits, model(tokens).logits) and not again.training
    assert tokenizer.decode(tokenizer.encode("été")) == "été"
    half, _ = hybridlab.load(run, dtype=torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16 and half.norm.weight.dtype == torch.float32


def _only_on_meta(fill):
    def check(tensor, *args, **options):
        assert tensor.is_meta, "a loaded model is not initialised first"
        return fill(tensor, *args, **options)

    return check


def test_importing_hybridlab_is_light():
    code = "import hybridlab, sys; assert not {'torch', 'hydra', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_that_do_not_fit_are_listed_and_must_be_allowed(run, config, model):
    other = build(config["model"] | {"n_layers": 3, "vocab_size": 300, "tied": False, "places": {}}, "model")
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"layers\.2\..*\(missing\).*embed\.weight \(reshaped \[257, 16\] -> \[300"
    ):
        checkpoint.load_weights(other, run)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items()), "refused before anything is copied"
    report = checkpoint.load_weights(other, run, allow=["layers.2.*", "embed.weight", "head.*", "layers.1.mixer.*"])
    assert report["layers.2.mixer.out.weight"] == "missing" and report["embed.weight"].startswith("reshaped")
    after = other.state_dict()
    assert torch.equal(after["layers.0.mixer.inputs.weight"], model.state_dict()["layers.0.mixer.inputs.weight"])
    assert torch.equal(after["embed.weight"], before["embed.weight"])
    with pytest.raises(CheckpointError, match=r"layers\.1\..*\(unused\)"):
        checkpoint.load_weights(build(config["model"] | {"n_layers": 1, "places": {}}, "model"), run)


def test_a_renamed_class_still_loads(tmp_path, run, config, model, monkeypatch):
    old = json.loads(json.dumps(config).replace("retention.Retention", "retention.OldName"))
    folder = checkpoint.save(tmp_path / "step-1", model.state_dict(), old)
    with pytest.raises(CheckpointError, match="OldName"):
        hybridlab.load(folder)
    new = "hybridlab.models.mixers.retention."
    monkeypatch.setitem(checkpoint.RENAMED_CLASSES, new + "OldName", new + "Retention")
    assert hybridlab.load(folder)[1] is None


# ------------------------------------------------------------------------------------------------ finding and keeping


def test_the_newest_good_checkpoint_is_found_and_a_name_alone_is_none(run, newest):
    (run / "checkpoints" / "step-00000009").mkdir()
    (run / "checkpoints" / ".step-00000010.tmp-1").mkdir()
    (run / "checkpoints" / "step-00000011").touch()
    (run / "checkpoints" / "step-x").mkdir()
    said = []
    assert checkpoint.find(run, say=said.append) == newest
    assert len(said) == 1 and "step-00000009" in said[0] and "\n" not in said[0]
    assert checkpoint.find(newest) == newest
    (run / "checkpoints" / "step-00000009").rmdir()
    (newest / "trainer.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="trainer.pt"):
        assert checkpoint.find(run).name == "step-00000001"
    with pytest.raises(CheckpointError, match="trainer.pt"):
        checkpoint.find(newest)
    with pytest.raises(CheckpointError, match="not a folder"):
        checkpoint.find(run / "nothing")
    (run / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(run / "empty")


def test_old_checkpoints_go_only_when_the_newest_is_good(run, newest):
    folders = run / "checkpoints"
    for step in (3, 4, 5, 10):
        shutil.copytree(newest, folders / f"step-{step:08d}")
    (folders / "step-00000010" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="config.json"):
        checkpoint.prune(run, 2)
    assert len(list(folders.iterdir())) == 6
    shutil.rmtree(folders / "step-00000010")
    checkpoint.prune(run, 2, best=folders / "step-00000001")
    assert sorted(f.name[-1] for f in folders.iterdir()) == ["1", "4", "5"]


def test_saving_over_a_checkpoint_never_leaves_less(run, newest, config, model, monkeypatch):
    rename, names = Path.rename, []

    def stop_at(self, target):
        if len(names) == 1:
            raise KeyboardInterrupt
        names.append(str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop_at)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(newest, model.state_dict(), config)
    monkeypatch.undo()
    assert checkpoint.find(run).name == "step-00000002.old"
    checkpoint.save(newest, model.state_dict(), config)
    assert sorted(f.name for f in newest.parent.iterdir()) == ["step-00000001", "step-00000002"]
    checkpoint.save(newest, model.state_dict(), {"new": 1})
    assert checkpoint.load_config(checkpoint.find(run)) == {"new": 1}


# ------------------------------------------------------------------------------------------------------ R4: corruption


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found_before_use(newest, flips):
    random.seed(flips)
    sizes = {name: (newest / name).stat().st_size for name in FILES}
    for _ in range(flips):
        name = random.choice(FILES)
        at, bit = random.randrange(sizes[name]), 1 << random.randrange(8)
        _flip(newest / name, at, bit)
        for load in (checkpoint.find, hybridlab.load):
            with pytest.raises(CheckpointError, match=name if name != "manifest.json" else None):
                load(newest)
        _flip(newest / name, at, bit)
    checkpoint.verify(newest)


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0] ^ bit
        file.seek(at)
        file.write(bytes([byte]))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["last byte", "half", "empty", "longer", "missing", "folder", "link", "swapped"])
def test_every_lost_or_foreign_file_is_found(run, newest, tmp_path, name, fault):
    path, data = newest / name, (newest / name).read_bytes()
    if fault in ("last byte", "half", "empty", "longer"):
        cut = {"last byte": data[:-1], "half": data[: len(data) // 2], "empty": b"", "longer": data + b"\n"}
        path.write_bytes(cut[fault])
    elif fault == "swapped":
        path.write_bytes((newest / FILES[FILES.index(name) - 1]).read_bytes())
    else:
        path.rename(tmp_path / "away")
        if fault == "folder":
            path.mkdir()
        elif fault == "link":
            path.symlink_to(tmp_path / "away")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.find(newest)
    with pytest.warns(UserWarning, match=name):
        assert checkpoint.find(run).name == "step-00000001", "the previous good one takes over"


@pytest.mark.parametrize("load", [checkpoint.load_state, checkpoint.load_config, checkpoint.load_trainer])
def test_each_loader_checks_the_file_it_reads(newest, load):
    load(newest)
    for name in FILES[:4]:
        _flip(newest / name, 30, 1)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load(newest)


# ------------------------------------------------------------------------------------------- R3, R6: interruptions

WRITER = """
import os, sys, torch
from hybridlab import checkpoint

def write(folder, megabytes):
    step = max([int(n[5:13]) for n in os.listdir(folder) if n.startswith("step-")], default=0)
    while True:
        step += 1
        weights = torch.full((megabytes << 18,), float(step))
        checkpoint.save(f"{folder}/step-{step:08d}", {"w": weights}, {"step": step}, trainer={"step": step})
        checkpoint.prune(folder, 2)
        print(step, flush=True)

for _ in sys.stdin:  # imports once, then a fresh process for every line
    pid = os.fork()
    if pid == 0:
        write(sys.argv[1], int(sys.argv[2]))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


@pytest.mark.parametrize("kills, megabytes", [(5, 8), pytest.param(100, 50, marks=pytest.mark.long)])
def test_a_kill_during_a_save_leaves_the_last_one_readable(tmp_path, kills, megabytes):
    random.seed(0)
    env = os.environ | {"TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else str(tmp_path), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(megabytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    with server:
        for _ in range(kills):
            server.stdin.write("\n")
            server.stdin.flush()
            pid, _ = sorted([int(server.stdout.readline()), int(server.stdout.readline())], reverse=True)
            start = time.perf_counter()
            said = [int(server.stdout.readline())]
            time.sleep(random.random() * (time.perf_counter() - start))
            os.kill(pid, signal.SIGKILL)
            said += [int(line) for line in iter(server.stdout.readline, "gone\n")]
            last = checkpoint.find(tmp_path)
            step = checkpoint.load_config(last)["step"]
            assert step >= said[-1], "what was reported as saved is there"
            assert (checkpoint.load_state(last)["w"] == step).all() and checkpoint.load_trainer(last) == {"step": step}
        server.stdin.close()
    checkpoint.save(folder / "step-99999999", {}, {})
    assert not list(folder.glob(".*")), "what killed saves left behind is cleared away"


def test_a_full_disk_costs_nothing_saved_before(run, newest, config, model, monkeypatch):
    tokenizer, trainer = run.parent / "tokenizer.json", {"x": torch.zeros(1000)}
    calls = [0]
    full_at = [0]

    def limited(function):
        def call(*args, **options):
            calls[0] += 1
            if calls[0] == full_at[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **options)

        return call

    for owner, name in ((checkpoint, "save_file"), (torch, "save"), (Path, "write_text"), (Path, "write_bytes")):
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))
    for owner, name in ((shutil, "copyfile"), (os, "fsync"), (Path, "mkdir"), (Path, "rename")):
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))
    target = newest.with_name("step-00000003")
    checkpoint.save(target, model.state_dict(), config, tokenizer=tokenizer, trainer=trainer)
    total = calls[0]
    shutil.rmtree(target)
    assert total >= 12
    for k in range(1, total):  # the last call follows the rename: all is saved then
        calls[0], full_at[0] = 0, k
        with pytest.raises(CheckpointError, match=r"step-00000003.* \d+ bytes are needed.*No space left"):
            checkpoint.save(target, model.state_dict(), config, tokenizer=tokenizer, trainer=trainer)
        assert checkpoint.find(run) in (newest, target)
        assert not list(newest.parent.glob(".*"))
        shutil.rmtree(target, ignore_errors=True)


def test_a_file_that_cannot_grow_costs_nothing_saved_before(run, newest):
    """A size limit makes the writes themselves fail midway, inside the libraries."""
    code = """
import resource, sys, torch
from hybridlab import checkpoint
big = torch.zeros(10000)
for limit, weights in ((1000, 10000), (20000, 100), (39999, 100)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        checkpoint.save(sys.argv[1], {"w": big[:weights]}, {}, trainer={"w": big})
    except checkpoint.CheckpointError as error:
        print(error)
"""
    args = [sys.executable, "-c", code, str(newest.with_name("step-00000003"))]
    out = subprocess.run(args, capture_output=True, text=True, check=True).stdout
    assert out.count("bytes are needed") == out.count("step-00000003: not saved") == 3
    assert checkpoint.find(run) == newest and not list(newest.parent.glob(".*"))


def test_too_little_space_is_known_before_writing(run, newest, monkeypatch):
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8700))
    checkpoint.save(newest, {"w": torch.zeros(900)}, {})
    with pytest.raises(CheckpointError, match=r"400\d bytes are needed: 8700 bytes are free"):
        checkpoint.save(newest, {"w": torch.zeros(1000)}, {})
