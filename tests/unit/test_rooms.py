"""The layers of the package, its rooms: each imports only from itself and those below, and no imports are circular."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "approxkmv"
# From the bottom up; rooms of one line do not know each other.
LAYERS = """
errors lazy imports words
files arrays yaml_text slopes typed
provenance progress lock
compute partial
kernels
statistics kmv search
models
corpora results attention
operator
sweep
perplexity
config integrations
figures
page
steps
cli __init__
"""
LAYER = {room: number for number, line in enumerate(LAYERS.split("\n")) for room in line.split()}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("approxkmv", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(module: str) -> set[str]:
    """The package's modules whose names a module imports, at once or inside a function; not those for types alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & set(MODULES) - {module, "approxkmv"}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_has_a_layer():
    assert {room(module) for module in MODULES} == set(LAYER)


def test_no_two_files_import_each_other():
    # A method's file takes its form for a device from a room of its own, inside a function.
    sorter = TopologicalSorter({module: imported(module) for module in MODULES})
    assert len(list(sorter.static_order())) == len(MODULES)


def test_no_room_imports_from_a_room_beside_or_above_it():
    upwards = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imported(module)
        if room(module) != room(other) and LAYER[room(other)] >= LAYER[room(module)]
    ]
    assert not upwards


def test_the_room_of_methods_shows_ten_entries_at_most():
    entries = [path.name for path in (PACKAGE / "attention").iterdir() if not path.name.startswith("__pycache__")]
    assert len(entries) <= 10, entries


def test_no_file_has_more_than_four_hundred_lines():
    counts = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in counts.items() if count > 400} == {}
