"""From a command line to a plain dict (Hydra only composes), to a checked run."""

import argparse
import functools
import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hybridlab.config.nodes import ConfigError, build, fit, merge, nearest, whole

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HASHED = ("model", "data", "optim", "objective", "seed")
PARTS = ("data", "optim", "objective", "trainer", "logger", "model")
PLAIN: dict[str, Any] = dict.fromkeys(("name", "run_dir", "resume", "cache"), str)
PLAIN |= {"seed": int, "init_from": str | None, "init_allow": Sequence[str], "dry_run": bool}


def compose(overrides: Iterable[str] = (), configs: Path = CONFIGS) -> dict[str, Any]:
    """The resolved configuration. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    def resolved() -> dict[str, Any]:
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        model = config.get("model")
        if isinstance(model, dict) and isinstance(model.get("places"), dict):  # YAML writes 5, a command line "5"
            model["places"] = functools.reduce(merge, ({whole(k): v} for k, v in model["places"].items()), {})
        return config

    with _hydra(overrides, configs) as (spelled, parsed):
        cfg = hydra_compose("train", spelled)
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            rule = f"missing; +config=NAME brings a model, NAME being one of {', '.join(_names(configs))}"
            raise ConfigError(missing[0], rule, "???")
        if "name" in cfg and cfg.name is None:
            chosen = [override.value() for override in parsed if override.key_or_group == "config"]
            cfg.name = f"{chosen[-1] if chosen else 'train'}-{fingerprint(resolved())}"
        return resolved()


def fingerprint(config: Mapping[str, Any]) -> str:
    """Six hex digits over what decides the result: model, data, optimizer, objective and seed."""
    same_keys = json.loads(json.dumps({key: config.get(key) for key in HASHED}))
    return hashlib.sha256(json.dumps(same_keys, sort_keys=True).encode()).hexdigest()[:6]


def _names(configs: Path) -> list[str]:
    return sorted(path.stem for path in (configs / "config").glob("*.yaml"))


@contextmanager
def _hydra(overrides: Iterable[str], configs: Path) -> Iterator[tuple[list[str], list[Any]]]:
    """Hydra initialised: the overrides as it wants them and as it reads them; its errors leave as ConfigError.

    An override of a plain value may name any key (`++`): whether the key exists is for the constructors to say.
    """
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    given, spelled = list(overrides), []
    groups = [path.name for path in configs.iterdir() if path.is_dir()]
    try:
        parsed = OverridesParser.create().parse_overrides(given)
        for override in parsed:
            key, line, value = override.key_or_group, str(override.input_line), override.value()
            if re.match(r"hydra\b", key):
                raise ConfigError(key, "Hydra only composes here, its own settings are not in use", line)
            grouped = override.package is not None or "/" in key or key in groups
            if grouped and isinstance(value, int | float):
                raise ConfigError(key, "chosen by the name of one of its files", value)
            change = override.type is OverrideType.CHANGE and not (grouped and not isinstance(value, dict))
            spelled.append(f"++{line}" if change else line)
        with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
            yield spelled, parsed
    except ConfigError:
        raise
    except Exception as error:
        raise _rewritten(error, given, groups) from error


def _rewritten(error: Exception, given: Sequence[str], groups: Sequence[str]) -> ConfigError:
    """Hydra's own complaint in our form."""
    text = re.split(r"\s+(?:See https|full_key)", f"{error} {error.__cause__ or ''}".strip())[0]
    pairs = {key.lstrip("+~"): value for key, _, value in (line.partition("=") for line in given)}
    if options := getattr(error, "options", None):
        group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
        key = next((k for k, v in pairs.items() if v == name and k.startswith(group)), group)
        return ConfigError(key, f"no such {group}; there are {', '.join(options)}", name, nearest(name, options))
    if line := getattr(error, "override", None):
        key, _, value = line.lstrip("+~").partition("=")
        return ConfigError(key, f"not readable as KEY=VALUE: {text}", value)
    named = sorted((key for key in pairs if key in text), key=lambda key: (f"'{key}" in text, len(key)))
    key = getattr(error.__cause__ or error, "full_key", None) or (named[-1] if named else "configs")
    group = key.partition("@")[0]
    near = None if "." in key else nearest(key, (*PARTS, *PLAIN))
    if "Ambiguous value" in text or "requires --multirun" in text:
        text = "several values: write [a,b] for a list, or add --multirun to run each"
    elif "defaults list" in text or "config group" in text:
        text = "no choice to override here: +KEY=NAME adds one, GROUP@PLACE=NAME chooses within"
        near = f"+{key}={pairs.get(key)}" if group in groups else nearest(group, groups)
    return ConfigError(key, text, pairs.get(key, ""), near)


