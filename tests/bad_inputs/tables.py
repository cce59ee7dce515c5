"""Tables that an earlier step did not write so: cut, changed, of other columns, or no tables at all."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from approxkmv.files import write_csv, write_json, write_parquet
from bad_inputs import Case, command

LAYERS, HEADS = 2, 3
FIGURE = ("figure", "{}", "--tables", ".", "--out", "figure")
OF_MODEL = (*FIGURE, "--model", "m")
STUDY = ("--model", "m", "--statistics", ".", "--texts", "texts.parquet")
# What reads a table: the command, and the table.
READERS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(("max_ratios", "order_ratios"), (OF_MODEL, "heads_m.csv")),
    "growth": (OF_MODEL, "growth_m.csv"),
    "growth_curves": (OF_MODEL, "growth_curves_m.csv"),
    "attention_support": (OF_MODEL, "attention_m.csv"),
    "context_scaling": (OF_MODEL, "context_scaling_m.csv"),
    "readings": (OF_MODEL, "readings_m.csv"),
    "readings' path": (OF_MODEL, "readings_path_m.csv"),
    "length_scaling": (OF_MODEL, "length_scaling_m.csv"),
    "complexity": (FIGURE, "complexity.csv"),
    **dict.fromkeys(("speedup", "error_vs_time", "crossover"), (FIGURE, "sweep.csv")),
    "compare": (("compare", "--tables", ".", "--out", "comparison.csv"), "heads_m.csv"),
    "compare's readings": (("compare", "--tables", ".", "--out", "comparison.csv"), "readings_m.csv"),
    "compare's lengths": (("compare", "--tables", ".", "--out", "comparison.csv"), "context_scaling_m.csv"),
    "summary": (("summary", *STUDY, "--out", "tables"), "0000.contexts.csv"),
}
RECORDS: dict[str, tuple[tuple[str, ...], str]] = {
    "max_ratios": (OF_MODEL, "overview_m.json"),
    "context_scaling": (OF_MODEL, "overview_m.json"),
    "length_scaling": (OF_MODEL, "lengths_m.json"),
    "compare": (("compare", "--tables", ".", "--out", "comparison.csv"), "overview_m.json"),
}
SHARDS: dict[str, tuple[tuple[str, ...], str]] = {
    "summary": (("summary", *STUDY, "--out", "tables"), "0000.heads.parquet"),
    "summary's prefixes": (("summary", *STUDY, "--out", "tables"), "0000.prefixes.parquet"),
    "summary's texts": (("summary", *STUDY, "--out", "tables"), "texts.parquet"),
    "growth": (("growth", *STUDY, "--tables", "."), "0000.prefixes.parquet"),
    "readings-table": (("readings-table", *STUDY, "--out", "tables"), "0000.readings.parquet"),
    "attention-table": (("attention-table", *STUDY, "--out", "tables"), "0000.attention.parquet"),
    "length-scaling": (("length-scaling", *STUDY, "--study", "long", "--out", "tables"), "0000.lengths.parquet"),
}


def whole(folder: Path) -> None:
    """Put every table that READERS, RECORDS and SHARDS name into a folder, as its step writes it."""
    shutil.copytree(_made(), folder, dirs_exist_ok=True)


@cache
def _made() -> Path:
    """A folder with all of them, for as long as this process runs."""
    made = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    _make(made)
    return made


def _make(folder: Path) -> None:
    from approxkmv.kmv.complexity import COLUMNS as COUNTED
    from approxkmv.results.tables import SHARDS as KINDS
    from approxkmv.sweep.table import COLUMNS as TIMED

    study = {"models": ["m"], "corpus": "c", "min_prefix": 10, "prefixes": [10, 20]}
    studies = {"embedded": study, "long": study | {"lengths": [10, 20]}}
    config = {"models": {"m": {"source": "path:m"}}, "corpora": {"c": {"source": "path:c.txt"}}, "studies": studies}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    layer, head, along = (index.ravel() for index in np.indices((LAYERS, HEADS, 4)))
    grid = pd.DataFrame({"layer": layer, "head": head, "prefix": 10 * 2**along})
    heads = grid[grid["prefix"] == 10].drop(columns="prefix")
    ratios = ("max_ratio", "median_next_ratio", "median_double_ratio")
    write_csv(folder / "heads_m.csv", heads.assign(**dict.fromkeys(ratios, 1.5)))
    write_csv(folder / "attention_m.csv", heads.assign(support=1.5, first_mass=0.5))
    counts = {"texts": 8, "length": 40, "start": 20}
    write_csv(folder / "growth_m.csv", heads.assign(exponent=0.25, size="small", trend="flat", **counts))
    write_csv(folder / "growth_curves_m.csv", grid.assign(texts=8, adjusted_ratio=1.5))
    read = pd.DataFrame(
        {"reading": ["printed", "sigma"], "heads": 6, "texts": 8, "entries": "all", "heads_within_bound": 5}
    )
    for name in ("readings_m.csv", "readings_path_m.csv"):
        write_csv(folder / name, read.assign(largest_ratio=1.5, median_double=2.5, power=[1.0, 0.5]))
    prefix = pd.DataFrame({"prefix": [10, 20, 40, 80], "contexts": 9})
    write_csv(folder / "context_scaling_m.csv", prefix.assign(mean=2.5, std=0.5, min=1.5, max=3.5))
    names = ("ratio", "softmax_ratio", "double_ratio", "keys_90_mean")
    write_csv(
        folder / "length_scaling_m.csv",
        grid.rename(columns={"prefix": "length"}).assign(texts=8, **dict.fromkeys(names, 1.5)),
    )
    counted = pd.DataFrame({name: 2.0 ** np.arange(10, 14) for name in COUNTED}).assign(
        kernel="k", n=[256, 512, 1024, 2048]
    )
    write_csv(folder / "complexity.csv", counted)
    timed = pd.DataFrame(dict.fromkeys(TIMED, 0.5), index=range(4))
    timed = timed.assign(workload="w", columns="one", status="ok", parameters="{}", n=[64, 128, 64, 128], batch=1)
    timed = timed.assign(method=["exact-fused"] * 2 + ["mean"] * 2, kind=["exact"] * 2 + ["trivial"] * 2, target=0.1)
    write_csv(folder / "sweep.csv", timed)
    facts = {"model": "m", "label": "a model", "corpus": "a corpus", "layers": LAYERS, "heads": HEADS, "texts_used": 2}
    write_json(folder / "overview_m.json", facts | {"paper_bound": 4.6})
    write_json(folder / "lengths_m.json", facts | {"lengths": [10, 20], "texts_missing": []})
    write_parquet(folder / "texts.parquet", pd.DataFrame({"index": [0, 1], "name": "t", "text": "One."}))
    write_csv(
        folder / "0000.contexts.csv",
        pd.DataFrame(
            {"context": [0, 1], "tokens": 65, "cut": 0, "used": True, "causal": True}
            | {"mask": "no key after its query", "left_out": ""}
        ),
    )
    for kind, (place, values) in KINDS.items():
        if kind != "contexts.csv":
            rows = grid[grid["prefix"] <= 20].rename(columns={"prefix": place[-1]})
            rows = rows.drop_duplicates(["layer", "head"]) if place[-1] in ("max_prefix", "tokens") else rows
            rows = heads if place[-1] == "head" else rows
            cells = {name: {"text": "printed", "yes or no": True}.get(what, 1.5) for name, what in values.items()}
            write_parquet(folder / f"0000.{kind}", rows.assign(context=0, **cells)[[*place, *values]])


def read(reader: str, arguments: tuple[str, ...], folder: Path) -> tuple[int, str]:
    """Run the command on the tables of a folder."""
    reader = reader.partition("'")[0]
    return command(folder, *(reader if word == "{}" else word for word in arguments))


def run(
    reader: str, found: tuple[tuple[str, ...], str], damage: Callable[[bytes], bytes], hashed: bool, folder: Path
) -> tuple[int, str]:
    """Damage one whole table and read it, with the hash of what it was beside it or without any."""
    arguments, name = found
    whole(folder)
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    if not hashed:
        path.with_name(f"{name}.sha256").unlink(missing_ok=True)
    return read(reader, arguments, folder)


def lines(change: Callable[[list[str]], list[str]]) -> Callable[[bytes], bytes]:
    """A damage of the list of lines."""
    return lambda data: "".join(f"{line}\n" for line in change(data.decode().splitlines())).encode()


def cells(change: Callable[[list[str]], list[str]], row: int = 1) -> Callable[[bytes], bytes]:
    """A damage of the cells of one line."""

    def changed(found: list[str]) -> list[str]:
        return [",".join(change(line.split(","))) if number == row else line for number, line in enumerate(found)]

    return lines(changed)


# A column of each table that is drawn or read, which has no number below 0.
MEASURED = {
    "max_ratios": "max_ratio",
    "order_ratios": "median_double_ratio",
    "attention_support": "support",
    "context_scaling": "mean",
    "length_scaling": "softmax_ratio",
    "complexity": "total",
    **dict.fromkeys(("speedup", "error_vs_time", "crossover"), "seconds"),
    "compare": "max_ratio",
    "compare's lengths": "mean",
}
# Of these, some may lack a number.
MEASURED_IN_PART = {"growth_curves": "adjusted_ratio", "readings": "largest_ratio", "readings' path": "median_double"}
MEASURED_IN_PART |= {"compare's readings": "median_double", "speedup": "error_v_p95"}


def cell(column: str, value: str) -> Callable[[bytes], bytes]:
    """Another value in the first row of a column."""

    def changed(found: list[str]) -> list[str]:
        row = found[1].split(",")
        row[found[0].split(",").index(column)] = value
        return [found[0], ",".join(row), *found[2:]]

    return lines(changed)


# A hash finds these; without one nothing could.
WITH_HASH: dict[str, Callable[[bytes], bytes]] = {
    "cut behind a line": lines(lambda found: found[:-1]),
    "a digit changed": lambda data: data.replace(b"5", b"6", 1),
    "two lines exchanged": lines(lambda found: [found[0], found[2], found[1], *found[3:]]),
    "ends of lines of another system": lambda data: data.replace(b"\n", b"\r\n"),
}
WITHOUT: dict[str, Callable[[bytes], bytes]] = {
    "nothing in it": lambda data: b"",
    "cut inside a line": lambda data: data[:-4],
    "cut inside the first line": lambda data: data[:9],
    "a header alone": lines(lambda found: found[:1]),
    "another table": lambda data: b"a,b\n1,2\n",
    "no header": lines(lambda found: found[1:]),
    "an object of JSON": lambda data: b"{}\n",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a byte of Latin-1": lambda data: data + b"\xe9\n",
    "a cell too few": cells(lambda found: found[:-1]),
    "a cell too many": cells(lambda found: [*found, "1"]),
    "words in place of a number": cells(lambda found: [found[0], "many", *found[2:]], 2),
    "a column twice": cells(lambda found: [found[0], *found[:-1]], 0),
    "a quotation that is not closed": cells(lambda found: ['"' + found[0], *found[1:]]),
}
# Of a table with a row for each layer and head.
OF_HEADS: dict[str, Callable[[bytes], bytes]] = {
    "a head left out, without a hash": lines(lambda found: found[:-1]),
    "a head twice": lines(lambda found: [*found[:-1], found[-2]]),
    "a negative layer": cells(lambda found: ["-1", *found[1:]]),
    "half a layer": cells(lambda found: ["0.5", *found[1:]]),
    "a layer beyond any memory": cells(lambda found: ["999999999999", *found[1:]]),
    "a layer without a number": cells(lambda found: ["", *found[1:]]),
    "another model's rows": lines(lambda found: [*found, *(line.replace(line[0], "7", 1) for line in found[1:])]),
}
OF_RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "nothing in it": lambda data: b"",
    "cut short": lambda data: data[:-4],
    "an empty object": lambda data: b"{}",
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a byte of Latin-1": lambda data: data.replace(b"model", b"mod\xe9l"),
    "nested 100,000 deep": lambda data: b"[" * 100_000,
    "NaN for a number": lambda data: data.replace(b'"heads": 3', b'"heads": NaN'),
    "a number of 6,000 digits": lambda data: data.replace(b'"heads": 3', b'"heads": ' + b"9" * 6000),
    "a negative number": lambda data: data.replace(b"4.6", b"-4.6").replace(b'"texts_used": 2', b'"texts_used": -2'),
    "a text for a number": lambda data: data.replace(b'"texts_used": 2', b'"texts_used": "two"').replace(
        b"4.6", b'"4.6"'
    ),
    "a number for a text": lambda data: data.replace(b'"a model"', b"5").replace(b'"m"', b"5"),
    "more layers than the table": lambda data: data.replace(b'"layers": 2', b'"layers": 3').replace(b"4.6", b"1e999"),
}
OF_SHARDS: dict[str, Callable[[bytes], bytes]] = {
    "nothing in it": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-8],
    "a CSV": lambda data: b"context\n1\n",
    "zeros": lambda data: bytes(len(data)),
}


def columns(
    reader: str, found: tuple[tuple[str, ...], str], change: Callable[[Any], Any], folder: Path
) -> tuple[int, str]:
    """A whole table of other columns, with its hash."""
    whole(folder)
    path = folder / found[1]
    write_parquet(path, change(pd.read_parquet(path)))
    return read(reader, found[0], folder)


OF_COLUMNS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "a column missing": lambda table: table.iloc[:, :-1],
    "texts for numbers": lambda table: table.astype({table.columns[0]: str}),
    "negative numbers for a place": lambda table: table.assign(**{table.columns[0]: -1}),
    "a negative number": lambda table: table.assign(**{table.columns[-1]: -1.5}),
    "no number": lambda table: table.assign(**{table.columns[-1]: np.nan}),
}


def removed(reader: str, found: tuple[tuple[str, ...], str], folder: Path) -> tuple[int, str]:
    whole(folder)
    (folder / found[1]).unlink()
    return read(reader, found[0], folder)


def a_folder(reader: str, found: tuple[tuple[str, ...], str], folder: Path) -> tuple[int, str]:
    whole(folder)
    (folder / found[1]).unlink()
    (folder / found[1]).mkdir()
    return read(reader, found[0], folder)


def of_a_folder(damage: Callable[[Path], Any], folder: Path) -> tuple[int, str]:
    """The last words about a study's folder."""
    tables = folder / "tables"
    tables.mkdir()
    whole(tables)
    (tables / "lengths_m.json").unlink()
    damage(tables)
    return command(folder, "show", ".")


