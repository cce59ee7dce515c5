"""Which files of this package others use, found from their imports: what rules and compiled code depend on."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT.name
# What a command needs from the configuration is in the params of its rule, which rerun it when they change; editing
# the code that reads the configuration must not invalidate every result.
APART = ROOT / "config"


# Names for `compute.loops.compiled_loops` and `compute.trial.fastest`, which import at run time.
MODULE = re.compile(r'"([a-z_.]+\.(?:[a-z_]*loops|trials\.[a-z_]+))"')


def command_files(command: str, *more: str) -> list[Path]:
    """The files that a command imports, directly or indirectly, sorted by name.

    Args:
        command: the name of a function in cli/, such as `summary`.
        more: files or folders of the package that are imported by a name known only at run time.
    """
    first = [*_of_command(command)]
    for name in more:
        path = ROOT / name
        first += path.rglob("*.py") if path.is_dir() else [path]
    return files_behind(*first)


def files_behind(*files: Path) -> list[Path]:
    """These files and those of the package that they import, directly or indirectly, sorted by name."""
    waiting, found = [*files], set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in found and APART not in path.parents:
            found.add(path)
            waiting += _of_file(path)
    return sorted(found)


def digest_of(files: Iterable[Path]) -> str:
    """A SHA-256 of the contents of files, in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _of_command(command: str) -> Iterator[Path]:
    """The files that the function of a command imports, including those of the functions of cli/ that it calls."""
    files = sorted((ROOT / "cli").glob("*.py"))
    functions = {node.name: node for file in files for node in _tree(file).body if isinstance(node, ast.FunctionDef)}
    yield from _imported(functions[command])
    for node in ast.walk(functions[command]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            yield from _imported(functions[node.func.id])


@cache
def _of_file(path: Path) -> tuple[Path, ...]:
    return (*_imported(_tree(path)), *_named_in_text(path))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _imported(node: ast.AST) -> Iterator[Path]:
    """The package's files that the code in a node imports, either immediately or when a function is called."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _module(alias.name)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            yield from _named(node.module, alias.name)
    elif isinstance(node, ast.If) and _is_type_checking(node):
        for part in node.orelse:
            yield from _imported(part)
    else:
        # Imports are statements, and statements occur only in these fields.
        for field in ("body", "orelse", "handlers", "finalbody", "cases"):
            for part in getattr(node, field, []):
                yield from _imported(part)


def _named_in_text(path: Path) -> Iterator[Path]:
    """The modules that a file names in a string, such as "statistics.row_loops", for an import at run time."""
    for name in MODULE.findall(path.read_text(encoding="utf-8")):
        yield from _named(f"{PACKAGE}.{name.rpartition('.')[0]}", name.rpartition(".")[2])


@cache
def _module(name: str) -> list[Path]:
    """The file of a module and of its parent packages; empty when it is not part of this package."""
    words = name.split(".")
    if words[0] != PACKAGE:
        return []
    folders = [ROOT.joinpath(*words[1:end]) for end in range(1, len(words) + 1)]
    files = [folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py") for folder in folders]
    return [path for path in files if path.is_file()]


@cache
def _named(module: str, name: str) -> list[Path]:
    """The files of `from module import name`, also when the package imports the name on demand."""
    files = _module(module)
    submodule = _module(f"{module}.{name}")
    if len(submodule) > len(files):
        return submodule
    if files and files[-1].name == "__init__.py":
        for node in _tree(files[-1]).body:
            if isinstance(node, ast.If) and _is_type_checking(node):
                for part in node.body:
                    if isinstance(part, ast.ImportFrom) and part.module and name in [a.name for a in part.names]:
                        files = files + _named(part.module, name)
    return files


def _is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
