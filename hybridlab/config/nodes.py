"""From a plain mapping to objects: the constructors' signatures are the schema."""

import functools
import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

FOREIGN = "a file from elsewhere may only name classes of hybridlab and of packages you trust"
_FREE = (Any, object, inspect.Parameter.empty)
_WRONG = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AssertionError)
_WORDS = {NoneType: "null", bool: "true or false", float: "a number", int: "a whole number", str: "text"}
_UNSAID: Any = object()


class ConfigError(Exception):
    """Which key is wrong and its value, the rule it breaks, and the nearest valid name where there is one."""

    def __init__(self, key: str, rule: str, value: Any = _UNSAID, near: str | None = None):
        said = "" if value is _UNSAID else f" = {shorten(repr(value), 160, placeholder='…')}"
        rule = f"rule: {shorten(rule, 500, placeholder='…')}"
        self.lines = [key + said, rule, *([f"nearest valid: {near}"] if near else [])]
        super().__init__("; ".join(self.lines))


def build(node: Any, key: str = "model", trusted: Sequence[str] | None = ()) -> Any:
    """What a configuration stands for. Raises ConfigError.

    trusted   packages beside hybridlab whose classes may be built; None, for the user's own command line: any class
    """
    return fit(node, Any, key, trusted)


class Part(functools.partial):
    """A constructor waiting for its sizes, which knows where it stands in the configuration."""

    node: Mapping[str, Any]
    key: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _blaming(self.func, self.node, self.key):
            return super().__call__(*args, **kwargs)


def fit(value: Any, kind: Any, key: str, trusted: Sequence[str] | None = ()) -> Any:
    """`value`, with every node in it built, if it is of the annotated `kind`."""
    kinds = get_args(kind) if get_origin(kind) in (typing.Union, UnionType) else (kind,)
    if isinstance(value, Mapping) and "_target_" in value:
        return _build_node(value, kinds, key, trusted)
    for k in kinds:
        free, origin, of = k in _FREE or isinstance(k, typing.TypeVar), get_origin(k) or k, get_args(k)
        if isinstance(value, Mapping) and (free or origin in (Mapping, dict)):
            of_key, of_value = of or (Any, Any)
            named = {whole(n) if of_key is int else str(n): v for n, v in value.items()}
            if of_key is int and (bad := [n for n in named if not isinstance(n, int)]):
                raise ConfigError(f"{key}.{bad[0]}", "needs a whole number as its name", value[bad[0]])
            return {n: fit(v, of_value, f"{key}.{n}", trusted) for n, v in named.items()}
        if isinstance(value, list | tuple) and (free or origin in (Sequence, Iterable, list, tuple)):
            items = [fit(v, of[0] if of else Any, f"{key}[{i}]", trusted) for i, v in enumerate(value)]
            return tuple(items) if origin is tuple else items
        if free or _is_a(value, k):
            return value
    options = [str(option) for k in kinds if get_origin(k) is Literal for option in get_args(k)]
    rounded = str(int(value)) if isinstance(value, float) and int in kinds and value % 1 == 0 else None
    raise ConfigError(key, f"needs {_say(kinds, key)}", value, nearest(value, options) or rounded)


