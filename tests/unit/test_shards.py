"""What steps take from each other is of the model that a command is given, and of its texts, all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bad_inputs import command, is_one_line, tables
from models_support import captured_of
from safetensors import safe_open
from safetensors.torch import save_file

from approxkmv.errors import TableError
from approxkmv.files import file_sha256, write_csv, write_parquet
from approxkmv.models.recording import Layer
from approxkmv.results.activations import read_activations, write_activations
from approxkmv.results.shards import write_shard
from approxkmv.results.tables import SHARDS, read_shard_table
from approxkmv.statistics.streaming import LengthStatistics
from approxkmv.steps.lengths import _values

OF_SHARDS = {
    "summary": ("--out", "tables"),
    "growth": ("--tables", "."),
    "growth of long texts": ("--tables", ".", "--study", "long"),
    "readings-table": ("--out", "tables"),
    "attention-table": ("--out", "tables"),
    "length-scaling": ("--out", "tables", "--study", "long"),
}
OF_ACTIVATIONS = {
    "statistics": ("--heads-out", "heads.parquet", "--prefixes-out", "prefixes.parquet"),
    "attention": ("--out", "attention.parquet"),
    "readings": ("--out", "readings.parquet", "--texts", "texts.parquet"),
    "lengths": ("--out", "lengths.parquet", "--study", "long", "--contexts", "0000.contexts.csv"),
}


def shards(folder: Path, model: str | None = "m", of: str = "texts.parquet", texts: Sequence[int] = (0, 1)) -> None:
    """The shard of the tables that the bad inputs damage, with its origin; without a model's name as once written."""
    tables.whole(folder)
    write_parquet(folder / "others.parquet", pd.DataFrame({"index": [0, 1], "name": "t", "text": "Two."}))
    origin = f"weights a, texts {file_sha256(folder / of)}"
    for kind in SHARDS:
        path = folder / f"0000.{kind}"
        if path.suffix == ".csv":
            table = pd.read_csv(path).head(len(texts)).assign(context=texts)
        else:
            table = pd.read_parquet(path)
        write_shard(path, table, f"model {model}, {origin}" if model else origin)


