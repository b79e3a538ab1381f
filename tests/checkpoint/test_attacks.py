"""A checkpoint from somebody else runs no code of theirs, and reaches no file outside its folder.

Every attack is sealed with a manifest that agrees with it: hashes protect against damage, not against malice.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import hybridlab
from hybridlab import checkpoint
from hybridlab.checkpoint import CheckpointError


class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def seal(folder: Path) -> None:
    names = [
        name
        for name in ("config.json", "model.safetensors", "tokenizer.json", "trainer.pt")
        if (folder / name).exists()
    ]
    files = {n: [(folder / n).stat().st_size, hashlib.sha256((folder / n).read_bytes()).hexdigest()] for n in names}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def with_model(folder: Path, /, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def weights(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)


def block_of(target: str, **options) -> dict:
    return {
        "mix": {"_target_": "hybridlab.models.block.Block", "_partial_": True, "mixer": {"_target_": target, **options}}
    }


def pickled_trainer(folder, canary):
    (folder / "trainer.pt").write_bytes(pickle.dumps({"step": Bomb(canary)}))


def torch_trainer(folder, canary):
    torch.save({"optimizer": [Bomb(canary)]}, folder / "trainer.pt")


def global_in_trainer(folder, canary):
    torch.save({"callback": subprocess.Popen}, folder / "trainer.pt")


def torchscript_trainer(folder, canary):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "trainer.pt")


def zip_slip_trainer(folder, canary):
    with zipfile.ZipFile(folder / "trainer.pt", "w") as file:
        file.writestr("../../../canary", "x")
        file.writestr(str(canary), "x")


def pickled_weights(folder, canary):
    torch.save({"embed.weight": Bomb(canary)}, folder / "model.safetensors")


def pickled_config(folder, canary):
    (folder / "config.json").write_bytes(pickle.dumps(Bomb(canary)))


def yaml_tag(folder, canary):
    (folder / "config.json").write_text(f"!!python/object/apply:os.system ['touch {canary}']")


def yaml_tag_as_text(folder, canary):
    with_model(folder, d_model=f"!!python/object/apply:os.system ['touch {canary}']")


def target_system(folder, canary):
    with_model(folder, _target_="os.system", command=f"touch {canary}")


def target_popen_within(folder, canary):
    with_model(folder, blocks=block_of("subprocess.Popen", args=["touch", str(canary)]))


def target_through_our_imports(folder, canary):
    with_model(folder, blocks=block_of("hybridlab.checkpoint.shutil.copyfile", src="/etc/hostname", dst=str(canary)))


def target_reexported_class(folder, canary):
    with_model(folder, _target_="hybridlab.checkpoint.Path", args=[str(canary)])


def target_our_function(folder, canary):
    with_model(folder, _target_="hybridlab.checkpoint.save", folder=str(canary), model_state={}, config={})


def target_our_class_that_writes(folder, canary):
    config = {"model": {"_target_": "hybridlab.training.session.Lock", "run_dir": str(canary)}}
    (folder / "config.json").write_text(json.dumps(config))


def target_torch_load(folder, canary):
    torch.save(Bomb(canary), folder / "bomb.pt")
    with_model(folder, blocks=block_of("torch.load", f=str(folder / "bomb.pt"), weights_only=False))


def target_module_beside(folder, canary):
    with_model(folder, _target_="evil_module_beside.Model")


def target_of_hydra(folder, canary):
    with_model(folder, _target_="hydra.utils.call", config={"_target_": "os.system", "command": f"touch {canary}"})


def target_is_a_list(folder, canary):
    with_model(folder, _target_=["os.system"])


def auto_map(folder, canary):
    with_model(folder, auto_map={"AutoModel": "evil_module_beside.Model"}, trust_remote_code=True)


def instantiator(folder, canary):
    with_model(folder, _instantiator="evil_module_beside.Model")


def interpolation(folder, canary):
    with_model(folder, d_model="${oc.env:HOME}")


def deep_json(folder, canary):
    (folder / "config.json").write_text("[" * 100_000)


def huge_json(folder, canary):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"padding": "x" * (5 << 20)}))


def header_of_2_to_60(folder, canary):
    weights(folder, b"{}", length=2**60)


def tensor_of_2_to_60(folder, canary):
    weights(folder, b'{"embed.weight":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}', bytes(4))


def tensor_beyond_the_end(folder, canary):
    weights(folder, b'{"embed.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}', bytes(8))


def broken_tokenizer(folder, canary):
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}, "auto_map": "evil_module_beside.Model"}')


ATTACKS = [
    pickled_trainer, torch_trainer, global_in_trainer, torchscript_trainer, zip_slip_trainer, pickled_weights,
    pickled_config, yaml_tag, yaml_tag_as_text, target_system, target_popen_within, target_through_our_imports,
    target_reexported_class, target_our_function, target_our_class_that_writes, target_torch_load,
    target_module_beside, target_of_hydra, target_is_a_list, auto_map, instantiator, interpolation, deep_json,
    huge_json, header_of_2_to_60, tensor_of_2_to_60, tensor_beyond_the_end,
    broken_tokenizer,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*torch.jit", "ignore:.*TorchScript")
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_foreign_file_is_refused_and_runs_nothing(newest, tmp_path, monkeypatch, attack):
    canary = tmp_path / "canary"
    (tmp_path / "evil_module_beside.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    attack(newest, canary)
    seal(newest)
    checkpoint.verify(newest)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_trainer(newest)
        hybridlab.load(newest)
    assert len(str(caught.value).splitlines()) <= 3
    assert not canary.exists() and "evil_module_beside" not in sys.modules


@pytest.mark.parametrize("name", ["../../canary", "/etc/hostname", "sub/file", ".", "", "extra.bin"])
def test_a_manifest_names_only_files_of_a_checkpoint(newest, name):
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = [1, "0" * 64]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json"):
        checkpoint.find(newest)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"format": 1, "files": 3}', '{"format": 1, "files": []}', "[" * 10**5]
)
def test_a_manifest_of_another_kind_is_refused(newest, text):
    (newest / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
        checkpoint.find(newest)


def test_a_link_out_of_the_folder_is_not_followed(newest, tmp_path):
    (newest / "config.json").rename(tmp_path / "secret.json")
    (newest / "config.json").symlink_to(tmp_path / "secret.json")
    seal(newest)
    for load in (checkpoint.find, checkpoint.load_config, hybridlab.load):
        with pytest.raises(CheckpointError, match="not a plain file"):
            load(newest)


def test_a_trusted_package_may_be_built(newest, tmp_path, monkeypatch):
    (tmp_path / "friendly.py").write_text("from hybridlab.models.lm import HybridLM\nclass Model(HybridLM): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with_model(newest, _target_="friendly.Model")
    seal(newest)
    with pytest.raises(CheckpointError, match="trusted"):
        hybridlab.load(newest)
    assert type(hybridlab.load(newest, trusted=("friendly",))[0]).__name__ == "Model"
