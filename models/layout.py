"""From a pattern of names to one part per place."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

Part = Callable[[int], Any]  # d_model -> a block
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def expand(pattern: str | Sequence[str], letters: Mapping[str, str] | None, n_layers: int | None) -> list[str]:
    """Block name of every place: the pattern, repeated (and cut) to `n_layers`, or once where that is None.

    A string is read letter by letter through `letters`. Raises ValueError on unknown or unused letters, on an empty
    pattern and on n_layers below 1.
    """
    if isinstance(pattern, str):
        if not letters:
            raise ValueError(f"pattern={pattern!r} is a string: give letters, a table from letter to block name")
        if unknown := sorted(set(pattern) - set(letters)):
            raise ValueError(f"pattern={pattern!r} uses the letters {unknown}, but letters defines {sorted(letters)}")
        if unused := sorted(set(letters) - set(pattern)):
            raise ValueError(f"letters defines {unused}, which pattern={pattern!r} does not use")
        pattern = [letters[letter] for letter in pattern]
    elif letters is not None:
        raise ValueError(f"letters={dict(letters)} goes with a pattern string, but pattern={list(pattern)} is a list")
    if not pattern:
        raise ValueError("pattern is empty: name at least one block")
    n_layers = len(pattern) if n_layers is None else n_layers
    if n_layers < 1:
        raise ValueError(f"n_layers={n_layers}: a model has at least one layer")
    return [pattern[i % len(pattern)] for i in range(n_layers)]


def check_names(layout: Sequence[str], blocks: Mapping[str, Any]) -> None:
    """Raise ValueError unless layout and blocks name the same well-formed names."""
    if bad := [name for name in blocks if not _NAME.fullmatch(name)]:
        raise ValueError(f"blocks names {bad}: a block name matches [a-z][a-z0-9_]*")
    if unknown := sorted(set(layout) - set(blocks)):
        raise ValueError(f"pattern names {unknown}, but blocks defines {sorted(blocks)}{_hint(unknown[0], blocks)}")
    if unused := sorted(set(blocks) - set(layout)):
        raise ValueError(f"blocks defines {unused}, which none of the {len(layout)} layers uses: {sorted(set(layout))}")


def sharing(shared: Mapping[str, Sequence[int]] | None, layout: Sequence[str]) -> list[int]:
    """For each place, the first place that holds its parameters (itself where nothing is shared).

    Raises ValueError when a group has fewer than two places, reaches outside, overlaps another or mixes blocks.
    """
    owner = list(range(len(layout)))
    groups = dict(shared or {})
    times = Counter(place for places in groups.values() for place in places)
    if twice := sorted(place for place, n in times.items() if n > 1):
        raise ValueError(f"shared names the places {twice} more than once")
    for name, places in groups.items():
        if len(places) < 2 or not all(0 <= place < len(layout) for place in places):
            raise ValueError(f"shared.{name}={list(places)}: give two or more places from 0 to {len(layout) - 1}")
        if len(kinds := {layout[place] for place in places}) > 1:
            raise ValueError(f"shared.{name}={list(places)} mixes the blocks {sorted(kinds)}; give places of one block")
        for place in places:
            owner[place] = min(places)
    return owner


def parts_by_place(layout: Sequence[str], blocks: Mapping[str, Part], places: Mapping | None) -> list[Part]:
    """The block of every place, `places` worked in. Raises ValueError on unknown places or keys."""
    places = places or {}
    if outside := [place for place in places if not (isinstance(place, int) and 0 <= place < len(layout))]:
        raise ValueError(f"places names {outside}, but places are whole numbers from 0 to {len(layout) - 1}")
    parts = [blocks[name] for name in layout]
    for place, changes in places.items():
        parts[place] = override(parts[place], changes, f"places.{place}")
    return parts


def override(part: Any, changes: Any, where: str) -> Any:
    """A partial (or a mapping of partials) with some of its keywords replaced, however deep."""
    if not isinstance(changes, Mapping):
        return changes
    if isinstance(part, partial):
        known, old = list(inspect.signature(part.func).parameters), dict(part.keywords)
    elif isinstance(part, Mapping):
        known, old = list(part), dict(part)
    else:
        raise ValueError(f"{where}={dict(changes)}: there is nothing here whose options could be changed")
    if unknown := [key for key in changes if key not in known]:
        raise ValueError(f"{where} sets {unknown}, but the options are {known}{_hint(unknown[0], known)}")
    new = {key: override(old.get(key), value, f"{where}.{key}") for key, value in changes.items()}
    return partial(part.func, *part.args, **{**old, **new}) if isinstance(part, partial) else {**old, **new}


def _hint(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
