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
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS, CONFIG, TOKENIZER, TRAINER = "model.safetensors", "config.json", "tokenizer.json", "trainer.pt"
MANIFEST, FORMAT = "manifest.json", 1
SPACE_RATIO = 2.2  # free space asked for before a save, over the size of the checkpoint
HYBRID_LM = "hybridlab.models.lm.HybridLM"
MAX_JSON = 4 << 20  # bytes; parsing stays cheap, and safetensors limits its own headers
RENAMED_CLASSES: dict[str, str] = {}  # old `_target_` -> new one, so that checkpoints outlive a renaming


class CheckpointError(Exception):
    """What is wrong with which file or folder, in one line."""

    def __init__(self, path: Path | str, what: str):
        super().__init__(f"{path}: {what}")


def save(
    folder: Path | str,
    model_state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    tokenizer: Path | str | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint so that `folder` holds all of it or is untouched, whenever the process or the disk stops.

    A folder of that name is replaced. Raises TypeError naming the key of a value that could not be loaded back safely,
    CheckpointError with the bytes needed when the disk is full.
    """
    folder = Path(folder)
    text = json.dumps(_plain(config, "config"), indent=1)
    plain = None if trainer is None else _plain(trainer, "trainer")
    need = _bytes([model_state, plain]) + len(text)
    temp = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    old = folder.with_name(folder.name + ".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for stale in folder.parent.glob(".*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if (free := shutil.disk_usage(folder.parent).free) < SPACE_RATIO * need:
            raise OSError(f"{free} bytes are free, and {SPACE_RATIO} times the need is asked for")
        temp.mkdir()
        (temp / CONFIG).write_text(text, encoding="utf-8")
        tensors, tied = _untie(model_state)
        save_file(tensors, temp / WEIGHTS, {"format": "pt", "tied": json.dumps(tied)})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temp / TOKENIZER)
        if plain is not None:
            torch.save(plain, temp / TRAINER)
        files = {file.name: [file.stat().st_size, _digest(file)] for file in sorted(temp.iterdir())}
        (temp / MANIFEST).write_bytes(json.dumps({"format": FORMAT, "files": files}).encode())
        for path in (*temp.iterdir(), temp):
            _sync(path)
        if folder.exists():
            _remove(old)
            folder.rename(old)  # a name that `find` reads, so that a kill here loses nothing
        temp.rename(folder)
        _sync(folder.parent)
        _remove(old)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError | SafetensorError):  # a full disk comes as any of these
            what = f"not saved, {need} bytes are needed: {error}; earlier checkpoints are untouched"
            raise CheckpointError(folder, what) from error
        raise
    return folder


def verify(folder: Path | str, only: Iterable[str] | None = None) -> None:
    """Raise CheckpointError naming file and fault, unless all files (or those in `only`) are as they were saved."""
    folder = Path(folder)
    manifest = _read_json(folder / MANIFEST)
    sums: Any = manifest.get("files") if isinstance(manifest, dict) else None
    known = isinstance(sums, dict) and {WEIGHTS, CONFIG} <= set(sums) <= {WEIGHTS, CONFIG, TOKENIZER, TRAINER}
    if not known or (folder / MANIFEST).read_text("utf-8") != json.dumps({"format": FORMAT, "files": sums}):
        raise CheckpointError(folder / MANIFEST, f"is damaged, or not of format {FORMAT}")
    for name in sums if only is None else only:
        if name not in sums:
            raise CheckpointError(folder, f"was saved without {name}")
        if (found := [_size(folder / name), _digest(folder / name)]) != sums[name]:
            raise CheckpointError(folder / name, f"is damaged: bytes and SHA-256 are {found}, {sums[name]} were saved")


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


def prune(run: Path | str, keep: int, best: Path | str | None = None) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and `best`; raises, removing none, when the newest is damaged."""
    folders = _steps(Path(run))
    if folders:
        verify(folders[0])
    gone = [folder for folder in folders[max(keep, 1) :] if best is None or folder.name != Path(best).name]
    for folder in gone:
        _remove(folder)
    return gone


def load_config(folder: Path | str) -> dict[str, Any]:
    """The resolved config as a plain dict, whose keys JSON has made strings. Builds nothing."""
    verify(folder, [CONFIG])
    return _read_json(Path(folder) / CONFIG)


def load_state(folder: Path | str) -> dict[str, Tensor]:
    """Tensors by name on the CPU, those of tied weights under each of their names."""
    verify(folder, [WEIGHTS])
    path = Path(folder) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            return state | {name: state[other] for name, other in json.loads(file.metadata()["tied"]).items()}
    except (SafetensorError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(path, f"is not a weights file of ours: {error}") from error


def load_trainer(folder: Path | str) -> dict[str, Any]:
    """What `save` was given as `trainer`, tensors on the CPU. Plain values and tensors are all that is unpickled."""
    verify(folder, [TRAINER])
    try:
        return torch.load(Path(folder) / TRAINER, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a crafted file
        raise CheckpointError(Path(folder) / TRAINER, f"is refused: {str(error).splitlines()[0]}") from error


def load_model(
    path: Path | str, device: Any = None, dtype: torch.dtype | None = None, trusted: tuple[str, ...] = ()
) -> tuple[Any, Any]:
    """The HybridLM of a run or checkpoint, and its Tokenizer or None; `trusted` names packages beside hybridlab."""
    from hybridlab.config import ConfigError, build
    from hybridlab.tokenizer import Tokenizer

    folder = find(path)
    try:
        node = load_config(folder)["model"]
        if node["_target_"] != HYBRID_LM and str(node["_target_"]).partition(".")[0] not in trusted:
            raise TypeError(f"_target_={node['_target_']} is not {HYBRID_LM}, nor of a package that is trusted")
        with torch.device("meta"):
            model = build(node, key="model", trusted=trusted)
        has_tokenizer = TOKENIZER in _read_json(folder / MANIFEST)["files"]
        tokenizer = Tokenizer.load(folder / TOKENIZER) if has_tokenizer else None
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(folder, f"describes no model that can be built: {error}") from error
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
    state, own = load_state(folder), model.state_dict()
    report = {name: "missing" for name in sorted(own.keys() - state.keys())}
    report |= {name: "unused" for name in sorted(state.keys() - own.keys())}
    both = [(name, state[name], own[name]) for name in own if name in state]
    report |= {n: f"reshaped {list(old.shape)} -> {list(new.shape)}" for n, old, new in both if old.shape != new.shape}
    if refused := [f"{n} ({how})" for n, how in report.items() if not any(fnmatchcase(n, glob) for glob in allow)]:
        raise CheckpointError(folder / WEIGHTS, f"does not fit the model: {', '.join(refused)}")
    with torch.no_grad():
        for name, old, new in both:
            if name not in report:
                new.copy_(old)
    return report


def _plain(value: Any, key: str) -> Any:
    """A copy of exact dicts, lists, tuples, plain values and tensors, so that no class name reaches a file."""
    if isinstance(value, dict):
        return {_plain(name, f"a key of {key}"): _plain(part, f"{key}.{name}") for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(part, f"{key}[{i}]") for i, part in enumerate(value))
    if type(value) in (Tensor, nn.Parameter):
        return _own_storage(value)
    if type(value) not in (str, bytes, int, float, bool, type(None)):
        raise TypeError(f"{key} is a {type(value).__module__}.{type(value).__qualname__}; save plain values or tensors")
    return value


def _own_storage(t: Tensor, seen: set[int] | None = None) -> Tensor:
    """A copy where `t` is less than its storage, which would be written whole, or where that is in `seen`."""
    storage = t.untyped_storage()
    alone = t.is_contiguous() and storage.nbytes() == t.nbytes and storage.data_ptr() not in (seen or ())
    return t.detach() if alone else t.detach().clone(memory_format=torch.contiguous_format)


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, each once; and the name under which each other one of the same memory is written."""
    first: dict[Any, str] = {}
    kept, tied = {}, {}
    seen: set[int] = set()
    for name, t in state.items():
        owner = first.setdefault((t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) if t.numel() else name, name)
        if owner == name:
            kept[name] = _own_storage(t, seen)
            seen.add(t.untyped_storage().data_ptr())
        else:
            tied[name] = owner
    return kept, tied


def _rename(node: dict[str, Any]) -> dict[str, Any]:
    if (target := str(node.get("_target_"))) in RENAMED_CLASSES:
        node["_target_"] = RENAMED_CLASSES[target]
    return node


def _steps(path: Path) -> list[Path]:
    """Folders called like checkpoints, newest first."""
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    named = [(re.fullmatch(r"step-(\d+)(\.old)?", folder.name), folder) for folder in root.glob("step-*/")]
    return [folder for *_, folder in sorted(((int(m[1]), m[2] is None, f) for m, f in named if m), reverse=True)]


def _size(path: Path) -> int:
    """Bytes of a plain file; a link could lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(path, "is not a plain file" if path.exists() else "is missing")
    return path.stat().st_size


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    if (size := _size(path)) > MAX_JSON:
        raise CheckpointError(path, f"holds {size} bytes; at most {MAX_JSON} are read")
    try:
        return json.loads(path.read_bytes(), object_hook=_rename)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Take the name away first, so that no half of a checkpoint is ever seen."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp-gone")), ignore_errors=True)


def _bytes(node: Any) -> int:
    """Of all tensors in nested dicts, lists and tuples."""
    if isinstance(node, Tensor):
        return node.numel() * node.element_size()
    parts = node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ()
    return sum(map(_bytes, parts))