OF_SHOW: dict[str, Callable[[Path], Any]] = {
    "an overview without its numbers": lambda tables: None,
    "an overview that is a list": lambda tables: (tables / "overview_m.json").write_text("[]"),
    "an overview cut short": lambda tables: (tables / "overview_m.json").write_text('{"model": "m'),
    "facts of long texts without lengths": lambda tables: (tables / "lengths_m.json").write_text('{"model": "m"}'),
}


def unhashed(folder: Path, hash_text: str) -> tuple[int, str]:
    whole(folder)
    (folder / "heads_m.csv.sha256").write_text(hash_text)
    return read("max_ratios", OF_MODEL, folder)


def case(name: str, function: Callable[..., tuple[int, str]], *arguments: Any) -> Case:
    return Case("tables", name, partial(function, *arguments))


CASES = [
    *(case(f"{r}: {d}", run, r, READERS[r], WITHOUT[d], False) for r in READERS for d in WITHOUT),
    *(case(f"{r}: {d}", run, r, READERS[r], WITH_HASH[d], True) for r in READERS for d in WITH_HASH),
    *(
        case(f"{r}: {d}", run, r, READERS[r], OF_HEADS[d], False)
        for r in ("max_ratios", "growth", "growth_curves", "attention_support", "length_scaling", "compare")
        for d in OF_HEADS
    ),
    *(
        case(f"{r}: {value} in {column}", run, r, READERS[r], cell(column, value), False)
        for columns_of, values in ((MEASURED, ("-1.5", "nan", "inf")), (MEASURED_IN_PART, ("-1.5", "-inf")))
        for r, column in columns_of.items()
        for value in values
    ),
    *(case(f"{r}'s record: {d}", run, r, RECORDS[r], OF_RECORDS[d], False) for r in RECORDS for d in OF_RECORDS),
    *(case(f"{r}, a shard: {d}", run, r, SHARDS[r], OF_SHARDS[d], False) for r in SHARDS for d in OF_SHARDS),
    *(
        case(f"{r}, a shard: {d}", columns, r, SHARDS[r], OF_COLUMNS[d])
        for r in SHARDS
        if r != "summary's texts"
        for d in OF_COLUMNS
    ),
    *(case(f"{r}: no file", removed, r, found) for r, found in READERS.items()),
    *(case(f"{r}: a folder of its name", a_folder, r, READERS[r]) for r in ("growth", "complexity", "speedup")),
    *(case(f"show: {d}", of_a_folder, damage) for d, damage in OF_SHOW.items()),
    *(
        case(f"a hash file with {what}", lambda folder, text=text: unhashed(folder, text))
        for what, text in {
            "nothing in it": "",
            "another hash": f"{'0' * 64}  heads_m.csv\n",
            "a line of words": "no hash\n",
        }.items()
    ),
]
