"""Shards, each stored with its hash and its origin: the model, weights and texts it was computed from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from approxkmv.errors import TableError
from approxkmv.files import file_sha256, hash_file, is_damaged, read_table, write_csv, write_parquet, write_text
from approxkmv.results.tables import read_shard_table


def shard_count(texts: Path, shard_contexts: int) -> int:
    """The number of shards of the texts. Raises TableError when the table of texts cannot be read."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(texts).num_rows
    except (OSError, ValueError) as error:
        raise TableError(f"{texts} cannot be read ({error}): run texts again") from error
    return -(-rows // shard_contexts)


def joined(parts: Sequence[pd.DataFrame], columns: Mapping[str, str]) -> pd.DataFrame:
    """A shard's table from those of its texts, with these columns and types; without rows if all are too short."""
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(columns))
    return table[list(columns)].astype(columns)


def write_shard(path: Path, table: pd.DataFrame, origin: str) -> None:
    """Write a shard's CSV or Parquet file and, beside it as FILE.sha256, its hash and origin (see locations.origin)."""
    (write_parquet if path.suffix == ".parquet" else write_csv)(path, table)
    write_text(hash_file(path), f"{file_sha256(path)}  {path.name}\n# {origin}\n")


def read_shards(folder: Path, model: str, texts: Path, shard_contexts: int, *kinds: str) -> list[pd.DataFrame]:
    """For each kind, such as contexts.csv, the concatenated tables of a model's shards of the texts.

    Raises TableError for a shard that is missing, damaged, or of another model or other texts, when shards differ in
    their weights, and when those of contexts.csv are not of all the texts. Shards that an earlier study left in the
    folder are ignored.
    """
    tables = []
    origins: dict[str, Path] = {}
    for kind in kinds:
        parts = []
        for shard in range(shard_count(texts, shard_contexts)):
            path = folder / f"{shard:04d}.{kind}"
            if path.is_file() and is_damaged(path):
                raise TableError(f"{path} does not match its checksum: run the study again to regenerate it")
            parts.append(read_shard_table(path, kind))
            origins.setdefault(own_origin(path, origin_of(path), model), path)
        tables.append(pd.concat(parts, ignore_index=True))
    if len(origins) > 1:
        one, other, *_ = origins.values()
        raise TableError(f"{one} and {other} come from different weights or texts: run the study again")
    for origin, path in origins.items():
        if origin and not origin.endswith(f"texts {file_sha256(texts)}"):
            raise TableError(f"{path} is of other texts than {texts}: name its own, or run extract again")
    if "contexts.csv" in kinds:
        found, wanted = tables[kinds.index("contexts.csv")]["context"], read_table(texts, {"index": "whole"})["index"]
        if found.tolist() != wanted.tolist():
            raise TableError(
                f"the shards in {folder} hold {found.isin(wanted).sum()} of the {len(wanted)} texts in {texts}: name "
                "the study that they were made for, or run it again"
            )
    return tables


def origin_of(path: Path) -> str:
    """The origin of a shard: its model, weights and texts; empty if not recorded."""
    try:
        lines = hash_file(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return lines[1].removeprefix("# ") if len(lines) > 1 else ""


def own_origin(path: Path, origin: str, model: str) -> str:
    """The weights and texts that an origin names, after the model, which those of earlier versions do not name.

    Raises TableError for the origin of another model.
    """
    of_weights = origin.removeprefix(f"model {model}, ")
    if other := re.match(r"model ([\w.-]*)", of_weights):
        raise TableError(f"{path} is of the model {other[1]}, not of {model}: name a file of {model}")
    return of_weights
