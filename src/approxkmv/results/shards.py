"""Shards that stay whole and of one kind: beside each finished file its hash, and of which weights and texts it is."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from approxkmv.errors import TableError
from approxkmv.files import hash_file, is_damaged, sha256, write_csv, write_parquet, write_text
from approxkmv.results.tables import read_shard_table


def shard_count(texts: Path, shard_contexts: int) -> int:
    """How many shards the texts make. Raises TableError when the table of texts cannot be read."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(texts).num_rows
    except (OSError, ValueError) as error:
        raise TableError(f"{texts} cannot be read ({error}): run texts again") from error
    return -(-rows // shard_contexts)


def write_shard(path: Path, table: pd.DataFrame, origin: str) -> None:
    """Write a shard's CSV or Parquet file and, beside it as FILE.sha256, its hash and its origin (see fetch.origin)."""
    (write_parquet if path.suffix == ".parquet" else write_csv)(path, table)
    write_text(hash_file(path), f"{sha256(path)}  {path.name}\n# {origin}\n")


def read_shards(folder: Path, count: int, *kinds: str) -> list[pd.DataFrame]:
    """For each kind, as contexts.csv, the tables of a model's shards, one below the other.

    Raises TableError for a shard that is missing or damaged, and when they are not all of the same weights and texts.
    Others that an earlier study left in the folder are not read.
    """
    tables = []
    origins: dict[str, Path] = {}
    for kind in kinds:
        parts = []
        for shard in range(count):
            path = folder / f"{shard:04d}.{kind}"
            if path.is_file() and is_damaged(path):
                raise TableError(f"{path} is not what its checksum says: run the study again, and it is made again")
            parts.append(read_shard_table(path, kind))
            origins.setdefault(origin_of(path), path)
        tables.append(pd.concat(parts, ignore_index=True))
    if len(origins) > 1:
        one, other, *_ = origins.values()
        raise TableError(f"{one} and {other} are of different weights or texts: run the study again to make both anew")
    return tables


def origin_of(path: Path) -> str:
    """Of which weights and texts a shard is; nothing when nobody wrote it down."""
    try:
        lines = hash_file(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return lines[1].removeprefix("# ") if len(lines) > 1 else ""