def _build_node(node: Mapping[str, Any], kinds: Sequence[Any], key: str, trusted: Sequence[str] | None) -> Any:
    cls = find_class(node["_target_"], f"{key}._target_", trusted)
    partial = fit(node.get("_partial_", False), bool, f"{key}._partial_")
    serving = [kind for kind in kinds if _serves(cls, partial, kind)]
    if not serving:
        raise ConfigError(key, f"needs {_say(kinds, key)}", f"{cls.__name__}{', _partial_: true' if partial else ''}")
    values = {name: value for name, value in node.items() if name not in ("_target_", "_partial_")}
    params = inspect.signature(cls, eval_str=True).parameters
    stars = [n for n, p in params.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [n for n, p in params.items() if p.default is p.empty and n not in stars]
    # what the caller of a constructor gives: its sizes, by position, or under Callable[..., X] whatever it needs
    all_later = get_args(serving[0])[:1] == (...,)
    later = [n for n in needed if partial and (all_later or params[n].kind is not inspect.Parameter.KEYWORD_ONLY)]
    known = [n for n in params if n not in later]
    for name, value in values.items():
        if name not in known and not stars:
            rule = f"unknown option of {cls.__name__}, which has {', '.join(known)}"
            rule = f"not to be set: the model gives it to {cls.__name__}" if name in later else rule
            raise ConfigError(f"{key}.{name}", rule, value, nearest(name, known))
    if missing := [name for name in needed if name not in values and name not in later]:
        raise ConfigError(f"{key}.{missing[0]}", f"missing: {cls.__name__} needs it")
    if isinstance(values.get("places"), Mapping) and values.get("pattern"):
        values["places"] = _placed(values, f"{key}.places")
    kind_of = {name: params[name].annotation if name in params else Any for name in values}
    made = {name: fit(value, kind_of[name], f"{key}.{name}", trusted) for name, value in values.items()}
    if partial:
        part = Part(cls, **made)
        part.node, part.key = node, key
        return part
    with _blaming(cls, node, key):
        return cls(**made)


def _placed(model: Mapping[str, Any], key: str) -> dict[Any, Any]:
    """`places`, every change worked into the block it changes, to be checked as that block is."""
    pattern, letters, blocks = model["pattern"], model.get("letters") or {}, model.get("blocks") or {}
    names = [letters.get(x) for x in pattern] if isinstance(pattern, str) else pattern
    for place, changes in model["places"].items():
        if not isinstance(changes, Mapping) or not isinstance(whole(place), int):
            raise ConfigError(f"{key}.{place}", "needs PLACE: {what differs}, places counted from 0", changes)
    return {n: merge(blocks.get(names[whole(n) % len(names)]), change) for n, change in model["places"].items()}


def find_class(target: Any, key: str, trusted: Sequence[str] | None) -> type:
    """The class a dotted name stands for; a name outside the trusted packages is refused before any import."""
    module, _, name = str(target).rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", str(target), re.ASCII):
        raise ConfigError(key, "needs package.module.Class", target)
    packages = (module.split(".")[0],) if trusted is None else ("hybridlab", *trusted)
    if module.split(".")[0] not in packages:
        raise ConfigError(key, FOREIGN, target)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        parent, _, last = module.rpartition(".")
        folder = getattr(sys.modules.get(parent), "__path__", [])
        near = nearest(last, [m.name for m in pkgutil.iter_modules(folder) if m.name != last])
        raise ConfigError(key, str(error), target, near and f"{parent}.{near}.{name}") from error
    cls = getattr(found, name, None)
    if not inspect.isclass(cls):
        near = nearest(name, [n for n, c in vars(found).items() if inspect.isclass(c) and c.__module__ == module])
        raise ConfigError(key, f"{module} has no class {name}", target, near and f"{module}.{near}")
    if trusted is not None and cls.__module__.split(".")[0] not in packages:
        raise ConfigError(key, FOREIGN, target)
    return cls


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(kind))
    if kind in (int, float):  # true is no number, and nan would pass every check of a range
        return isinstance(value, kind | int) and not isinstance(value, bool) and value == value
    return inspect.isclass(kind) and isinstance(value, str if kind is Path else kind)


def _serves(cls: type, partial: bool, kind: Any) -> bool:
    """Whether an object of `cls`, or where `partial` its constructor, is what an annotation asks for."""
    if get_origin(kind) in (Callable, Mapping):  # a mapping where a place holds a whole block
        returned = (get_args(kind) or (Any,))[-1]
        return partial and (returned in _FREE or not inspect.isclass(returned) or issubclass(cls, returned))
    return kind in _FREE or not inspect.isclass(kind) or (not partial and issubclass(cls, kind))


def _say(kinds: Sequence[Any], key: str) -> str:
    words = []
    for kind in kinds:
        origin, of = get_origin(kind), get_args(kind)
        name = getattr(of[-1] if of else kind, "__name__", "part")
        if origin is Literal:
            words.append(f"one of {', '.join(map(str, of))}")
        elif origin is Callable:
            words.append(f"a {name}, by GROUP@{key}=NAME or as a mapping with _target_ and _partial_: true")
        elif origin is not None:
            words.append("a mapping" if origin in (Mapping, dict) else "a list")
        else:
            words.append(_WORDS.get(kind, f"a {name} (a mapping with _target_)"))
    return " or ".join(words)


@contextmanager
def _blaming(cls: Any, node: Mapping[str, Any], key: str) -> Iterator[None]:
    """A constructor's refusal becomes a ConfigError at the option its message names: `lr=-1: …`, `pattern names …`."""
    try:
        yield
    except _WRONG as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        known = inspect.signature(cls).parameters
        named = [word for word in [text.partition(" ")[0], *re.findall(r"(\w+)[\w.]*=", text)] if word in known]
        name = next((word for word in named if word in node), named[0] if named else "")
        raise ConfigError(f"{key}.{name}" if name else key, text, node.get(name, _UNSAID)) from error


def whole(name: Any) -> Any:
    return int(name) if isinstance(name, str) and re.fullmatch(r"-?\d+", name) else name


def merge(base: Any, changes: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping) or "_target_" in changes:
        return changes
    return {**base, **{key: merge(base.get(key), value) for key, value in changes.items()}}


def nearest(name: Any, options: Iterable[Any]) -> str | None:
    return next(iter(get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)), None)