def activations(folder: Path, model: str | None = "m", weights: str = "a") -> None:
    """The queries and keys of a text, likewise."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 24, 8, generator=generator) for _ in range(2))
    origin = f"weights {weights}, texts {file_sha256(folder / 'texts.parquet')}"
    origin = f"model {model}, {origin}" if model else origin
    special = {0: torch.zeros(24, dtype=torch.bool)}
    path = folder / "qk.safetensors"
    write_activations(path, {0: captured_of(q, k, 0.3, 0.3)}, special, origin, causal=True, own_masks=False)


def merge(name: str, folder: Path) -> tuple[int, str]:
    given = ("--model", "m", "--statistics", ".", "--texts", "texts.parquet", *OF_SHARDS[name])
    return command(folder, name.partition(" ")[0], *given)


def measure(name: str, folder: Path) -> tuple[int, str]:
    return command(folder, name, "--model", "m", "--activations", "qk.safetensors", *OF_ACTIVATIONS[name])


@pytest.mark.parametrize("name", OF_SHARDS)
def test_shards_of_another_model_are_refused(name, tmp_path):
    shards(tmp_path, "other")
    code, printed = merge(name, tmp_path)
    assert is_one_line(code, printed), printed
    assert "is of the model other, not of m" in printed
    assert not list(tmp_path.glob("tables/*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"of": "others.parquet"}, "other texts than texts.parquet"),
        ({"texts": [0]}, "1 of the 2 texts"),
        ({"texts": [0, 5]}, "1 of the 2 texts"),
    ],
)
def test_shards_of_other_texts_or_of_some_of_them_are_refused(change, says, tmp_path):
    shards(tmp_path, **change)
    for name in ("summary", "growth of long texts"):
        code, printed = merge(name, tmp_path)
        assert is_one_line(code, printed), printed
        assert says in printed


@pytest.mark.parametrize("name", OF_SHARDS)
@pytest.mark.parametrize("model", ["m", None])
def test_shards_of_the_model_and_older_ones_without_its_name_are_read(name, model, tmp_path):
    shards(tmp_path, model)
    assert merge(name, tmp_path)[0] == 0


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
def test_queries_and_keys_of_another_model_are_refused(name, tmp_path):
    shards(tmp_path)
    activations(tmp_path, "other")
    code, printed = measure(name, tmp_path)
    assert is_one_line(code, printed), printed
    assert "qk.safetensors is of the model other, not of m" in printed


@pytest.mark.parametrize("name", OF_ACTIVATIONS)
@pytest.mark.parametrize("model", ["m", None])
def test_queries_and_keys_of_the_model_and_older_ones_are_read_and_their_shards_say_so(name, model, tmp_path):
    shards(tmp_path)
    activations(tmp_path, model)
    code, printed = measure(name, tmp_path)
    assert code == 0, printed
    (made,) = {line for path in tmp_path.glob("[hpral]*.parquet.sha256") for line in path.read_text().splitlines()[1:]}
    assert made.startswith("# model m, weights a" if model else "# weights a")


def test_lengths_take_no_list_of_texts_of_another_run(tmp_path):
    shards(tmp_path)
    activations(tmp_path, weights="b")
    code, printed = measure("lengths", tmp_path)
    assert is_one_line(code, printed), printed
    assert "0000.contexts.csv and qk.safetensors come from different weights or texts" in printed


def spans(*span: float, layers: int = 2, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(span, dtype=dtype).expand(layers, 24, len(span))


DAMAGED: dict[str, dict[str, torch.Tensor | None]] = {
    "no keys": {"0000000.keys": None},
    "fewer keys than queries": {"0000000.keys": torch.ones(2, 3, 20, 8)},
    "queries without heads": {"0000000.queries": torch.ones(2, 24, 8)},
    "whole numbers": {"0000000.queries": torch.ones(2, 3, 24, 8, dtype=torch.int64)},
    "eight bits": {"0000000.keys": torch.ones(2, 3, 24, 8, dtype=torch.float8_e4m3fn)},
    "no head": {f"0000000.{what}": torch.ones(2, 0, 24, 8) for what in ("queries", "keys")},
    "no token": {f"0000000.{what}": torch.ones(2, 3, 0, 8) for what in ("queries", "keys")}
    | {"0000000.special": torch.zeros(0, dtype=torch.bool)},
    "more layers than scales": {f"0000000.{what}": torch.ones(3, 3, 24, 8) for what in ("queries", "keys")},
    "fewer layers than scales": {"scales": torch.ones(3)},
    "no scale": {"scales": torch.ones(0)},
    "one scale for all": {"scales": torch.tensor(0.3)},
    "scales of 0": {"scales": torch.zeros(2)},
    "an infinite scale": {"scales": torch.tensor([0.3, torch.inf])},
    "several answers to one question": {"causal": torch.ones(3)},
    "marks of fewer tokens": {"0000000.special": torch.zeros(4, dtype=torch.bool)},
    "numbers for marks": {"0000000.special": torch.zeros(24)},
    "no marks": {"0000000.special": None},
    "spans of three numbers": {"0000000.spans": spans(0, 24, 24)},
    "spans of fractions": {"0000000.spans": spans(0, 24, dtype=torch.float32)},
    "spans of fewer layers": {"0000000.spans": spans(0, 24, layers=1)},
    "spans beyond the text": {"0000000.spans": spans(0, 25)},
    "spans from before the text": {"0000000.spans": spans(-1, 24)},
    "spans of no key": {"0000000.spans": spans(5, 5)},
    "a bias of a later layer": {"0000000.0.bias": torch.tensor(1)},
    "a bias of a layer before all": {"0000000.1.bias": torch.tensor(-1)},
    "three caps": {"0000000.0.softcap": torch.ones(3)},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_queries_and_keys_that_extract_does_not_write_so_are_refused(damage, tmp_path):
    shards(tmp_path)
    activations(tmp_path)
    path = tmp_path / "qk.safetensors"
    with safe_open(path, "pt") as file:
        metadata, whole = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(whole | {"0000000.spans": spans(0, 24).contiguous()}, path, metadata=metadata)
    assert [item.context for item in read_activations(path, "m").contexts] == [0]
    changed = {name: tensor for name, tensor in (whole | DAMAGED[damage]).items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path, metadata=metadata)
    with pytest.raises(TableError, match=r"qk.safetensors .*: delete it and run extract again"):
        list(read_activations(path, "m").contexts)


def test_a_text_may_be_listed_twice_where_long_texts_are_measured(tmp_path):
    shards(tmp_path)
    activations(tmp_path)
    path = tmp_path / "0000.contexts.csv"
    table = pd.read_csv(path)
    write_csv(path, pd.concat([table, table]))
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("lengths:\n    - 10\n    - 20", "lengths: [10, 20, 30]"))
    code, printed = measure("lengths", tmp_path)
    assert code == 0, printed
    assert "no 30" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_of_a_text_is_read_again_and_a_bias_that_layers_share_is_written_once(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4, 3, 24, 8, generator=generator).to(dtype) for _ in range(2))
    shared, other = (torch.randn(3, 24, 24, generator=generator) for _ in range(2))
    sinks = torch.randn(3, generator=generator)
    layers = (
        Layer(bias=shared),
        Layer(bias=other, softcap=5.0),
        Layer(bias=shared, sinks=sinks),
        Layer(bias=shared[:1]),
    )
    one = replace(captured_of(q, k, 0.1, 0.2, 0.3, 0.4), layers=layers, spans=spans(0, 24, layers=4))
    special = torch.arange(24) < 2
    path = tmp_path / "qk.safetensors"
    write_activations(path, {5: one}, {5: special}, "model m, weights a, texts b", causal=False, own_masks=True)
    shard = read_activations(path, "m")
    assert (shard.numbers, shard.causal, shard.masked, shard.scales.tolist()) == (
        (5,),
        False,
        True,
        [0.1, 0.2, 0.3, 0.4],
    )
    (item,) = shard.contexts
    assert item.context == 5
    for ours, theirs in ((item.queries, q), (item.keys, k), (item.special, special), (item.spans, one.spans)):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    for found, layer in zip(item.beside, layers, strict=True):
        assert torch.equal(found["bias"], layer.bias)
        assert found["softcap"] == layer.softcap
        assert (found["sinks"] is None) if layer.sinks is None else torch.equal(found["sinks"], layer.sinks)
    with safe_open(path, "pt") as file:
        assert [file.get_slice(f"0000005.{i}.bias").get_shape() for i in range(4)] == [[3, 24, 24]] * 2 + [
            [],
            [1, 24, 24],
        ]


def test_texts_are_read_in_order_however_large_their_numbers(tmp_path):
    numbers = [3, 9_999_999, 10_000_000, 123_456_789]
    texts = {number: captured_of(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2), 0.5) for number in numbers}
    special = {number: torch.zeros(4, dtype=torch.bool) for number in numbers}
    path = tmp_path / "qk.safetensors"
    write_activations(path, texts, special, "model m, weights a, texts b", causal=False, own_masks=False)
    shard = read_activations(path, "m")
    assert shard.numbers == tuple(numbers)
    assert [item.context for item in shard.contexts] == numbers


_KEYS = [f"keys_{share}_{what}" for share in (90, 99) for what in ("mean", "median", "largest")]
_ROWS = ["entropy", "support", "keys_90", "keys_99", "first_mass", "sink_mass", "largest_weight"]
_ROWS += ["column_norm", "stable_rank"]
# Of each kind of shard its columns, and values that one may not hold.
REFUSED: dict[str, dict[str, tuple[object, ...]]] = {
    "contexts.csv": dict.fromkeys(("context", "tokens", "cut"), (-1, 0.5))
    | dict.fromkeys(("used", "causal"), ("maybe", 2))
    | {"mask": (3, np.nan), "left_out": ()},
    "heads.parquet": dict.fromkeys(("context", "layer", "head", "max_prefix"), (-1, 0.5))
    | dict.fromkeys(("max_ratio", "log_next", "log_double"), (-1.0, np.nan, np.inf)),
    "prefixes.parquet": dict.fromkeys(("context", "layer", "head", "prefix"), (-1, 0.5)) | {"ratio": (-1.0, np.nan)},
    "attention.parquet": dict.fromkeys(("context", "layer", "head", "tokens"), (-1, 0.5))
    | dict.fromkeys(_ROWS, (-1.0, np.nan)),
    "readings.parquet": dict.fromkeys(("context", "layer", "head"), (-1, 0.5))
    | dict.fromkeys(("reading", "entries"), (3,))
    | dict.fromkeys(("ratio", "log_next", "log_double"), (-1.0, "x"))
    | dict.fromkeys(("underflows", "undefined"), (2, "maybe")),
    "lengths.parquet": dict.fromkeys(("context", "layer", "head", "length"), (-1, 0.5))
    | dict.fromkeys(("ratio", "log_next", "log_double", "softmax_ratio", *_KEYS), (-1.0, np.nan))
    | {"tail_exponent": ("x",)},
}
ALLOWED = {"contexts.csv": {"left_out": np.nan}, "lengths.parquet": {"tail_exponent": -1.0}}
ALLOWED["readings.parquet"] = {"ratio": np.nan, "log_next": np.inf, "log_double": np.nan}


@pytest.mark.parametrize("kind", REFUSED)
def test_each_column_of_a_shard_is_there_and_holds_what_it_may(kind, tmp_path):
    tables.whole(tmp_path)
    path = tmp_path / f"0000.{kind}"
    columns = REFUSED[kind]
    read, write = (pd.read_csv, write_csv) if path.suffix == ".csv" else (pd.read_parquet, write_parquet)
    whole = read(path)[list(columns)]
    places = [name for name, values in columns.items() if values == (-1, 0.5)]
    measured = [name for name in columns if name not in places]

    def written(table: pd.DataFrame) -> pd.DataFrame:
        write(path, table)
        return read_shard_table(path, kind)

    for name, values in columns.items():
        with pytest.raises(TableError, match=f"lacks the columns {name}"):
            written(whole.drop(columns=name))
        for value in values:
            with pytest.raises(TableError, match=f"column {name} must hold"):
                written(whole.assign(**{name: value}))
    for name, value in ALLOWED.get(kind, {}).items():
        assert len(written(whole.assign(**{name: value}))) == len(whole)
    # Masked columns are all there or none, and hold the same.
    masked = whole[measured].add_prefix("masked_")
    assert len(written(whole.join(masked))) == len(whole)
    if len(measured) > 1:
        with pytest.raises(TableError, match=f"lacks the columns masked_{measured[-1]}"):
            written(whole.join(masked.iloc[:, :-1]))
    if kind == "contexts.csv":
        with pytest.raises(TableError, match="has no rows"):
            written(whole.iloc[:0])
    else:
        assert written(whole.iloc[:0]).empty


def test_keys_per_row_are_under_their_names():
    found = LengthStatistics(0.1, 0.2, 0.3, 0.4, 0.5, (1.0, 2.0), (3.0, 4.0), (5, 6))
    values = _values(found)
    assert [values[name] for name in _KEYS] == [1.0, 3.0, 5.0, 2.0, 4.0, 6.0]
