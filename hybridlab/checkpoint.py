"""Checkpoints: a folder of weights, resolved config and trainer state, sealed by a manifest of hashes.

A folder appears under its name only when all of it is on disk, and nothing of it is used before its hashes agree.
Files are untrusted: weights are safetensors, the rest is JSON and pickles of plain tensors, and a config builds
classes of hybridlab only, or of packages the caller names.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS, CONFIG, TOKENIZER, TRAINER = "model.safetensors", "config.json", "tokenizer.json", "trainer.pt"
MANIFEST, FORMAT = "manifest.json", 1
SPACE_RATIO = 2.2  # free space asked for before a save, over the size of the checkpoint
MAX_JSON = 4 << 20  # bytes; parsing stays cheap, and safetensors limits its own headers
RENAMED_CLASSES: dict[str, str] = {}  # old `_target_` -> new one, so that checkpoints outlive a renaming


class CheckpointError(ValueError):
    """What is wrong with which file or folder, in one line."""

    def __init__(self, path: Path | str, what: str):
        super().__init__(f"{path}: {what}")


def save(
    folder: Path | str, weights: dict, config: dict, *, tokenizer: Path | None = None, trainer: Any = None
) -> Path:
    """Write a checkpoint so that `folder` holds all of it or is untouched, whenever the process or the disk stops.

    weights   tensors by name;   config, trainer   plain values, the trainer's with tensors among them
    A folder of that name is replaced. Raises TypeError naming the key of a value that could not be loaded back safely,
    CheckpointError with the bytes needed when the disk is full.
    """
    tensors: list[Tensor] = []
    folder, text = Path(folder), json.dumps(_plain(config, "config", tensors), indent=1)
    weights, state = _plain(weights, "weights", tensors), _plain(trainer, "trainer", tensors)
    need = len(text) + sum(t.nbytes for t in tensors)
    temp, old = folder.parent / f".{folder.name}.tmp-{os.getpid()}", folder.with_name(folder.name + ".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(".*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if (free := shutil.disk_usage(folder.parent).free) < SPACE_RATIO * need:
            raise OSError(f"{free} bytes are free, and {SPACE_RATIO} times the need is asked for")
        temp.mkdir()
        (temp / CONFIG).write_text(text)
        save_file(weights, temp / WEIGHTS, {"format": "pt"})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temp / TOKENIZER)
        if trainer is not None:
            torch.save(state, temp / TRAINER)
        (temp / MANIFEST).write_bytes(_manifest({file.name: _seal(file) for file in sorted(temp.iterdir())}))
        for path in (*temp.iterdir(), temp):
            _sync(path)
        if folder.exists():
            _remove(old)
            folder.rename(old)  # a name that `find` reads, so that a kill here loses nothing
        temp.rename(folder)
        _sync(folder.parent)
        _remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk comes as any of these
        what = f"not saved, {need} bytes are needed: {error}; earlier checkpoints are untouched"
        raise CheckpointError(folder, what) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def verify(folder: Path | str, only: Iterable[str] | None = None) -> set[str]:
    """The names of its files, all of which (or those in `only`) are as they were saved; or raise CheckpointError."""
    folder = Path(folder)
    _seal(folder / MANIFEST)
    manifest = _read(folder / MANIFEST, _json)
    sums: Any = manifest.get("files") if isinstance(manifest, dict) else None
    known = isinstance(sums, dict) and {WEIGHTS, CONFIG} <= set(sums) <= {WEIGHTS, CONFIG, TOKENIZER, TRAINER}
    if not known or (folder / MANIFEST).read_bytes() != _manifest(sums):
        raise CheckpointError(folder / MANIFEST, f"is damaged, or not of format {FORMAT}")
    for name in sums if only is None else only:
        if name not in sums:
            raise CheckpointError(folder, f"was saved without {name}")
        if (found := _seal(folder / name)) != sums[name]:
            raise CheckpointError(folder / name, f"is damaged: bytes and SHA-256 are {found}, {sums[name]} were saved")
    return set(sums)


def find(path: Path | str, say: Callable[[str], Any] = warnings.warn) -> Path:
    """The newest checkpoint that verifies, in a run folder or its `checkpoints`; or `path` itself, being one.

    Damaged ones are passed over with one line to `say` each. Raises CheckpointError when none is left.
    """
    path = Path(path)
    if (path / MANIFEST).exists() or (path / WEIGHTS).exists():
        verify(path)
        return path
    for folder in _steps(path):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            say(f"passing over a checkpoint: {error}")
    raise CheckpointError(path, "holds no checkpoint that can be read" if path.is_dir() else "is not a folder")


def prune(run: Path | str, keep: int, best: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and `best`; raises, removing none, when the newest is damaged."""
    folders = _steps(Path(run))
    if folders:
        verify(folders[0])
    for folder in folders[max(keep, 1) :]:
        if best is None or folder.name != best.name:
            _remove(folder)


