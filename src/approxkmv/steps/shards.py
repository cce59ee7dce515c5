"""Shards that stay whole: a hash beside each finished file, and damaged ones found and removed before a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from approxkmv.errors import TableError
from approxkmv.files import sha256, write_csv, write_parquet, write_text
from approxkmv.models.fetching import is_running
from approxkmv.steps.activations import is_complete
from approxkmv.steps.fetch import read_location
from approxkmv.steps.tables import read_shard_table

SUFFIX = ".sha256"


def write_shard(path: Path, table: pd.DataFrame) -> None:
    """Write a shard's CSV or Parquet file and, beside it as FILE.sha256, its hash."""
    (write_parquet if path.suffix == ".parquet" else write_csv)(path, table)
    write_text(_hash_file(path), f"{sha256(path)}  {path.name}\n")


def read_shards(paths: Iterable[Path]) -> pd.DataFrame:
    """The tables of shards, one below the other. Raises TableError for a shard that is missing or damaged."""
    tables = []
    for path in paths:
        if path.is_file() and _is_damaged(path):
            raise TableError(f"{path} is not what its checksum says: run the study again, and it is made again")
        tables.append(read_shard_table(path, path.name.partition(".")[2]))
    return pd.concat(tables, ignore_index=True)


def remove_damaged(results: Path) -> list[str]:
    """Remove a study's shards that are not what their hash says, and activations cut short; a line for each.

    Call it when nothing is being written, before a run: the workflow then makes the files again. What was made of
    them goes too, since a workflow whose last files are all there does not look for the ones between.
    """
    # Not what starts with a dot: that is half-written, by a living process or as remove_leftovers finds it.
    damaged = [
        path
        for hash_file in sorted((results / "statistics").glob(f"*/[!.]*{SUFFIX}"))
        if (path := hash_file.with_name(hash_file.name.removesuffix(SUFFIX))).is_file() and _is_damaged(path)
    ]
    damaged += [path for path in sorted((results / "activations").glob("*/[!.]*.safetensors")) if not is_complete(path)]
    for path in damaged:
        path.unlink()
        _hash_file(path).unlink(missing_ok=True)
        if path.suffix != ".safetensors":
            model = path.parent.name
            for pattern in (f"tables/*_{model}.*", f"figures/*_{model}.*", "tables/paper_*", "figures/context_*"):
                for made in results.glob(pattern):
                    made.unlink()
    return [f"{path} is not what its checksum says: it is made again" for path in damaged]


def remove_leftovers(results: Path) -> None:
    """Remove what killed runs left in a study's folder: half-written files, and locations of models that are gone.

    A half-written file has the number of the process that wrote it in its name; those of living processes stay.
    """
    for path in results.rglob(".*"):
        number = path.name.split(".")[-2] if path.name.count(".") >= 3 else ""
        if path.is_file() and number.isdigit() and not is_running(int(number)):
            path.unlink(missing_ok=True)
    for path in (results / "models").glob("*.json"):
        try:
            read_location(path)
        except TableError:
            path.unlink(missing_ok=True)


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _is_damaged(path: Path) -> bool:
    """Whether there is a hash and the file does not have it; a file without a hash is taken as it is."""
    try:
        expected = _hash_file(path).read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not expected or sha256(path) != expected[0]
