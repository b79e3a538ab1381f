"""Who may import whom: every import of every file, against the table of the house."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {  # room -> (rooms of ours it may import, heavy packages it may import)
    "kernels": (set(), {"torch", "triton", "einops"}),
    "packing": (set(), {"torch"}),
    "tokenizer": (set(), {"torch", "numpy", "tokenizers"}),
    "models": ({"kernels", "packing"}, {"torch", "einops"}),
    "config": (set(), {"torch", "hydra", "omegaconf"}),
    "checkpoint": ({"models", "packing", "config", "tokenizer"}, {"torch", "safetensors"}),
    "data": ({"packing", "tokenizer"}, {"torch", "numpy", "datasets", "tqdm"}),
    "generation": ({"models", "packing", "checkpoint", "tokenizer"}, {"torch"}),
    "generate": ({"models", "packing", "checkpoint", "tokenizer", "generation"}, {"torch"}),
    "evaluation": ({"models", "packing", "data", "checkpoint", "generation", "tokenizer"}, {"torch", "transformers"}),
    "evaluate": (
        {"models", "packing", "data", "checkpoint", "generation", "tokenizer", "evaluation", "config"},
        {"torch"},
    ),
    "testing": ({"models", "kernels", "packing"}, {"torch", "pytest", "einops"}),
    "training": (
        {"models", "kernels", "packing", "config", "checkpoint", "data", "generation", "evaluation", "tokenizer"},
        {"torch", "numpy", "lightning", "wandb", "matplotlib", "tensorboard", "einops", "tqdm"},
    ),
    "__init__": ({"checkpoint", "models", "tokenizer", "packing"}, {"torch"}),
}
LIGHT = {  # named in configs, so they are imported before a configuration is known to be good
    "config.py", "data", "training/settings.py", "training/optimizers.py", "training/schedules.py",
    "training/objectives", "tokenizer.py",
}  # fmt: skip
HEAVY = {"lightning", "wandb", "datasets", "transformers", "matplotlib", "tensorboard", "pytest"}
STDLIB_TOO = {"pickle"}


def sources() -> list[Path]:
    roots = [ROOT / "models", ROOT / "kernels", ROOT / "hybridlab"]
    files = [p for root in roots for p in sorted(root.rglob("*.py"))]
    return [p for p in files if "hybridlab/models/" not in p.as_posix() and "hybridlab/kernels/" not in p.as_posix()]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "hybridlab" else Path(parts[1]).stem


def imports(path: Path) -> list[tuple[str, bool]]:
    """Dotted names imported by a file, and whether the import runs when the module is imported."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                module = child.module or ""
                if module == "hybridlab":
                    found.extend((f"hybridlab.{alias.name}", top) for alias in child.names)
                else:
                    found.append((module, top))
            else:
                visit(child, inner and not typing_only)

    visit(ast.parse(path.read_text()), True)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    assert room in ROOMS, f"{path} stands in no known room"
    ours, packages = ROOMS[room]
    known = {package for _, allowed in ROOMS.values() for package in allowed} | HEAVY
    for name, top in imports(path):
        head, *rest = name.split(".")
        assert head not in ("models", "kernels"), f"{path} imports {name}: write hybridlab.{name}"
        if head == "hybridlab" and rest:
            assert rest[0] == room or rest[0] in ours, f"{room} may not import {name} ({path})"
        elif head in known:
            assert head in packages, f"{room} may not import {name} ({path})"
        if head == "triton":
            assert path.name.startswith("triton_"), f"triton belongs in triton_*.py, not in {path}"
        if head == "transformers":
            assert not top, f"{path} imports transformers at its top"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_config_names_imports_nothing_heavy(path):
    local = path.relative_to(ROOT / "hybridlab").as_posix() if (ROOT / "hybridlab") in path.parents else ""
    light = not local or any(local == place or local.startswith(f"{place}/") for place in LIGHT)
    light = light and room_of(path) not in ("testing",)
    if light:
        heavy = [name for name, top in imports(path) if top and name.split(".")[0] in HEAVY]
        assert not heavy, f"{path} imports {heavy} when a config is only being checked"


def test_nothing_imports_experiments_and_nothing_unpickles():
    for path in sources():
        names = [name.split(".")[0] for name, _ in imports(path)]
        assert "experiments" not in names and not STDLIB_TOO & set(names), path


def test_no_file_outgrows_the_style():
    for path in sources():
        limit = 500 if path.parts[len(ROOT.parts)] == "kernels" else 300
        lines = len(path.read_text().splitlines())
        assert lines <= limit, f"{path} has {lines} lines; split by idea at {limit}"


def test_the_top_rooms_are_namespaces_reached_through_links():
    for room in ("models", "kernels"):
        assert not (ROOT / room / "__init__.py").exists()
        link = ROOT / "hybridlab" / room
        assert link.is_symlink() and link.readlink() == Path("..") / room


def test_dependencies_exclude_the_known_bad():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {spec.split(">=")[0]: spec for spec in project["dependencies"]}
    assert "lightning>=2.6.6" in asked["lightning"], "2.6.2 and 2.6.3 were malware"
    assert "torch>=2.11,<2.14" == asked["torch"]


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    text = path.read_text()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(1 for i, line in lines if line and not line.startswith("#") and i not in prose)


# Room -> lines of code it may hold. The first whole system (six mixers, plain kernels) held 4,350 of an aim of 4,000;
# since then came nine mixers, and kernels in Triton and C++ behind the Python counted here.
CAPS = {"hybridlab": 2_650, "models": 1_750, "kernels": 4_000}


@pytest.mark.parametrize("room", CAPS)
def test_code_stays_small(room):
    total = sum(code_lines(path) for path in sources() if path.relative_to(ROOT).parts[0] == room)
    assert total < CAPS[room], f"{room} holds {total} lines of code"