def load_config(folder: Path | str) -> dict[str, Any]:
    """The resolved config as a plain dict, whose keys JSON has made strings. Builds nothing."""
    verify(folder, [CONFIG])
    return _read(Path(folder) / CONFIG, _json)


def load_state(folder: Path | str) -> dict[str, Tensor]:
    """Tensors by name on the CPU."""
    verify(folder, [WEIGHTS])
    return _read(Path(folder) / WEIGHTS, load_file)


def load_trainer(folder: Path | str) -> dict[str, Any]:
    """What `save` was given as `trainer`, tensors on the CPU. Plain values and tensors are all that is unpickled."""
    verify(folder, [TRAINER])
    return _read(Path(folder) / TRAINER, partial(torch.load, map_location="cpu", weights_only=True))


def load_model(
    path: Path | str, device: Any = None, dtype: torch.dtype | None = None, trusted: Sequence[str] = ()
) -> tuple[Any, Any]:
    """The HybridLM of a run or checkpoint, and its Tokenizer or None; `trusted` names packages beside hybridlab."""
    from hybridlab.config.nodes import ConfigError, fit
    from hybridlab.models.lm import HybridLM
    from hybridlab.tokenizer import Tokenizer

    folder = find(path)
    try:
        with torch.device("meta"):
            model = fit(load_config(folder)["model"], HybridLM, "model", trusted)
        tokenizer = Tokenizer.load(folder / TOKENIZER) if TOKENIZER in verify(folder, ()) else None
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        what = f"describes no model that can be built with trusted={[*trusted]}: {error}"
        raise CheckpointError(folder, what) from error
    model.to_empty(device=device or "cpu")
    if {name for name, _ in model.named_buffers()} - model.state_dict().keys():
        model.reset_parameters()  # fills buffers that are computed, not saved
    load_weights(model, folder)
    return model.to(dtype).eval(), tokenizer


def load_weights(model: nn.Module, path: Path | str, allow: Iterable[str] = ()) -> dict[str, str]:
    """Copy the tensors that fit into `model`; returns what is missing, unused or reshaped, by name.

    Raises CheckpointError, with nothing copied, unless globs in `allow` match the names of all that does not fit.
    """
    folder = find(path)
    old, new = load_state(folder), model.state_dict()
    report = dict.fromkeys(sorted(new.keys() - old.keys()), "missing")
    report |= dict.fromkeys(sorted(old.keys() - new.keys()), "unused")
    shapes = {name: ([*old[name].shape], [*new[name].shape]) for name in new if name in old}
    report |= {name: f"reshaped {was} -> {now}" for name, (was, now) in shapes.items() if was != now}
    if refused := [f"{n} ({how})" for n, how in report.items() if not any(fnmatchcase(n, glob) for glob in allow)]:
        raise CheckpointError(folder / WEIGHTS, f"does not fit the model: {', '.join(refused)}")
    with torch.no_grad():
        for name in shapes.keys() - report.keys():
            new[name].copy_(old[name])
    return report


def _plain(value: Any, key: str, tensors: list[Tensor]) -> Any:
    """A copy of exact dicts, lists, tuples, plain values and `tensors`, so that no class name reaches a file."""
    if isinstance(value, dict):
        return {_plain(k, f"a key of {key}", []): _plain(v, f"{key}.{k}", tensors) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(part, f"{key}[{i}]", tensors) for i, part in enumerate(value))
    if type(value) in (Tensor, nn.Parameter):  # with a storage of its own, for that of a view would be written whole
        tensors.append(torch.empty(value.shape, dtype=value.dtype).copy_(value.detach()))
        return tensors[-1]
    if type(value) not in (str, bytes, int, float, bool, type(None)):
        raise TypeError(f"{key} is a {type(value).__module__}.{type(value).__qualname__}; save plain values or tensors")
    return value


def _steps(path: Path) -> list[Path]:
    """Folders called like checkpoints, newest first."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    named = [(re.fullmatch(r"step-(\d+)(\.old)?", folder.name), folder) for folder in root.glob("step-*/")]
    return [folder for *_, folder in sorted(((int(m[1]), m[2] is None, f) for m, f in named if m), reverse=True)]


def _seal(path: Path) -> list[Any]:
    """Bytes and SHA-256 of a plain file; a link could lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(path, "is not a plain file" if path.exists() else "is missing")
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _manifest(sums: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, "files": sums}).encode()


def _read(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except Exception as error:  # the libraries raise many kinds on a crafted file
        raise CheckpointError(path, f"is refused: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"it holds more than {MAX_JSON} bytes")
    return json.loads(path.read_bytes(), object_hook=_rename)


def _rename(node: dict[str, Any]) -> dict[str, Any]:
    target = str(node.get("_target_"))
    return node | {"_target_": RENAMED_CLASSES[target]} if target in RENAMED_CLASSES else node


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _remove(folder: Path) -> None:
    """Take the name away first, so that no half of a checkpoint is ever seen."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp-gone")), ignore_errors=True)