def check(config: Mapping[str, Any]) -> SimpleNamespace:
    """The parts of a run, all built but the model, which `model_factory` builds and which here was built unfilled.

    Raises ConfigError on the first key that is unknown, missing, of the wrong type or refused by a constructor.
    """
    for key in {**dict.fromkeys((*PLAIN, *PARTS)), **config}:
        if key not in config:
            raise ConfigError(key, "missing")
        if key in PLAIN:
            fit(config[key], PLAIN[key], key)
        elif key not in PARTS:
            raise ConfigError(key, "unknown key", config[key], nearest(key, (*PLAIN, *PARTS)))
        elif not isinstance(config[key], Mapping) or "_target_" not in config[key] or config[key].get("_partial_"):
            raise ConfigError(key, f"needs a part, a mapping with _target_; choose it by {key}=NAME", config[key])
    seed, resume, init_from, folders = *(config[key] for key in ("seed", "resume", "init_from")), ("auto", "never")
    if not 0 <= seed < 2**32:
        raise ConfigError("seed", "from 0 to 4294967295", seed)
    if resume not in folders and not Path(resume).exists():
        raise ConfigError("resume", "auto, never, or an existing folder", resume, nearest(resume, folders))
    if init_from is not None and not (resume in folders and Path(init_from).exists()):
        raise ConfigError("init_from", f"needs an existing folder, and no folder in resume={resume}", init_from)
    if config["init_allow"] and init_from is None:
        raise ConfigError("init_allow", "goes with init_from, which is not given", config["init_allow"])
    parts = {key: build(config[key], key, None) for key in PARTS if key != "model"}
    given, wanted = getattr(_unfilled(config["model"]), "vocab_size", 0), getattr(parts["data"], "vocab_size", 0)
    if given < wanted:
        raise ConfigError("model.vocab_size", f"smaller than data.vocab_size={wanted}", given)
    micro, rows = getattr(parts["trainer"], "micro_batch_size", None), getattr(parts["data"], "batch_size", 0)
    if micro and rows % micro:
        raise ConfigError("trainer.micro_batch_size", f"must divide data.batch_size={rows}", micro)
    return SimpleNamespace(**parts, model_factory=lambda: build(config["model"], "model", None))


def _unfilled(node: Mapping[str, Any]) -> Any:
    """The model in memory that is never touched. (On the meta device, `exp` loads torch's compiler: seconds.)"""
    from torch.overrides import TorchFunctionMode

    class InPlaceDoesNothing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if re.fullmatch(r"\w*[^_]_", getattr(func, "__name__", "")):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with InPlaceDoesNothing():
        return build(node, "model", None)


def main(run: Callable[[dict[str, Any], SimpleNamespace], int], configs: Path = CONFIGS, argv: Any = None) -> int:
    """Compose, check, and hand (config, parts) to `run`; the exit code, 2 where the configuration is bad."""
    usage = "python train.py +config=NAME [KEY=VALUE ...] [--cfg job] [--multirun KEY=A,B]"
    parser = argparse.ArgumentParser(usage=usage, epilog=f"NAME: {', '.join(_names(configs))}", allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", help="+config=NAME; KEY=VALUE; GROUP=NAME; GROUP@PLACE=NAME")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of the values given")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print what would run")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.multirun:
            return _run_each(args.overrides, configs)
        config = compose(args.overrides, configs)
        if args.cfg:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        parts = check(config)
        return 0 if args.cfg else run(config, parts)
    except ConfigError as error:
        print("Bad configuration: " + "\n  ".join(error.lines), file=sys.stderr)
        return 2


def _run_each(overrides: Sequence[str], configs: Path) -> int:
    """Every combination in a process of its own, after all were checked; the first exit code that is not 0."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    with _hydra(overrides, configs) as (_, parsed):
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    composed = [compose(job, configs) for job in jobs]
    names = [config["name"] for config in composed]
    for i, (job, name) in enumerate(zip(jobs, names, strict=True)):
        if names.count(name) > 1:  # the jobs differ in a limit or a logger only, which the name leaves out
            job.append(f"name={name}-{i}")
            composed[i] = compose(job, configs)
        check(composed[i])
    if len({config["run_dir"] for config in composed}) < len(jobs):
        raise ConfigError("run_dir", "each job needs its own: write ${name} in it", composed[0]["run_dir"])
    codes = [0]
    for i, job in enumerate(jobs):
        print(f"[{i + 1}/{len(jobs)}] {' '.join(job)}", flush=True)
        process = subprocess.Popen([sys.executable, sys.argv[0], *job])
        for number in (signal.SIGTERM, signal.SIGINT):  # a job saves and exits with 128 + signal; then no other starts
            signal.signal(number, lambda *_, process=process: process.terminate())
        codes.append(process.wait())
        if codes[-1] > 128 or codes[-1] < 0:
            break
    return next((code for code in codes if code), 0)
